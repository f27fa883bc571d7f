"""PixArt-alpha and PixArt-Sigma, Latte, Allegro: one modulation for all blocks; DiT: one in each block."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

_PIXART = ModelSpec(rf"(temporal_)?transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})")
SPECS = {
    "PixArtTransformer2DModel": _PIXART,
    "LatteTransformer3DModel": _PIXART,
    "AllegroTransformer3DModel": _PIXART,
    "DiTTransformer2DModel": ModelSpec(_PIXART.quantized, weight_only=r"transformer_blocks\.\d+\.norm1\.linear"),
}
