"""Rounding that compensates its own error: GPTQ on the levels of any codebook.

Let S = E[x~^T x~] be the second moment of a layer's transformed input. Its quantized tokens are x~q = c x~ + e: c is
the gain of rounding and clipping, and e is noise of variance s^2 in every channel. Both are measured. For rounded
weights V in the place of W~, the expected squared error of the output, relative to the exact output and up to a
constant, is

    tr (V - W~) H (V - W~)^T,        H = c^2 S + s^2 I + lambda mean(diag S) I.

So coarse activations damp the Hessian without a setting. GPTQ (arXiv 2210.17323) rounds W~ column by column, in
descending order of diag(H), and spreads each column's error over the columns that are still to come. Then the scale of
each row is set so that <w, v> = <w, w> in the metric H, with w the exact row and v the rounded one. Rounding to
centroids shrinks every row a little; without this step the losses of all layers and steps add up in a picture.

S is a sum over all calibration tokens. Half of it is replaced by the moment that weighs tokens by their effect on the
model's output (:mod:`lrqdit.calibration.moments`), scaled to the same trace. For each layer, the tokens of held-out
prompts decide between this and rounding to the nearest level.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lrqdit.calibration.statistics import ActivationStats
from lrqdit.errors import NumericalError
from lrqdit.numerics.codebook import Codebook
from lrqdit.numerics.rotation import single_thread
from lrqdit.numerics.tokens import InputTransform, dequantize_tokens, quantize_tokens

COLUMNS_PER_BLOCK = 128
MAX_FACTORED = 5120
OUTPUT_SHARE = 0.5  # of the moment that weighs tokens by what they do to the output: it is the better one, but noisy


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What the rounding of every layer of a group needs to know about their common input.

    Args:
        hessian: H, float64 (in_features, in_features), its mean diagonal 1.
        upper: the upper Cholesky factor of H^-1 with columns in ``order``, float32.
        order: int64 (in_features,), columns by descending diag(H).
        exact, seen: held-out tokens after the transform, float32 (count, in_features), before and after rounding.
    """

    hessian: Tensor
    upper: Tensor
    order: Tensor
    exact: Tensor
    seen: Tensor


def measure_curvature(
    transform: InputTransform, stats: ActivationStats, activation_bits: int, damping: float
) -> Curvature | None:
    """The curvature of layers behind a transform; None if ``stats`` has no second moment, or nothing varies.

    Args:
        transform: of the layers' input, its clip included.
        stats: of the raw input.
        activation_bits: 16 leaves the transformed tokens as they are.
        damping: lambda, relative to the mean variance of a transformed channel.
    """
    assert stats.tokens is not None
    offset = transform.input_offset
    if offset is None:
        offset = torch.zeros(transform.in_features, dtype=torch.float16)
    moment = stats.second_moment(offset)
    if moment is None:
        return None
    weighted = stats.output_moment(offset)
    if weighted is not None and float(weighted.trace()) > 0:
        moment.lerp_(weighted * (moment.trace() / weighted.trace()), OUTPUT_SHARE)
    exact = transform.apply(stats.tokens)
    seen = exact
    if activation_bits < 16:
        seen = dequantize_tokens(*quantize_tokens(exact, activation_bits, transform.clip, transform.levels))
    with single_thread():
        hessian = transform_moment(moment.float(), transform)
        energy, product = float(exact.double().square().sum()), float((exact.double() * seen.double()).sum())
        gain = product / energy if energy > 0 else 1.0
        noise = float((seen.double() - gain * exact.double()).square().mean())
        variance = float(hessian.diagonal().mean())
        if not variance > 0:
            return None
        hessian.mul_(gain**2).diagonal().add_(noise + damping * variance)
        hessian /= hessian.diagonal().mean()
        order, upper = factorize(hessian)
    return Curvature(hessian, upper, order, exact, seen)


def factorize(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Columns by descending diag(H), int64, and the upper Cholesky factor of H^-1 in that order, float32.

    Wide layers are cut into even parts of up to MAX_FACTORED columns, H taken as block-diagonal: the work grows with
    the cube of the width, and errors are made up for inside a part only.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    width = len(hessian)
    parts = order.tensor_split(-(-width // MAX_FACTORED))
    upper, start = torch.zeros(width, width, dtype=torch.float32), 0
    for columns in parts:
        stop = start + len(columns)
        upper[start:stop, start:stop] = _invert(hessian[columns][:, columns])
        start = stop
    return order, upper


def _invert(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of H^-1, float32. H is damped until there is one: sums in float32 over tokens that are
    very long in one direction leave small negative eigenvalues in the others."""
    for damping in (0.0, *(10.0**power for power in range(-6, 7))):
        damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
    raise NumericalError("the second moment of a layer's input is not finite; run the model in float32 or bfloat16")


def transform_moment(moment: Tensor, transform: InputTransform) -> Tensor:
    """E[x~^T x~] of E[(x - mu)^T (x - mu)], float64 and symmetric: (D M D) rotated on both sides."""
    directions = None if transform.principal is None else transform.principal.values
    for _ in range(2):
        if transform.input_scale is not None:
            moment = moment * transform.input_scale.float()
        if directions is not None:
            moment = moment - (moment @ directions.T) @ directions
        moment = transform.rotation.apply(moment).T
    return moment.double().add_(moment.T.double()).div_(2)


def round_weight(weight: Tensor, levels: Codebook, curvature: Curvature) -> tuple[Codebook, Tensor, dict[str, float]]:
    """Round a folded weight, plainly and with compensation, and keep what does better on held-out tokens.

    Args:
        weight: W~, float32 (out_features, in_features), already folded.
        levels: fitted to it.
        curvature: of its input.

    Returns:
        The levels, perhaps with other row scales; codes uint8 (out_features, in_features); and by way of rounding
        (``nearest``, ``gptq``) the squared output error on held-out tokens relative to plain rounding's.
    """
    results = {"nearest": (levels, levels.encode(weight))}
    with single_thread():
        codes = compensate(weight, levels, curvature)
        results["gptq"] = (_rescale(weight, levels, codes, curvature.hessian), codes)
        target = F.linear(curvature.exact, weight)
        squared = {
            kind: float((F.linear(curvature.seen, book.decode(c)) - target).double().square().sum())
            for kind, (book, c) in results.items()
        }
    best = min(squared, key=lambda kind: squared[kind])
    plain = squared["nearest"] or 1.0
    return *results[best], {kind: error / plain for kind, error in squared.items()}


def gptq(weight: Tensor, order: Tensor, upper: Tensor, round_column: Callable[[Tensor, int], Tensor]) -> None:
    """GPTQ (arXiv 2210.17323): columns are rounded one by one, each one's error made up for by those still to come.

    Args:
        weight: float32 (out_features, in_features); it is only read.
        order: columns in the order in which they are rounded; upper: see :func:`factorize`.
        round_column: from what a column shall be, (out_features, 1), and its index, to what it is rounded to. It keeps
            what it needs.
    """
    left, width = weight[:, order], weight.shape[1]
    for start in range(0, width, COLUMNS_PER_BLOCK):  # the error update of later columns in blocks
        stop = min(start + COLUMNS_PER_BLOCK, width)
        errors = torch.empty(len(weight), stop - start, dtype=torch.float32)
        for place in range(start, stop):
            current = left[:, place : place + 1]
            error = (current - round_column(current, int(order[place]))) / upper[place, place]
            left[:, place + 1 : stop] -= error * upper[place, place + 1 : stop]
            errors[:, place - start] = error[:, 0]
        left[:, stop:] -= errors @ upper[start:stop, stop:]


def compensate(weight: Tensor, levels: Codebook, curvature: Curvature) -> Tensor:
    """Codes uint8 of a weight (out_features, in_features), rounded by :func:`gptq`."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)

    def round_column(values: Tensor, column: int) -> Tensor:
        code = levels.encode(values)
        codes[:, column] = code[:, 0]
        return levels.decode(code)

    gptq(weight, curvature.order, curvature.upper, round_column)
    return codes


def _rescale(weight: Tensor, levels: Codebook, codes: Tensor, hessian: Tensor) -> Codebook:
    """Levels with row scales s such that the rounded row v has <w, v> = <w, w> in the metric H."""
    image = weight.double() @ hessian
    length = (image * weight.double()).sum(dim=1)
    reached = (image * levels.decode(codes).double()).sum(dim=1)
    ratio = torch.where((reached > 0) & (length > 0), length / torch.where(reached > 0, reached, 1), 1)
    return dataclasses.replace(levels, row_scale=(levels.row_scale.double() * ratio).float())
