"""What a family of models says of itself: which linear layers are quantized, and how its pipeline is called."""

from dataclasses import dataclass, field
from typing import Any

# Names of linear layers that most diffusers transformers share, inside a block.
ATTENTION = r"attn\d?\.(to_q|to_k|to_v|to_out(\.0)?|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)"
DOUBLE_MODULATION = r"transformer_blocks\.\d+\.norm1(_context)?\.linear"


@dataclass(frozen=True)
class ModelSpec:
    """What to do with one architecture. Layers that no pattern names are kept, at 8 bits where they are large.

    Args:
        quantized: regular expression of the whole names of layers that run with low-bit weights and quantized
            activations.
        weight_only: the same of layers stored at low bits but run on float activations: modulation layers inside
            blocks, which see one token per picture. Where they are small they stay as they are.
        kept: regular expression, searched in the name, of layers never taken by ``quantized``.
        dense: regular expression of the whole names of layers that must stay as they are, because their owner reads
            their weights by itself, or because they embed time as the layers that diffusers keeps in float32 do.
        call_arguments: arguments of the pipeline's call that calibration and generation add.
    """

    quantized: str
    weight_only: str = ""
    kept: str = ""
    dense: str = ""
    call_arguments: dict[str, Any] = field(default_factory=dict)
