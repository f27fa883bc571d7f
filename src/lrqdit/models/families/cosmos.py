"""Cosmos: modulation through a low rank in each block; Cosmos 3: a language model and its twin for pictures."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

SPECS = {
    "CosmosTransformer3DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})",
        weight_only=r"transformer_blocks\.\d+\.norm[123]\.linear_[12]",
    ),
    "Cosmos3OmniTransformer": ModelSpec(
        rf"layers\.\d+\.(self_{ATTENTION}|mlp(_moe_gen)?\.(gate_proj|up_proj|down_proj))"
    ),
}
