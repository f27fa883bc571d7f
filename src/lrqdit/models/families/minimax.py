"""MiniMax-H3: nearly half of it is modulation, three numbers of each channel for every modality."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

SPECS = {
    "MiniMaxH3Transformer3DModel": ModelSpec(
        rf"(transformer_blocks|token_refiner\.refiner_blocks)\.\d+\.({ATTENTION}|{FEED_FORWARD})",
        weight_only=r"transformer_blocks\.\d+\.adaln_proj\.linear",
    )
}
