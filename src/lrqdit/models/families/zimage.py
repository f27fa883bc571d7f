"""Z-Image, Lumina 2 and Lumina-Next, Fibo 2, Ideogram 4: one stream of blocks, after refiners of text and noise."""

from lrqdit.models.spec import ATTENTION, ModelSpec

_BLOCKS = r"(layers|noise_refiner|context_refiner|perceiver\.layers)\.\d+\."
_ATTENTION = r"(self_|cross_)?attention\.(to_q|to_k|to_v|to_out\.0)"
_ONE_STREAM = ModelSpec(
    rf"{_BLOCKS}({_ATTENTION}|(feed_forward|ffn)\.w\d)",
    weight_only=rf"{_BLOCKS}(adaLN_modulation\.\d|adaln_modulation)",
)
_LUMINA = ModelSpec(rf"{_BLOCKS}({ATTENTION}|feed_forward\.linear_\d)", weight_only=rf"{_BLOCKS}norm1\.linear")
SPECS = {
    "ZImageTransformer2DModel": _ONE_STREAM,
    "BriaFibo2Transformer2DModel": _ONE_STREAM,
    "Ideogram4Transformer2DModel": _ONE_STREAM,
    "Lumina2Transformer2DModel": _LUMINA,
    "LuminaNextDiT2DModel": _LUMINA,
}
