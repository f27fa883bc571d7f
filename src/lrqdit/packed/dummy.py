"""Packed layers of random codes, for measurements of time and memory."""

from typing import Any

import torch

from lrqdit.config import TRELLIS_BITS
from lrqdit.numerics.shapes import kronecker_factors
from lrqdit.packed.format import LinearFormat
from lrqdit.packed.linear import QuantLinear
from lrqdit.packed.pointwise import empty_layer

ROW_SCALE = 2.0**-11  # keeps the outputs of random layers of a few thousand inputs near their inputs' size


def random_layer(
    in_features: int, out_features: int, weight_bits: int, activation_bits: int, device: Any = None, **options: Any
) -> QuantLinear:
    """A packed layer of random codes with offset, scale and Hadamard rotation; options: other fields of its format."""
    values = {
        "in_features": in_features, "out_features": out_features, "weight_bits": weight_bits,
        "activation_bits": activation_bits, "rotation": "hadamard", "factors": kronecker_factors(in_features),
        "has_offset": True, "has_scale": True, "table_rows": 0 if weight_bits == 8 else 1,
        "is_trellis": weight_bits in TRELLIS_BITS,
    }  # fmt: skip
    return fill_randomly(empty_layer(LinearFormat.from_dict({**values, **options}), torch.bfloat16, device))


def fill_randomly(layer: QuantLinear) -> QuantLinear:
    """Random codes, evenly spaced levels, one row scale, no offset, no smoothing; on the meta device nothing."""
    layer.packed.random_(0, 256)
    tensors = layer.tensors()
    for name, values in (("row_scale_bits", ROW_SCALE), ("input_scale_bits", 1.0)):
        if (tensor := tensors.get(name)) is not None:
            tensor.view(torch.float16 if tensor.dtype == torch.int16 else torch.float32).fill_(values)
    if (table := tensors.get("table")) is not None:
        table.copy_(torch.linspace(-127, 127, table.shape[1], dtype=torch.float32).round())
    return layer
