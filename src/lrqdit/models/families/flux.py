"""FLUX.1 and HunyuanVideo: double blocks with a text stream, then single ones, each with a large modulation layer."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

_DOUBLE_AND_SINGLE_BLOCKS = ModelSpec(
    rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})"
    rf"|single_transformer_blocks\.\d+\.({ATTENTION}|proj_mlp|proj_out)",
    weight_only=r"transformer_blocks\.\d+\.norm1(_context)?\.linear|single_transformer_blocks\.\d+\.norm\.linear",
)
SPECS = {
    "FluxTransformer2DModel": _DOUBLE_AND_SINGLE_BLOCKS,
    "HunyuanVideoTransformer3DModel": _DOUBLE_AND_SINGLE_BLOCKS,
}
