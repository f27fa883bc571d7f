"""Stable Diffusion 3 and 3.5, AuraFlow, Mochi and EasyAnimate: double blocks with a text stream."""

from lrqdit.models.spec import ATTENTION, DOUBLE_MODULATION, FEED_FORWARD, ModelSpec

SPECS = {
    "SD3Transformer2DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})", weight_only=DOUBLE_MODULATION
    ),
    "AuraFlowTransformer2DModel": ModelSpec(
        rf"(joint|single)_transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.(linear_\d|out_projection))",
        weight_only=rf"(joint|single)_{DOUBLE_MODULATION}",
    ),
    "MochiTransformer3DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})",
        weight_only=rf"{DOUBLE_MODULATION}|transformer_blocks\.\d+\.norm1_context\.linear_1",
    ),
    "EasyAnimateTransformer3DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|(txt_)?{FEED_FORWARD})",
        weight_only=r"transformer_blocks\.\d+\.norm[12]\.linear",
    ),
}
