"""Krea 2: one modulation layer for all blocks, and small blocks that fuse the text encoder's layers."""

from lrqdit.models.spec import ATTENTION, ModelSpec

SPECS = {
    "Krea2Transformer2DModel": ModelSpec(
        r"(transformer_blocks|text_fusion\.(layerwise|refiner)_blocks)\.\d+\."
        rf"({ATTENTION}|attn\.to_gate|ff\.(gate|up|down))"
    )
}
