"""The input transform of layers that read one tensor: every candidate is built and measured, the best one kept.

A candidate is smoothed or not, has one of the rotations, and for 4-bit tokens passes a principal part beside the codes
or not. Its weights are folded and quantized, and the output error on tokens of the reservoir decides:

    error = || Q(x~) Q(W~)^T - (x - mean) W^T ||^2 / || (x - mean) W^T ||^2

It is relative to the part of the output that varies between tokens, so that a constant offset neither hides nor
inflates it. The clip of a candidate is the ratio with the smallest error. On large layers a sample of rows decides.
"""

import dataclasses
import math
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrqdit.calibration.statistics import ActivationStats
from lrqdit.config import QuantizationConfig
from lrqdit.errors import NumericalError, RotationError
from lrqdit.fitting.reports import GroupReport
from lrqdit.kernels import ops
from lrqdit.numerics import codebook, principal, rotation
from lrqdit.numerics.tokens import CLIP_RATIOS, InputTransform, dequantize_tokens, quantize_tokens, smoothing_vector

OUTLIER_GAIN = 0.10
PRINCIPAL_GAIN = 0.25
PRINCIPAL_SHARE = 0.2  # of the codes' bits, at most, for the directions that pass beside them
UNROTATED_GAIN = 2.0
SALIENT_RATIO = 4.0
ROWS_FOR_CHOICE = 384
FLOAT16_MAX = 65504.0
# By activation bits: clip * absmax with the smallest error on Gaussian tokens, in standard deviations (measured)
GAUSSIAN_RANGE = {(4, "uniform"): 2.25, (4, "normal"): 2.75, (6, "uniform"): 3.1}


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
                built, signs = rotation.build(len(mean), kind, seed, channel_absmax=absmax * scale)
            except RotationError:
                if is_measured:
                    continue  # a width that this kind cannot rotate is not a candidate
                raise
            signed = scale if signs is None else scale * signs
            stored = None if not is_smoothed and signs is None else signed.to(torch.float16)
            transform = InputTransform(built, offset, stored)
            penalty = penalties.get(kind, 1.0) if is_measured else 1.0
            for candidate in (transform, _with_principal(transform, moment, rank, seed)):
                if candidate is None:
                    continue
                folded, whole = ops.fold(candidate, rows), target
                if candidate.principal is not None:
                    p = candidate.smooth(x) @ candidate.principal.values.T
                    whole = target - p @ principal.outlet(candidate.unsmooth(rows), candidate.principal)
                levels = fit_levels(name, folded, weight_bits, config)
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
    moment = moment.float()
    if transform.input_scale is not None:
        scale = transform.input_scale.float()
        moment = moment * scale * scale[:, None]
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


def token_levels(config: QuantizationConfig, bits: int) -> tuple[Literal["uniform", "normal"], ...]:
    """The kinds of levels that tokens of so many bits may take."""
    if bits != 4 or config.token_levels == "uniform":
        return ("uniform",)
    return ("normal",) if config.token_levels == "normal" else ("normal", "uniform")


def fit_levels(name: str, weight: Tensor, bits: int, config: QuantizationConfig) -> codebook.Codebook:
    try:
        return codebook.fit(weight, bits, config.codebook, scope=config.table_scope)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from error


def data_free_transform(in_features: int, config: QuantizationConfig, activation_bits: int) -> InputTransform:
    """Without calibration: a randomized Hadamard rotation and the clip that is best for Gaussian tokens."""
    kind = "hadamard" if config.rotation in ("auto", "threshold", "outlier") else config.rotation
    built, signs = rotation.build(in_features, kind, config.seed * 1_000_003 + in_features)
    scale = None if signs is None else signs.to(torch.float16)
    levels = token_levels(config, activation_bits)[0]
    clip = gaussian_clip(in_features, activation_bits, levels) if config.is_clipped else 1.0
    return InputTransform(built, None, scale, clip, levels)


def gaussian_clip(in_features: int, bits: int, levels: str = "uniform") -> float:
    """The clip ratio for tokens of independent Gaussian channels: the best range over the median of max |x_j|."""
    if (bits, levels) not in GAUSSIAN_RANGE:
        return 1.0
    largest = NormalDist().inv_cdf((1 + 0.5 ** (1 / in_features)) / 2)
    return min(1.0, round(GAUSSIAN_RANGE[bits, levels] / largest, 2))
