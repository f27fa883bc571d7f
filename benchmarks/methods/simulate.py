"""Layers of the recipes in :mod:`benchmarks.methods.recipes`, simulated: what they compute, and the bits it would take.

y = T(x) Q^T + (x m) L^T + b with T the smoothing m, the rotation and the rounding of the tokens, Q the rounded weight
and L the low-rank part. Nothing is packed; :class:`SimulatedReport` counts what would be.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.recipes import Recipe
from lrqdit.calibration.statistics import ActivationStats, InputGroup
from lrqdit.fitting.compensate import factorize, gptq, transform_moment
from lrqdit.kernels import ops
from lrqdit.numerics import rotation
from lrqdit.numerics.codebook import fit
from lrqdit.numerics.rotation import single_thread
from lrqdit.numerics.tokens import InputTransform

DAMPING = 0.01
TOKEN_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)
WEIGHT_CLIPS = tuple(1 - i / 20 for i in range(11))
ALPHAS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8)
ROWS_FOR_CHOICE = 256


@dataclass(frozen=True)
class SimulatedReport:
    """Bits a simulated model would store: of ``parameters`` original ones, everything counted."""

    parameters: int
    bits: int

    @property
    def true_bits(self) -> float:
        return self.bits / self.parameters


class SimulatedLinear(nn.Module):
    """A linear layer of a recipe; ``weight`` is the rounded one, in the transformed basis."""

    def __init__(self, transform: "Transform", weight: Tensor, low_rank: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.transform, self.low_rank, self.bias = transform, low_rank, bias
        self.weight = weight
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.transform.apply(x.reshape(-1, x.shape[-1]))
        y = F.linear(self.transform.quantize(tokens), self.weight, self.bias)
        if self.low_rank is not None:
            y = y + F.linear(tokens, self.low_rank)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


@dataclass(frozen=True)
class Transform:
    """Smoothing, permutation, rotation and rounding of the tokens."""

    base: InputTransform
    permutation: Tensor | None
    recipe: Recipe
    bits: int
    clip: float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        return self.base.apply(x if self.permutation is None else x[..., self.permutation])

    def fold(self, weight: Tensor) -> Tensor:
        return ops.fold(self.base, weight if self.permutation is None else weight[:, self.permutation])

    def fold_moment(self, moment: Tensor) -> Tensor:
        if self.permutation is not None:
            moment = moment[self.permutation][:, self.permutation]
        return transform_moment(moment, self.base)

    def quantize(self, x: Tensor) -> Tensor:
        """Transformed tokens (count, channels), rounded and back in float."""
        if self.bits == 16:
            return x
        group = group_size(x.shape[-1], self.recipe.token_group)
        grouped = x.unflatten(-1, (-1, group))
        if self.recipe.tokens == "gaussian":
            scale = grouped.square().mean(dim=-1, keepdim=True).sqrt()
            return (gaussian_rounding(self.bits)(grouped / scale.clamp_min(1e-30)) * scale).flatten(-2)
        if self.recipe.tokens == "affine":
            low = grouped.amin(dim=-1, keepdim=True).clamp_max(0) * self.clip
            high = grouped.amax(dim=-1, keepdim=True).clamp_min(0) * self.clip
            step = ((high - low) / (2**self.bits - 1)).clamp_min(1e-30)
            zero = (-low / step).round()
            return (((grouped / step).round() + zero).clamp(0, 2**self.bits - 1) - zero).mul(step).flatten(-2)
        largest = 2 ** (self.bits - 1) - 1
        step = (grouped.abs().amax(dim=-1, keepdim=True) * (self.clip / largest)).clamp_min(1e-30)
        return (grouped / step).round().clamp(-largest - 1, largest).mul(step).flatten(-2)


def group_size(width: int, largest: int) -> int:
    """The largest divisor of width up to ``largest``; width itself for 0."""
    return next(size for size in range(min(largest or width, width), 0, -1) if width % size == 0)


def gaussian_levels(bits: int) -> Tensor:
    """Lloyd-Max levels of a standard normal law, float32 (2**bits,), by Lloyd's iteration on the law itself."""
    normal = NormalDist()
    levels = [normal.inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)]
    for _ in range(20 * 2**bits):
        edges = [-math.inf, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), math.inf]
        density = [0.0 if math.isinf(e) else normal.pdf(e) for e in edges]
        mass = [normal.cdf(e) if abs(e) < math.inf else float(e > 0) for e in edges]
        levels = [(density[i] - density[i + 1]) / (mass[i + 1] - mass[i]) for i in range(len(levels))]
    return torch.tensor(levels, dtype=torch.float32)


class NearestLevel:
    """Rounds to the nearest of three or more ascending levels, as ``torch.bucketize`` of the edges would.

    A fine even grid has at most one edge in each cell and a margin around it, so that one comparison decides.
    """

    def __init__(self, levels: Tensor) -> None:
        edges = (levels[1:] + levels[:-1]) / 2
        self.width = float(edges.diff().min()) / 2
        self.start = float(edges[0]) - self.width
        self.cells = int((float(edges[-1]) - self.start) / self.width) + 2
        starts = self.start + (torch.arange(self.cells).double() - 0.25) * self.width
        below = torch.bucketize(starts, edges.double())
        self.edge = torch.cat([edges, torch.tensor([math.inf])])[below]
        self.low, self.high = levels[below], levels[(below + 1).clamp_max(len(edges))]

    def __call__(self, values: Tensor) -> Tensor:
        cell = ((values - self.start) / self.width).clamp_(0, self.cells - 1).int()
        return torch.where(values > self.edge[cell], self.high[cell], self.low[cell])


@cache
def gaussian_rounding(bits: int) -> NearestLevel:
    """To the nearest Lloyd-Max level of a standard normal law; kept, because Lloyd's iteration takes its time."""
    return NearestLevel(gaussian_levels(bits))


class Grid:
    """Where the weights of a layer may lie, and the bits their description takes."""

    def __init__(self, weight: Tensor, recipe: Recipe, bits: int) -> None:
        """weight: (out, in), transformed, the low-rank part taken off."""
        self.recipe, self.bits = recipe, bits
        self.rows, self.columns = weight.shape
        self.group = group_size(self.columns, recipe.group)
        scales = self.rows * (self.columns // self.group)
        self.side_bits = 16 * scales
        if recipe.levels == "affine":
            self.side_bits += bits * scales
            low, high = self._range(weight)
            self.step = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
            self.zero = (-low / self.step).round()
        elif recipe.levels == "symmetric":
            low, high = self._range(weight)
            self.step = (torch.maximum(high, -low) / (2 ** (bits - 1) - 1)).clamp_min(1e-30)
            self.zero = torch.zeros_like(self.step)
        elif recipe.levels == "gaussian":
            self.step = weight.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
            self.side_bits += 16 * 2**bits
        else:
            raise ValueError(recipe.levels)

    def round(self, values: Tensor, columns: Tensor) -> Tensor:
        """The nearest grid point of values (out, len(columns)), which stand in these columns."""
        if self.recipe.levels == "gaussian":
            return gaussian_rounding(self.bits)(values / self.step) * self.step
        step, zero = (t[:, columns // self.group] for t in (self.step, self.zero))
        low, high = (0, 2**self.bits - 1) if self.recipe.levels == "affine" else _signed(self.bits)
        return (((values / step).round() + zero).clamp(low, high) - zero) * step

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest weight of each group, (out, groups), clipped for the smallest squared error if wanted."""
        grouped = weight.unflatten(1, (-1, self.group))
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        if not self.recipe.is_weight_clipped:
            return low, high
        best, smallest = torch.ones_like(low), torch.full_like(low, math.inf)
        for clip in WEIGHT_CLIPS:
            if self.recipe.levels == "affine":
                step = ((high - low) * (clip / (2**self.bits - 1))).clamp_min(1e-30)
                zero, limits = (-low * clip / step).round(), (0, 2**self.bits - 1)
            else:
                step = (torch.maximum(high, -low) * (clip / (2 ** (self.bits - 1) - 1))).clamp_min(1e-30)
                zero, limits = torch.zeros_like(step), _signed(self.bits)
            rounded = ((grouped / step[..., None]).round() + zero[..., None]).clamp(*limits) - zero[..., None]
            error = (rounded * step[..., None] - grouped).square().sum(-1)
            best, smallest = torch.where(error < smallest, clip, best), torch.minimum(error, smallest)
        return low * best, high * best


def _signed(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def damp_moment(moment: Tensor, damping: float) -> Tensor:
    """moment + damping * mean(diag) * I, float64, its mean diagonal 1; that of a constant input is I."""
    moment = moment.double()
    variance = float(moment.diagonal().mean())
    if not variance > 0:
        return torch.eye(len(moment), dtype=torch.float64)
    moment = moment / variance
    moment.diagonal().add_(damping)
    return moment / (1 + damping)


def compensated(weight: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """GPTQ (arXiv 2210.17323) on a grid: the rounded weight, columns in descending order of diag(H)."""
    rounded = torch.empty_like(weight)

    def round_column(values: Tensor, column: int) -> Tensor:
        rounded[:, column : column + 1] = grid.round(values, torch.tensor([column]))
        return rounded[:, column : column + 1]

    gptq(weight, *factorize(hessian), round_column)
    return rounded


def simulate(
    module: nn.Module, recipe: Recipe, groups: list[InputGroup], weight_bits: int, activation_bits: int, seed: int = 0
) -> SimulatedReport:
    """Replace the layers of the groups by simulated ones of a recipe, in place.

    Args:
        module: the model; the layers are read from it.
        groups: what was observed of it.
        seed: of the rotations.

    Returns:
        What would be stored, everything else in the module at 16 bits.
    """
    parameters = sum(p.numel() for p in module.parameters())
    bits = 16 * parameters
    with torch.no_grad(), single_thread():
        for group in groups:
            layers = {name: module.get_submodule(name) for name in group.names}
            weights = {name: layer.weight.detach().float() for name, layer in layers.items()}
            transform, shared_bits = fit_transform(weights, group.stats, recipe, activation_bits, seed, weight_bits)
            bits += shared_bits
            hessian = None
            moment = group.stats.second_moment(torch.zeros(transform.base.in_features))
            if recipe.is_compensated and moment is not None:
                hessian = damp_moment(transform.fold_moment(moment.float()), DAMPING)
            for name, layer in layers.items():
                folded = transform.fold(weights[name])
                rounded, low_rank, side_bits = round_layer(folded, recipe, weight_bits, hessian)
                bits += weights[name].numel() * (weight_bits - 16) + side_bits
                bias = None if layer.bias is None else layer.bias.detach().float()
                module.set_submodule(name, SimulatedLinear(transform, rounded, low_rank, bias))
    return SimulatedReport(parameters, int(bits))


def round_layer(weight: Tensor, recipe: Recipe, bits: int, hessian: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """The rounded weight, the low-rank part or None, and the bits of their scales, tables and factors."""
    low_rank, side_bits = None, 0
    if recipe.rank:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        low_rank = (u[:, : recipe.rank] * s[: recipe.rank]) @ v[: recipe.rank]
        side_bits = 16 * min(recipe.rank, len(s)) * sum(weight.shape)
        weight = weight - low_rank
    if recipe.levels == "released_log":
        return round_released(weight, bits), low_rank, side_bits + weight.shape[0] * 4 * 16
    if recipe.levels == "twin_log":
        return fit(weight, bits).quantize(weight), low_rank, side_bits + 16 * len(weight) + 8 * 2**bits
    grid = Grid(weight, recipe, bits)
    rounded = grid.round(weight, torch.arange(weight.shape[1])) if hessian is None else compensated(
        weight, grid, hessian
    )  # fmt: skip
    return rounded, low_rank, side_bits + grid.side_bits


def round_released(weight: Tensor, bits: int) -> Tensor:
    """What the released LRQ-DiT code makes of a weight (out, in), its defects included (see :mod:`lrqdit.codebook`).

    Both halves see the other sign's weights as logarithm 0; quantiles of that clip the range; the negative half has
    2**(bits - 1) + 1 codes; one eta from a fixed list, and one pair of quantiles, for the whole layer.
    """
    best, smallest = weight, math.inf
    halves = 2 ** (bits - 1)
    for eta in (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
        log = (weight.abs() + eta).log2()
        found = []
        for sign, largest in ((1, halves - 1), (-1, halves)):
            is_own = weight * sign > 0
            own = torch.where(is_own, log, 0.0)
            low, candidates = own.amin(dim=1, keepdim=True), []
            for quantile in (0.98, 0.99, 0.999, 0.9999, 0.99999):
                high = own.quantile(quantile, dim=1, keepdim=True, interpolation="nearest")
                step = ((high - low) / halves).clamp_min(1e-12)
                zero = (low / step).round()
                code = ((own / step).round() - zero).clamp(0, largest)
                value = torch.where(is_own, sign * (torch.exp2((code + zero) * step) - eta), 0.0)
                # the halves do not overlap, so each one's best quantile is the pair's
                candidates.append((float((value - torch.where(is_own, weight, 0.0)).square().sum()), value))
            found.append(min(candidates, key=lambda candidate: candidate[0]))
        if sum(error for error, _ in found) < smallest:
            smallest, best = sum(error for error, _ in found), found[0][1] + found[1][1]
    return best


def fit_transform(
    weights: dict[str, Tensor], stats: ActivationStats, recipe: Recipe, bits: int, seed: int, weight_bits: int
) -> tuple[Transform, int]:
    """The transform of layers that share an input, and the bits it takes."""
    assert stats.tokens is not None
    tokens, width = stats.tokens.float(), len(stats.channel_mean)
    rows = torch.cat([w[:: max(1, math.ceil(len(w) * len(weights) / ROWS_FOR_CHOICE))] for w in weights.values()])
    alphas = ALPHAS if recipe.smoothing == "search" else (recipe.alpha,)
    absmax, weight_absmax = stats.channel_absmax(), torch.stack([w.abs().amax(0) for w in weights.values()]).amax(0)
    best: tuple[float, Transform] | None = None
    for alpha in alphas:
        smoothing = _smoothing(recipe, absmax, weight_absmax, alpha)
        transform = _build_transform(width, recipe, smoothing, absmax, bits, seed)
        folded, exact = transform.fold(rows), transform.apply(tokens)
        target = F.linear(exact, folded)
        rounded, low_rank, _ = round_layer(folded, replace(recipe, rank=min(recipe.rank, len(rows) // 4)), weight_bits,
                                           None) if len(alphas) > 1 else (folded, None, 0)  # fmt: skip
        clips = TOKEN_CLIPS if recipe.token_clip == 0 and bits < 16 else (recipe.token_clip or 1.0,)
        for clip in clips:
            clipped = replace(transform, clip=clip)
            y = F.linear(clipped.quantize(exact), rounded)
            error = float(((y if low_rank is None else y + F.linear(exact, low_rank)) - target).double().square().sum())
            if best is None or error < best[0]:
                best = error, clipped
    assert best is not None
    side_bits = {"none": 0, "hadamard": width, "permuted_block": 17 * width}.get(recipe.rotation, 16 * width)
    if recipe.rotation == "outlier":
        side_bits += 2 * 16 * best[1].base.rotation.factors[0] ** 2
    return best[1], side_bits + (16 * width if recipe.smoothing != "none" else 0)


def _smoothing(recipe: Recipe, absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """The vector that multiplies the input: 1 / s of SmoothQuant's s = a^alpha / w^(1 - alpha)."""
    if recipe.smoothing == "none" or alpha == 0:
        return torch.ones_like(absmax)
    a, w = absmax.clamp_min(1e-5), weight_absmax.clamp_min(1e-5)
    # PTQ4DiT's salience balancing makes both sqrt(a w), which is SmoothQuant's at one half
    exponent = 0.5 if recipe.smoothing == "balance" else alpha
    log = (1 - exponent) * w.log() - exponent * a.log()
    return (log - log.mean()).exp().clamp(1e-3, 1e3)


def _build_transform(width: int, recipe: Recipe, smoothing: Tensor, absmax: Tensor, bits: int, seed: int) -> Transform:
    kind = "block_hadamard" if recipe.rotation == "permuted_block" else recipe.rotation
    permutation = None
    if recipe.rotation == "permuted_block":
        permutation = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        smoothing = smoothing[permutation]
    built, signs = rotation.build(width, kind, seed * 1_000_003 + width, channel_absmax=absmax * smoothing)
    scale = smoothing if signs is None else smoothing * signs
    return Transform(InputTransform(built, None, scale.to(torch.float16)), permutation, recipe, bits)
