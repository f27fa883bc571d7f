"""Stable Diffusion 3 and 3.5."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

SPECS = {
    "SD3Transformer2DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})",
        weight_only=r"transformer_blocks\.\d+\.norm1(_context)?\.linear",
    )
}
