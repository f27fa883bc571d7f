"""From a dense linear layer to a quantized one: choose the input transform, fit the levels, fill the buffers.

For every group of layers that read one tensor the candidates (smoothing or not, each rotation, for 4-bit tokens with
and without a principal part that is not rounded) are built, the weights are folded and quantized, and the output error
on reservoir tokens decides:

    error = || Q(x~) Q(W~)^T - (x - mean) W^T ||^2 / || (x - mean) W^T ||^2

relative to the part of the output that varies between tokens, so that a constant offset neither hides nor inflates it.
The clip of each candidate is the ratio with the smallest error. On large layers a sample of rows decides. Then each
weight is rounded to the nearest levels, or (``compensate``) so that later columns make up for earlier ones' errors.
"""

import numpy as np
import torch
from torch import Tensor, nn

from lrqdit.config import TRELLIS_BITS, QuantizationConfig
from lrqdit.errors import NumericalError
from lrqdit.fitting.compensate import Curvature, round_weight
from lrqdit.fitting.reports import GroupReport
from lrqdit.fitting.transform import fit_levels
from lrqdit.kernels import ops
from lrqdit.numerics import principal, rotation, trellis
from lrqdit.numerics.tokens import InputTransform
from lrqdit.packed.format import LinearFormat
from lrqdit.packed.linear import QuantLinear, describe_input


def check_finite(name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Raise :class:`NumericalError` naming the layer if its weight or bias contains NaN or Inf."""
    for leaf, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"{name}.{leaf} contains NaN or Inf; check the checkpoint, or load it in another dtype"
            )


def quantize_linear(
    name: str, weight: Tensor, bias: Tensor | None, transform: InputTransform, config: QuantizationConfig,
    weight_bits: int, activation_bits: int, dtype: torch.dtype, input_from: str | None = None,
    curvature: Curvature | None = None, report: GroupReport | None = None,
) -> QuantLinear:  # fmt: skip
    """Fold the transform into a layer's weight and bias, fit its levels, round and pack.

    Args:
        name: for messages.
        weight: float (out_features, in_features); bias: float (out_features,) or None.
        transform: of the layer's input.
        dtype: the dtype the layer answers for its weight.
        input_from: name of the layer that owns the transform, if it is another one.
        curvature: of the layer's transformed input, for rounding that compensates its error; None rounds plainly.
        report: where the errors of the ways of rounding are noted.

    Raises:
        NumericalError: if the weight contains NaN or Inf.
    """
    check_finite(name, weight, bias)
    weight = weight.detach().cpu().float()
    folded = ops.fold(transform, weight)
    levels = fit_levels(name, folded, weight_bits, config)
    if is_trellis := config.has_trellis and weight_bits in TRELLIS_BITS:
        levels = trellis.expand(levels, folded)
    new_bias = None if bias is None else bias.detach().cpu().float()
    if transform.input_offset is not None:
        shift = (weight.numpy().astype(np.float64) * transform.input_offset.double().numpy()).sum(axis=1)
        shift = torch.from_numpy(shift)
        new_bias = (shift if new_bias is None else new_bias.double() + shift).float()
    layout = LinearFormat(
        describe_input(transform, activation_bits),
        len(weight),
        weight_bits,
        levels.kind,
        table_rows=0 if weight_bits == 8 else len(levels.table),
        is_trellis=is_trellis,
        has_bias=new_bias is not None,
        has_original_bias=bias is not None,
        input_from=input_from,
    )
    outlet = None
    if transform.principal is not None:
        outlet = principal.LowRank.round(principal.outlet(transform.unsmooth(weight), transform.principal))
    if curvature is None or weight_bits == 8:
        codes = levels.encode(folded)
    else:
        levels, codes, errors = round_weight(folded, levels, curvature)
        if report is not None:
            report.rounding[name] = errors
    table = None if weight_bits == 8 else levels.table
    return QuantLinear(layout, dtype).fill(codes, table, levels.row_scale, new_bias, transform, outlet)


def keep_at_8_bits(name: str, layer: nn.Linear, config: QuantizationConfig) -> QuantLinear:
    """A layer outside the low-bit set, stored weight-only: uniform 8-bit levels per row, no transform."""
    plain = InputTransform(rotation.Rotation("none", layer.in_features), None, None)
    return quantize_linear(name, layer.weight, layer.bias, plain, config, 8, 16, layer.weight.dtype)
