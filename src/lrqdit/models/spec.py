"""What a family of models says of itself: which linear layers are quantized, and how its pipeline is called."""

from dataclasses import dataclass, field
from typing import Any

# names of linear layers that most diffusers transformers share, inside a block
ATTENTION = r"attn\d?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)"


@dataclass(frozen=True)
class ModelSpec:
    """What to do with one architecture. Layers that neither pattern names are kept out of the low-bit set.

    Args:
        quantized: regular expression of the whole names of layers that run with low-bit weights and quantized
            activations.
        weight_only: the same of layers stored at low bits but run on float activations: large modulation layers that
            see one token per picture.
        kept: regular expression, searched in the name, of layers never taken by ``quantized``.
        call_arguments: arguments of the pipeline's call that calibration and generation add.
    """

    quantized: str
    weight_only: str = ""
    kept: str = ""
    call_arguments: dict[str, Any] = field(default_factory=dict)
