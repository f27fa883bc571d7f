"""CogVideoX, ConsisID, CogView 3 Plus, CogView 4, GLM-Image: text and picture in one stream, modulation in blocks."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

_COGVIDEOX = ModelSpec(
    rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})",
    weight_only=r"transformer_blocks\.\d+\.norm[12]\.linear",
)
SPECS = {
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "CogView3PlusTransformer2DModel": _COGVIDEOX,
    "CogView4Transformer2DModel": _COGVIDEOX,
    "GlmImageTransformer2DModel": _COGVIDEOX,
    "ConsisIDTransformer3DModel": ModelSpec(  # without the extractor of faces, which runs once a video
        rf"{_COGVIDEOX.quantized}|perceiver_cross_attention\.\d+\.(to_q|to_kv|to_out)",
        weight_only=_COGVIDEOX.weight_only,
    ),
}
