"""CogVideoX."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

SPECS = {
    "CogVideoXTransformer3DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})",
        weight_only=r"transformer_blocks\.\d+\.norm[12]\.linear",
    )
}
