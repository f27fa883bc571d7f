"""From a dense linear layer to a quantized one: fold its input transform, fit the levels, round, pack.

The weight is rounded to the nearest levels, or, with a curvature, by whichever does better on held-out tokens: the
nearest levels or GPTQ, which lets later columns make up for the errors of earlier ones (:mod:`.compensate`).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from lrqdit.config import TRELLIS_BITS, QuantizationConfig
from lrqdit.errors import NumericalError
from lrqdit.fitting.compensate import Curvature, round_weight
from lrqdit.fitting.reports import GroupReport
from lrqdit.fitting.transform import data_free_transform, fit_levels
from lrqdit.kernels import ops
from lrqdit.models.registry import Treatment
from lrqdit.numerics import principal, rotation, trellis
from lrqdit.numerics.tokens import InputTransform
from lrqdit.packed.format import LinearFormat
from lrqdit.packed.linear import QuantLinear, describe_input
from lrqdit.packed.pointwise import empty_layer


class LinearLike(Protocol):
    """A linear layer as far as fitting goes: an ``nn.Linear``, or tensors read from a file."""

    # and, for a 1 x 1 convolution, a channel_axis as LinearFormat has it
    weight: Any  # float (out_features, in_features)
    bias: Any  # float (out_features,) or None


def check_finite(name: str, layer: LinearLike) -> None:
    """Raise :class:`NumericalError` naming the layer if its weight or bias contains NaN or Inf."""
    for leaf, tensor in (("weight", layer.weight), ("bias", layer.bias)):
        if tensor is not None and not bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()):
            raise NumericalError(
                f"{name}.{leaf} contains NaN or Inf; check the checkpoint, or load it in another dtype"
            )


@dataclass(frozen=True)
class FittedInput:
    """What rounding needs to know of the input that the layers of a group share.

    Args:
        transform: centring, smoothing, rotation and clip.
        activation_bits: of its codes; 16 for float activations.
        curvature: of the transformed input, for rounding that compensates its error; None rounds plainly.
        owner: name of the layer that stores the transform.
    """

    transform: InputTransform
    activation_bits: int
    curvature: Curvature | None = None
    owner: str | None = None


def quantize_linear(
    name: str, layer: LinearLike, shared: FittedInput, weight_bits: int, config: QuantizationConfig,
    report: GroupReport | None = None,
) -> QuantLinear:  # fmt: skip
    """Fold the input transform into a layer's weight and bias, fit its levels, round and pack.

    Args:
        name: of the layer.
        layer: float weight (out_features, in_features), and bias (out_features,) or None. The result answers the
            weight's dtype for its own.
        shared: of its input.
        weight_bits: of the codes.
        config: kind of the levels.
        report: where the errors of the ways of rounding are noted.

    Raises:
        NumericalError: if the weight contains NaN or Inf.
    """
    check_finite(name, layer)
    transform, curvature = shared.transform, shared.curvature
    weight, bias = layer.weight.detach().cpu().float(), layer.bias
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
        describe_input(transform, shared.activation_bits),
        len(weight),
        weight_bits,
        levels.kind,
        table_rows=0 if weight_bits == 8 else len(levels.table),
        is_trellis=is_trellis,
        has_bias=new_bias is not None,
        has_original_bias=bias is not None,
        input_from=None if shared.owner == name else shared.owner,
        channel_axis=getattr(layer, "channel_axis", -1),
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
    return empty_layer(layout, layer.weight.dtype).fill(codes, table, levels.row_scale, new_bias, transform, outlet)


def quantize_without_data(
    name: str, layer: LinearLike, treatment: Treatment, config: QuantizationConfig
) -> QuantLinear:
    """A layer by its treatment alone: where it would be fitted, with a transform that needs no data; else with none."""
    in_features = layer.weight.shape[1]
    if treatment.is_fitted:
        transform = data_free_transform(in_features, config, treatment.activation_bits)
    else:
        transform = InputTransform(rotation.Rotation("none", in_features), None, None)
    return quantize_linear(
        name, layer, FittedInput(transform, treatment.activation_bits), treatment.weight_bits, config
    )
