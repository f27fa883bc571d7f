"""From a dense linear layer to a quantized one: choose the input transform, fit the levels, fill the buffers.

For every group of layers that read one tensor the candidates (smoothing or not, each rotation, for 4-bit tokens with
and without a principal part that is not rounded) are built, the weights are folded and quantized, and the output error
on reservoir tokens decides:

    error = || Q(x~) Q(W~)^T - (x - mean) W^T ||^2 / || (x - mean) W^T ||^2

relative to the part of the output that varies between tokens, so that a constant offset neither hides nor inflates it.
The clip of each candidate is the ratio with the smallest error. On large layers a sample of rows decides. Then each
weight is rounded to the nearest levels, or (``compensate``) so that later columns make up for earlier ones' errors.
"""

import dataclasses
import math
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrqdit import codebook, ops, principal, rotation, trellis
from lrqdit.activation import CLIP_RATIOS, InputTransform, dequantize_tokens, quantize_tokens, smoothing_vector
from lrqdit.calibrate import ActivationStats
from lrqdit.compensate import Curvature, round_weight
from lrqdit.config import QuantizationConfig
from lrqdit.errors import NumericalError, RotationError
from lrqdit.linear import LinearFormat, QuantLinear

OUTLIER_GAIN = 0.10
PRINCIPAL_GAIN = 0.25
PRINCIPAL_SHARE = 0.2  # of the codes' bits, at most, for the directions that pass beside them
UNROTATED_GAIN = 2.0
SALIENT_RATIO = 4.0
ROWS_FOR_CHOICE = 384
FLOAT16_MAX = 65504.0
# By activation bits: clip * absmax with the smallest error on Gaussian tokens, in standard deviations (measured)
GAUSSIAN_RANGE = {(4, "uniform"): 2.25, (4, "normal"): 2.75, (6, "uniform"): 3.1}


@dataclass
class GroupReport:
    """Why a group of layers got its input transform.

    Args:
        names: the layers that share the input, its owner first.
        rms: J, the RMS of the input; None without calibration.
        absmax: the largest |x|; None without calibration.
        rotation, is_smoothed, clip, principal_rank: the choice.
        error: relative output error of the choice.
        candidates: relative output error by the rotation's name, perhaps with "+smoothing" and "+principal", of plain
            rounding to scalar levels.
        rounding: by layer, the held-out output error of each way of rounding relative to plain rounding; the smallest
            was taken.
        predicted: with ``average_bits``, by layer and weight bits the mean squared change of the model's output.
        chosen_bits: with ``average_bits``, the weight bits of each layer; ``weight_bits`` is where that was measured.
    """

    names: list[str]
    weight_bits: int
    activation_bits: int
    rotation: str
    is_smoothed: bool
    clip: float
    rms: float | None = None
    absmax: float | None = None
    error: float | None = None
    candidates: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen_bits: dict[str, int] = field(default_factory=dict)
    principal_rank: int = 0

    @property
    def gain(self) -> float | None:
        """Error without rotation and smoothing over the error of the choice; above 1 is better."""
        plain = self.candidates.get("none")
        return plain / self.error if plain is not None and self.error else None

    def bits_of(self, name: str) -> int:
        """The weight bits of one of the layers."""
        return self.chosen_bits.get(name, self.weight_bits)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain}


def squared_norm(x: Tensor) -> float:
    """Sum of squares in float64, the same for any number of threads."""
    return float(np.square(x.detach().cpu().numpy(), dtype=np.float64).sum())


def choose_transform(
    weights: dict[str, Tensor],
    stats: ActivationStats,
    config: QuantizationConfig,
    weight_bits: int,
    activation_bits: int,
) -> tuple[InputTransform, GroupReport]:
    """Pick centring, smoothing, rotation and clip for layers that share an input.

    Args:
        weights: float32 (out_features, in_features) by layer name.
        stats: of their common input.
        config: its policies.
        weight_bits, activation_bits: of this group (they differ from the config's for weight-only layers).
    """
    assert stats.tokens is not None
    name, x = next(iter(weights)), stats.tokens.float()
    mean, offset = stats.channel_mean, None
    if config.is_centred:
        offset = mean.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
    center = torch.zeros_like(mean) if offset is None else offset.float()
    absmax = stats.channel_absmax(center)
    weight_absmax = torch.stack([w.abs().amax(dim=0) for w in weights.values()]).amax(dim=0)
    smoothing = smoothing_vector(absmax, weight_absmax, config.smoothing_alpha)
    rows = torch.cat([w[:: max(1, math.ceil(len(w) * len(weights) / ROWS_FOR_CHOICE))] for w in weights.values()])
    target, varying = F.linear(x - center, rows), squared_norm(F.linear(x - mean, rows))

    is_measured = config.rotation == "auto" or config.smoothing == "auto"
    # R1 P R2 costs time and bits; and compensated rounding gains more on rotated columns than is measured here
    penalties = {"outlier": 1 / (1 - OUTLIER_GAIN), "none": UNROTATED_GAIN if config.rounding == "compensated" else 1.0}
    rank = _principal_rank(config, weights, weight_bits) if activation_bits == 4 else 0
    moment = None if rank == 0 else stats.second_moment(center)
    best: tuple[float, InputTransform, GroupReport] | None = None
    errors: dict[str, float] = {}
    for is_smoothed in {"auto": (False, True), "always": (True,), "never": (False,)}[config.smoothing]:
        scale = smoothing.float() if is_smoothed else torch.ones_like(mean)
        for kind in _candidate_rotations(config, stats.rms, absmax * scale):
            seed = config.seed * 1_000_003 + len(mean)
            try:
                built = rotation.build(len(mean), kind, seed, channel_absmax=absmax * scale)
            except RotationError:
                if is_measured:
                    continue  # a width that this kind cannot rotate is not a candidate
                raise
            signed = scale if built.signs is None else scale * built.signs
            stored = None if not is_smoothed and built.signs is None else signed.to(torch.float16)
            transform = InputTransform(
                rotation.Rotation.from_tensors(kind, len(mean), built.factors, built.tensors()), offset, stored
            )
            penalty = penalties.get(kind, 1.0) if is_measured else 1.0
            for candidate in (transform, _with_principal(transform, moment, rank, seed)):
                if candidate is None:
                    continue
                folded, whole = ops.fold(candidate, rows), target
                if candidate.principal is not None:
                    p = candidate.smooth(x) @ candidate.principal.values.T
                    whole = target - p @ principal.outlet(candidate.unsmooth(rows), candidate.principal)
                levels = _fit_levels(name, folded, weight_bits, config)
                candidate, error = _fit_clip(
                    candidate, candidate.apply(x), levels.quantize(folded), whole, varying, activation_bits, config
                )
                suffix = ("+smoothing" if is_smoothed else "") + ("+principal" if candidate.principal else "")
                errors[kind + suffix] = error
                score = error * penalty / (1 - PRINCIPAL_GAIN if candidate.principal else 1.0)
                if best is None or score < best[0]:
                    report = GroupReport(
                        list(weights), weight_bits, activation_bits, kind, is_smoothed, candidate.clip, stats.rms,
                        float(stats.channel_absmax().max()), error, errors,
                        principal_rank=rank if candidate.principal else 0,
                    )  # fmt: skip
                    best = score, candidate, report
    if best is None:
        raise RotationError(f"{name}: no rotation of {config.rotation!r} fits width {len(mean)}; use 'hadamard'")
    return best[1], best[2]


def _principal_rank(config: QuantizationConfig, weights: dict[str, Tensor], weight_bits: int) -> int:
    """Directions that pass beside the codes: fewer where a byte for each of their entries would be too much."""
    heights, width = [len(w) for w in weights.values()], next(iter(weights.values())).shape[1]
    affordable = PRINCIPAL_SHARE * weight_bits * width * sum(heights) / (8 * (width + sum(heights)))
    return min(config.principal_rank, int(affordable), *heights, width)


def _with_principal(transform: InputTransform, moment: Tensor | None, rank: int, seed: int) -> InputTransform | None:
    """The transform with the leading directions of what it smooths; None without a second moment."""
    if moment is None or not float(moment.trace()) > 0:
        return None
    scale = torch.ones(len(moment)) if transform.input_scale is None else transform.input_scale.float()
    moment = moment.float() * scale * scale[:, None]
    directions = principal.find_directions(lambda columns: moment @ columns, len(moment), rank, seed)
    return dataclasses.replace(transform, principal=directions)


def _candidate_rotations(config: QuantizationConfig, rms: float, channel_absmax: Tensor) -> tuple[str, ...]:
    """The rotations to measure. R1 P R2 evens out salient channels; without any it is not worth its search."""
    if config.rotation == "auto":
        is_salient = bool(channel_absmax.max() > SALIENT_RATIO * channel_absmax.median())
        return ("none", "hadamard", "outlier") if is_salient else ("none", "hadamard")
    if config.rotation == "threshold":
        return ("hadamard" if rms < config.rotation_threshold else "outlier",)
    return (config.rotation,)


def _fit_clip(
    transform: InputTransform, x: Tensor, weight: Tensor, target: Tensor, varying: float, bits: int,
    config: QuantizationConfig,
) -> tuple[InputTransform, float]:  # fmt: skip
    """Clip ratio and token levels of the smallest output error; x and weight rotated, the weight quantized."""
    if bits == 16:
        return transform, squared_norm(F.linear(x, weight) - target) / max(varying, 1e-300)
    best, best_error = transform, math.inf
    for levels in token_levels(config, bits):
        smallest = math.inf
        for clip in CLIP_RATIOS if config.is_clipped else (1.0,):
            seen = dequantize_tokens(*quantize_tokens(x, bits, clip, levels))
            error = squared_norm(F.linear(seen, weight) - target)
            if error >= smallest * 1.02:
                break  # the error is unimodal in the clip
            smallest = min(smallest, error)
            if error < best_error:
                best, best_error = dataclasses.replace(transform, clip=clip, levels=levels), error
    return best, best_error / max(varying, 1e-300)


def token_levels(config: QuantizationConfig, bits: int) -> tuple[str, ...]:
    """The kinds of levels that tokens of so many bits may take."""
    if bits != 4 or config.token_levels == "uniform":
        return ("uniform",)
    return ("normal",) if config.token_levels == "normal" else ("normal", "uniform")


def _fit_levels(name: str, weight: Tensor, bits: int, config: QuantizationConfig) -> codebook.Codebook:
    try:
        return codebook.fit(weight, bits, config.codebook, scope=config.table_scope)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from error


def check_finite(name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Raise :class:`NumericalError` naming the layer if its weight or bias contains NaN or Inf."""
    for leaf, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"{name}.{leaf} contains NaN or Inf; check the checkpoint, or load it in another dtype"
            )


def data_free_transform(in_features: int, config: QuantizationConfig, activation_bits: int) -> InputTransform:
    """Without calibration: a randomized Hadamard rotation and the clip that is best for Gaussian tokens."""
    kind = "hadamard" if config.rotation in ("auto", "threshold", "outlier") else config.rotation
    built = rotation.build(in_features, kind, config.seed * 1_000_003 + in_features)
    plain = rotation.Rotation.from_tensors(kind, in_features, built.factors, built.tensors())
    scale = None if built.signs is None else built.signs.to(torch.float16)
    levels = token_levels(config, activation_bits)[0]
    clip = gaussian_clip(in_features, activation_bits, levels) if config.is_clipped else 1.0
    return InputTransform(plain, None, scale, clip, levels)


def gaussian_clip(in_features: int, bits: int, levels: str = "uniform") -> float:
    """The clip ratio for tokens of independent Gaussian channels: the best range over the median of max |x_j|."""
    if (bits, levels) not in GAUSSIAN_RANGE:
        return 1.0
    largest = NormalDist().inv_cdf((1 + 0.5 ** (1 / in_features)) / 2)
    return min(1.0, round(GAUSSIAN_RANGE[bits, levels] / largest, 2))


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
    levels = _fit_levels(name, folded, weight_bits, config)
    if is_trellis := config.has_trellis and weight_bits in trellis.BITS:
        levels = trellis.expand(levels, folded)
    new_bias = None if bias is None else bias.detach().cpu().float()
    if transform.input_offset is not None:
        shift = (weight.numpy().astype(np.float64) * transform.input_offset.double().numpy()).sum(axis=1)
        shift = torch.from_numpy(shift)
        new_bias = (shift if new_bias is None else new_bias.double() + shift).float()
    r = transform.rotation
    layout = LinearFormat(
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        codebook=levels.kind,
        table_rows=0 if weight_bits == 8 else len(levels.table),
        is_trellis=is_trellis,
        rotation=r.kind,
        factors=r.factors,
        clip=transform.clip,
        token_levels=transform.levels,
        has_bias=new_bias is not None,
        has_original_bias=bias is not None,
        has_offset=transform.input_offset is not None,
        has_scale=transform.input_scale is not None,
        principal_rank=0 if transform.principal is None else len(transform.principal.codes),
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
