"""Codebooks: the 2**bits levels a weight may take, fitted to a layer, and the codes that point at them.

A codebook is a table of int8 levels t, one for the layer or one per row, and one float32 scale s per row:

    ŵ[i, j] = s[i] · t[i or 0, code[i, j]]

The search, the measured errors, the checkpoint and the kernels all use this int8 table; there is no finer one.

**Twin-Log levels** (LRQ-DiT, arXiv 2508.03485). The positive and the negative weights, the twin halves, each have a
geometric ladder of levels, shifted by η. A half has n = 2**(bits - 1) levels, q = 0 ... n - 1:

    level[q] = 2^(σ (q + z)) - η = (lo + η) · ((hi + η) / (lo + η))^(q / (n - 1)) - η,

The paper's scale σ and zero point z say the same as a lowest level lo and a highest level hi (the clip), which are used
here. The levels are evenly spaced in log(|w| + η). That is μ-law companding with μ = 1/η, for |w| up to 1, except that
the lowest level is free. A small η gives powers of a base, a large η a uniform grid.

**The histogram.** A row is divided by its root mean square r, and the values u = w / r are counted in 2·BINS bins. The
bins are equally wide in u / (1 + |u|), so they are fine near zero and cover all numbers. With d[j] the importance of
column j (1, or the diagonal of a Hessian), a bin stores its mass Σ d and its moment Σ d·u. One table for the whole
layer is fitted to the sum of the rows' histograms, each times r², so that a row counts by its energy.

**The error of ascending levels l** can be read from a histogram. Let A(θ) be the mass and M(θ) the moment below a
threshold θ, and C(θ) = θ·A(θ) - M(θ). Up to the constant Σ d·u² the error is

    E(l) = l[n-1]² A(∞) - 2 l[n-1] M(∞) - 2 Σ_k (l[k+1] - l[k]) · C((l[k] + l[k+1]) / 2).

**The search** minimizes E over (lo, hi, η) of each half. It evaluates a coarse grid, then ZOOMS times the best point
and its 26 neighbours, with steps that shrink by the factor ZOOM. The levels are scaled so that the largest becomes 127,
and rounded; levels that would coincide are moved apart. Then each row's scale is searched for this table, with E on the
row's own histogram: coarsely, and twice more finely. Last, the row is encoded exactly and the least-squares scale of
these codes, s = Σ d·w·t / Σ d·t², is taken where it is better.

**Errors of the paper's released code that are avoided here.** (1) It gives a weight of the other sign the value 0 in
log space, which is magnitude 1, and that decides the range of both halves. Here a half sees its own weights only. (2)
Its negative half clamps to 2**(bits - 1), one code too many: nine levels at "3 bits". Here there are exactly 2**bits.
(3) Its η is an absolute number from one grid for all layers. Here lo, hi and η are relative to the row, so weights that
are twice as large get scales that are twice as large and the same codes. Other deviations from the paper: zeros count
in the positive half; a half without weights takes the other half's levels; levels are int8 instead of an integer shift
and a fixed-point residue.

**The same bits everywhere.** The numpy code here is the reference. The native library (csrc/fit.h) counts, searches
scales and encodes by the same operations in the same order, so the result is the same with or without it, on every
instruction set and for any number of threads. For this reason sums have a fixed order (over a row in LANES lanes, over
rows in blocks and parts), and exp and log are computed by numpy alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrqdit import native
from lrqdit.config import WEIGHT_BITS
from lrqdit.errors import ConfigError, NumericalError

Floats = NDArray[np.float64]
Integers = NDArray[np.int8]

SCOPES = ("layer", "row")
BINS = 1024  # of each half of the histogram
BLOCK_ROWS, BLOCK_ELEMENTS = 128, 1 << 18
PARTS = 64  # at most, of a layer's histogram
LANES = 16  # of a sum over a row
ZOOMS, ZOOM = 8, 0.6
# Scales are searched on the grid base · 2^(i / FINENESS), in coarse steps, then in MIDDLE times smaller ones, twice.
FINENESS, COARSE, MIDDLE = 150, 25, 5
MARGIN = COARSE + MIDDLE
POLISHES = 1
LLOYD_STEPS = 64
# Twice the midpoint of two int8 levels is an integer, so floor(2 w / scale), kept to -256 ... 255, decides the code.
SLOTS = 512


@dataclass(frozen=True, eq=False)
class Codebook:
    """The levels of a quantized weight (out, in): ŵ[i, j] = row_scale[i] · table[i or 0, code[i, j]]."""

    kind: str  # one of CODEBOOKS; always "uniform" at 8 bits
    bits: int  # 2 to 6, or 8
    table: Tensor  # int8 (T, 2**bits), ascending, T = 1 (one table for the layer) or T = out
    row_scale: Tensor  # float32 (out,)

    def levels(self) -> Tensor:
        """Return the values each row can take, float32 (out, 2**bits)."""
        return self.row_scale[:, None] * self.table.float()

    def encode(self, weight: Tensor) -> Tensor:
        """Return the code of the level nearest to each weight, the upper one of two equally near.

        weight is (out, columns), finite, of any float dtype and any number of columns; the codes are uint8. Nearest is
        decided on w / row_scale rounded to float32. A row of scale 0 decodes to 0 whatever its codes are.
        """
        self.check_rows("encode", weight)
        if weight.device.type == "cpu" and weight.numel() and native.is_available():
            return self._encode_natively(weight.detach().float().contiguous())
        slots = weight.detach().float() / self.row_scale.masked_fill(self.row_scale == 0, 1)[:, None]
        slots = slots.mul_(2).floor_().clamp_(-SLOTS // 2, SLOTS // 2 - 1).add_(SLOTS // 2)
        return _look_up(self._code_of_slot, slots.to(torch.int32))

    def decode(self, codes: Tensor) -> Tensor:
        """Return row_scale · table[codes], float32 (out, columns), for uint8 codes (out, columns)."""
        self.check_rows("decode", codes)
        return _look_up(self.table, codes.to(torch.int32)).float().mul_(self.row_scale[:, None])

    def quantize(self, weight: Tensor) -> Tensor:
        """Return decode(encode(weight)): the weight as it is deployed, float32 (out, columns)."""
        return self.decode(self.encode(weight))

    def _encode_natively(self, weight: Tensor) -> Tensor:
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        matrix = native.Matrix(weight.data_ptr(), *weight.shape, None)
        table, row_scale = self.table.contiguous(), self.row_scale.contiguous()
        threads = torch.get_num_threads()
        native.call("lrq_encode", matrix, table, len(table), self.bits, row_scale, threads, codes)
        return codes

    @cached_property
    def _code_of_slot(self) -> Tensor:
        """The code for every value of floor(2 w / row_scale), uint8 (T, SLOTS): it counts the midpoints not above."""
        table = self.table.to(torch.int32)
        slots = torch.arange(-SLOTS // 2, SLOTS // 2, dtype=torch.int32, device=table.device)
        codes = torch.searchsorted(table[:, 1:] + table[:, :-1], slots.repeat(len(table), 1), right=True)
        return codes.clamp_(min=1 if self.bits == 8 else 0).to(torch.uint8)  # -128 is never used

    def check_rows(self, operation: str, matrix: Tensor) -> None:
        rows, shape = len(self.row_scale), tuple(matrix.shape)
        if len(shape) != 2 or shape[0] != rows:
            raise ConfigError(
                f"Codebook.{operation}: shape {shape} is not ({rows}, columns); fit a codebook to this weight"
            )


@dataclass(frozen=True)
class Histogram:
    """Weights divided by their row's root mean square, counted in G groups: rows, or the layer as a whole."""

    bins: Floats  # (2, G, 2 · BINS): mass Σ d and moment Σ d·u of each bin, the negative half first
    lowest: Floats  # (G,), the smallest u, at most 0
    highest: Floats  # (G,), the largest u, at least 0


def fit_twin_log(histogram: Histogram, bits: int) -> tuple[Integers, None]:
    """Twin-Log levels, see the module's docstring."""
    return round_levels(_search_ladders(histogram, 2 ** (bits - 1))), None


def fit_uniform(histogram: Histogram, bits: int) -> tuple[Integers, None]:
    """Levels ±1, ±3, ±5, ... (mid-rise); the scale, searched like any other, is half a step and sets the clip."""
    return np.tile(np.arange(1 - 2**bits, 2**bits, 2).astype(np.int8), (len(histogram.lowest), 1)), None


def fit_minmax(histogram: Histogram, bits: int) -> tuple[Integers, Floats]:
    """Round to nearest from the row's smallest to its largest weight: code - zero_point, an integer, times a step."""
    step = (histogram.highest - histogram.lowest) / (2**bits - 1)
    zero_point = np.rint(-histogram.lowest / np.where(step > 0, step, 1))
    return (np.arange(2**bits) - zero_point[:, None]).astype(np.int8), step


def fit_lloyd_max(histogram: Histogram, bits: int) -> tuple[Integers, None]:
    """Lloyd-Max levels (Lloyd 1982, Max 1960): Twin-Log levels moved LLOYD_STEPS times to the mean of their cell."""
    levels, below = _search_ladders(histogram, 2 ** (bits - 1)), _accumulate(histogram.bins)
    ends = np.zeros((len(levels), 1), np.int64)
    for _ in range(LLOYD_STEPS):
        inner = _find_edge((levels[:, 1:] + levels[:, :-1]) / 2) + BINS
        edges = np.concatenate([ends, inner, ends + 2 * BINS], 1)
        mass, moment = np.diff(np.take_along_axis(below, edges[None], 2))
        levels = np.maximum.accumulate(np.where(mass > 0, moment / np.where(mass > 0, mass, 1), levels), 1)
    return round_levels(levels), None


def fit_nf4(histogram: Histogram, bits: int) -> tuple[Integers, None]:
    """NF4 levels (QLoRA, arXiv 2305.14314): quantiles of a normal law, 8 above zero, zero, 7 below it."""
    if bits != 4:
        raise ConfigError(f"codebook.fit: kind='nf4' has no {bits}-bit levels; use bits=4, or kind='twin_log'")
    above, below = ([NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, n)] for n in (9, 8))
    levels = np.array([-level for level in below] + above[-2::-1])  # 0.9677083 is the paper's outermost quantile
    return round_levels(np.tile(levels, (len(histogram.lowest), 1))), None


def fit_absmax(histogram: Histogram, bits: int) -> tuple[Integers, Floats]:
    """All int8 levels, of which -127 ... 127 reach the row's largest magnitude: what every kind is at 8 bits."""
    table = np.tile(np.arange(-128, 128).astype(np.int8), (len(histogram.lowest), 1))
    return table, np.maximum(-histogram.lowest, histogram.highest) / 127


# From histograms of G groups to an int8 table (G, 2**bits), ascending, and the steps (G,) in units of the row's root
# mean square, or None to have the row scales searched.
CODEBOOKS: dict[str, Callable[[Histogram, int], tuple[Integers, Floats | None]]] = {
    "twin_log": fit_twin_log,
    "uniform": fit_uniform,
    "minmax": fit_minmax,
    "lloyd_max": fit_lloyd_max,
    "nf4": fit_nf4,
}


def fit(
    weight: Tensor, bits: int, kind: str = "twin_log", *, scope: str = "layer", importance: Tensor | None = None
) -> Codebook:
    """Fit a codebook to a weight, minimizing Σ_ij importance[j] · (w[i, j] - ŵ[i, j])² of the int8 levels.

    At 8 bits every kind is the uniform grid -127 ... 127, times the row's largest magnitude / 127. A row of zeros gets
    scale 0 and decodes to exact zeros.

    Args:
        weight: (out, in), any float dtype; it is read as float32.
        bits: 2 to 6, or 8.
        kind: one of CODEBOOKS; "nf4" has 4 bits only.
        scope: "layer" for one table, "row" for a table per row; "minmax" has a zero point, so a table, per row in
            either. A table that is the same for all rows is kept once.
        importance: (in,), nonnegative; None, or zero everywhere, weighs all columns equally.

    Returns:
        A Codebook on the weight's device.

    Raises:
        ConfigError: an argument is not one of the allowed values, or a shape does not fit.
        NumericalError: weight or importance contains NaN or Inf, or importance is negative.
    """
    for name, value, allowed in (
        ("bits", bits, WEIGHT_BITS),
        ("kind", kind, tuple(CODEBOOKS)),
        ("scope", scope, SCOPES),
    ):
        if value not in allowed:
            raise ConfigError(f"codebook.fit: {name}={value!r} is not supported; use one of {allowed}")
    matrix = read_matrix("fit", weight)
    columns = _read_importance("fit", importance, matrix.shape[1])
    kind, fit_table = ("uniform", fit_absmax) if bits == 8 else (kind, CODEBOOKS[kind])
    if scope == "layer" and fit_table not in (fit_minmax, fit_absmax):
        levels, _ = fit_table(_count_layer(matrix, columns), bits)
        table, scale = torch.from_numpy(levels), _fit_scales(matrix, columns, levels)
    else:
        tables, scales = [], []
        for rows in _blocks(matrix):
            root_mean_square, histogram = _count_rows(matrix[rows], columns)
            levels, steps = fit_table(histogram, bits)
            tables.append(torch.from_numpy(levels))
            if steps is None:
                scales.append(_fit_scales(matrix[rows], columns, levels))
            else:
                scales.append(torch.from_numpy((steps * root_mean_square).astype(np.float32)))
        table, scale = torch.cat(tables), torch.cat(scales)
        table = table if bool((table != table[0]).any()) else table[:1]
    return Codebook(kind, bits, table.to(weight.device), scale.to(weight.device))


def relative_error(weight: Tensor, codebook: Codebook, importance: Tensor | None = None) -> float:
    """Return Σ importance[j] · (w - ŵ)² / Σ importance[j] · w², 0 for a weight of zeros; raises as `fit` does."""
    matrix = read_matrix("relative_error", weight)
    columns = _read_importance("relative_error", importance, matrix.shape[1])
    quantized = codebook.quantize(weight.detach()).cpu().numpy()
    error = energy = 0.0
    for rows in _blocks(matrix):
        block = matrix[rows].astype(np.float64)
        energy += np.einsum("ij,ij,j->", block, block, columns)
        block -= quantized[rows]
        error += np.einsum("ij,ij,j->", block, block, columns)
    return float(error / energy) if energy > 0 else float("inf") if error > 0 else 0.0


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return table[i or 0, index[i, j]] for int32 indices (out, columns)."""
    if len(table) > 1:
        index = index + torch.arange(len(table), dtype=torch.int32, device=index.device)[:, None] * table.shape[1]
    return table.flatten().index_select(0, index.flatten()).view(index.shape)


def _blocks(matrix: NDArray[np.float32]) -> list[slice]:
    """Cut a matrix into blocks of rows of a size that depends on nothing but its width."""
    size = min(max(1, BLOCK_ELEMENTS // matrix.shape[1]), BLOCK_ROWS)
    return [slice(start, start + size) for start in range(0, len(matrix), size)]


def _sum_columns(products: Floats) -> Floats:
    """Return the sums (R,) over columns: in LANES lanes from left to right, then the last lanes onto the first."""
    whole = products.shape[1] // LANES * LANES
    lanes = products[:, :whole].reshape(len(products), -1, LANES).sum(1)  # not along the fastest axis: one by one
    lanes[:, : products.shape[1] - whole] += products[:, whole:]
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    return lanes[:, 0]


def _measure_rows(rows: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Return each row's root mean square (R,) and the rows in units of it, u."""
    units = rows.astype(np.float64)
    root_mean_square = np.sqrt(_sum_columns(np.square(units)) / units.shape[1])
    units *= (1 / np.where(root_mean_square > 0, root_mean_square, 1))[:, None]
    return root_mean_square, units


def _find_bins(units: Floats) -> NDArray[np.int64]:
    return (BINS * (1 + units / (1 + np.abs(units)))).astype(np.int64)


def _count_rows(rows: NDArray[np.float32], columns: Floats) -> tuple[Floats, Histogram]:
    """Return each row's root mean square (R,) and its histogram."""
    if native.is_available():
        return _count_rows_natively(rows, columns)
    root_mean_square, units = _measure_rows(rows)
    index, size = _find_bins(units), len(rows) * 2 * BINS
    index += np.arange(len(rows))[:, None] * (2 * BINS)
    weights = np.broadcast_to(columns, units.shape), columns * units
    bins = np.array([np.bincount(index.ravel(), w.ravel(), size) for w in weights], float).reshape(2, len(rows), -1)
    return root_mean_square, Histogram(bins, np.minimum(units.min(1), 0), np.maximum(units.max(1), 0))


def _count_rows_natively(rows: NDArray[np.float32], columns: Floats) -> tuple[Floats, Histogram]:
    bins, (root_mean_square, lowest, highest) = np.empty((2, len(rows), 2 * BINS)), np.empty((3, len(rows)))
    threads = torch.get_num_threads()
    native.call("lrq_count_rows", _describe(rows, columns), threads, root_mean_square, bins, lowest, highest)
    return root_mean_square, Histogram(bins, lowest, highest)


def _count_layer(matrix: NDArray[np.float32], columns: Floats) -> Histogram:
    """Return the histogram of all rows as one group, every entry times its row's energy, the mean square."""
    blocks = _blocks(matrix)
    part_blocks = -(-len(blocks) // PARTS)
    parts = -(-len(blocks) // part_blocks)
    bins, ends = np.zeros((parts, 2 * BINS, 2)), np.zeros((parts, 2))
    if native.is_available():
        block_rows, threads = blocks[0].stop, torch.get_num_threads()
        native.call("lrq_count_layer", _describe(matrix, columns), block_rows, part_blocks, threads, bins, ends)
    else:
        for number, rows in enumerate(blocks):
            part = number // part_blocks
            root_mean_square, units = _measure_rows(matrix[rows])
            index, mass = _find_bins(units).ravel(), np.square(root_mean_square)[:, None] * columns
            for moment, weights in enumerate((mass, mass * units)):
                bins[part, :, moment] += np.bincount(index, weights.ravel(), 2 * BINS)
            ends[part] = min(units.min(), ends[part, 0]), max(units.max(), ends[part, 1])
    total = bins[0]
    for part in bins[1:]:
        total += part
    return Histogram(
        np.ascontiguousarray(total.T)[:, None], ends[:, 0].min(keepdims=True), ends[:, 1].max(keepdims=True)
    )


def _describe(matrix: NDArray[np.float32], columns: Floats) -> native.Matrix:
    """A matrix and its columns' importance for the native library, which does without one that is 1 throughout."""
    return native.Matrix(matrix.ctypes.data, *matrix.shape, columns.ctypes.data if (columns != 1).any() else None)


def _accumulate(bins: Floats) -> Floats:
    """Return the sums below each edge of the bins, (2, G, bins + 1): of each quarter, plus the quarters before it."""
    below = np.zeros((*bins.shape[:2], bins.shape[2] + 1))
    quarters = np.cumsum(bins.reshape(*bins.shape[:2], 4, -1), 3)
    quarters[:, :, 1:] += np.cumsum(quarters[..., -1], 2)[:, :, :-1, None]
    below[..., 1:] = quarters.reshape(bins.shape)
    return below


def _find_edge(units: Floats) -> NDArray[np.int64]:
    """Return the index of the bin edge nearest to u, counted from the edge at zero."""
    return np.rint(BINS * (units / (1 + np.abs(units)))).astype(np.int64)


def _measure_levels(below: Floats, levels: Floats, origin: int) -> Floats:
    """Return E (G, K), see the module's docstring, of K candidates (G, K, n); the edge at zero has index origin."""
    (mass, moment), midpoints, top = below, (levels[..., 1:] + levels[..., :-1]) / 2, levels[..., -1]
    index = _find_edge(midpoints) + (origin + np.arange(len(mass))[:, None, None] * mass.shape[1])
    convex = midpoints * mass.ravel().take(index) - moment.ravel().take(index)
    total = top * (top * mass[:, -1:] - 2 * moment[:, -1:])
    return total - 2 * np.einsum("gkn,gkn->gk", levels[..., 1:] - levels[..., :-1], convex)


def _search_ladders(histogram: Histogram, size: int) -> Floats:
    """Return the best Twin-Log levels, ascending, (G, 2 · size), in units of the row's root mean square.

    The search's coordinates: x places hi between the half's mean magnitude (0) and its largest (1), geometrically;
    y = log(lo / hi); z = log(η / hi).
    """
    negative, positive = histogram.bins[:, :, BINS - 1 :: -1], histogram.bins[:, :, BINS:]
    halves = np.concatenate([negative * np.array([1, -1])[:, None, None], positive], 1)
    peak = np.concatenate([-histogram.lowest, histogram.highest])
    is_empty = halves[0].sum(1) == 0
    halves += is_empty[:, None] * np.roll(halves, len(histogram.lowest), 1)
    peak = np.where(is_empty, np.roll(peak, len(histogram.lowest)), peak)
    below = _accumulate(halves)
    mass, moment = below[:, :, -1]
    mean = np.where(moment > 0, moment / np.where(mass > 0, mass, 1), 1)
    growth = np.log(np.maximum(peak / mean, 1))

    def place(points: Floats) -> Floats:
        """Levels (2G, K, size) at points (2G, K, 3)."""
        hi = mean[:, None, None] * np.exp(points[..., :1] * growth[:, None, None])
        lo, eta = hi * np.exp(points[..., 1:2]), hi * np.exp(points[..., 2:])
        return (lo + eta) * ((hi + eta) / (lo + eta)) ** (np.arange(size) / (size - 1)) - eta

    def pick(points: Floats) -> Floats:
        """The point with the smallest error, (2G, 1, 3), of (2G, K, 3)."""
        best = _measure_levels(below, place(points), 0).argmin(1)
        return np.take_along_axis(points, best[:, None, None], 1)

    axes = np.linspace(0, 1, 9), np.log(np.geomspace(0.01, 0.9, 7)), np.log(np.geomspace(0.05, 10, 5))
    lower, upper = np.array([0, np.log(1e-6), np.log(1e-3)]), np.array([1, 0, np.log(100)])
    steps = np.array([axis[1] - axis[0] for axis in axes])
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3)
    best = pick(np.broadcast_to(grid, (len(mass), *grid.shape[1:])))
    neighbours = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), -1).reshape(1, -1, 3)
    for _ in range(ZOOMS):
        steps = steps * ZOOM
        best = pick(np.clip(best + neighbours * steps, lower, upper))
    negative, positive = np.split(place(best)[:, 0], 2)
    return np.concatenate([-negative[:, ::-1], positive], 1)


def round_levels(levels: Floats) -> Integers:
    """Return ascending levels (G, n) as int8, the largest magnitude 127; levels that would coincide move up by one."""
    peak = np.abs(levels).max(1, keepdims=True)
    order = np.arange(levels.shape[1])
    table = np.rint(levels * (127 / peak))
    table = np.maximum.accumulate(table - order, 1) + order
    return np.minimum(table, 127 - order[::-1]).astype(np.int8)


def _fit_scales(matrix: NDArray[np.float32], columns: Floats, table: Integers) -> Tensor:
    """Return each row's scale, float32 (R,), searched and polished, for a table (1 or R, n)."""
    # The largest level is searched from half the root mean square to 4 times the largest weight, at most sqrt(columns).
    coarse_count = int(FINENESS / COARSE * np.log2(8 * np.sqrt(matrix.shape[1]))) + 2
    grid = np.exp2(np.arange(-MARGIN, (coarse_count - 1) * COARSE + MARGIN + 1) / FINENESS)
    if native.is_available():
        table, bits = np.ascontiguousarray(table), table.shape[1].bit_length() - 1
        scale = np.empty(len(matrix), np.float32)
        description, threads = _describe(matrix, columns), torch.get_num_threads()
        native.call("lrq_fit_scales", description, table, len(table), bits, grid, coarse_count, threads, scale)
        return torch.from_numpy(scale)
    scales = []
    for rows in _blocks(matrix):
        levels = table if len(table) == 1 else table[rows]
        root_mean_square, histogram = _count_rows(matrix[rows], columns)
        scale = (_search_scales(histogram, levels, grid) * root_mean_square).astype(np.float32)
        scales.append(_polish_scales(scale, levels, matrix[rows], columns))
    return torch.from_numpy(np.concatenate(scales))


def _search_scales(histogram: Histogram, table: Integers, grid: Floats) -> Floats:
    """Return the scale (R,) of each row, in units of its root mean square, with the smallest E given its table.

    For levels t times a scale s, E(s) = s² · (Σ d·t² from the histogram) - 2 s · (Σ d·t·u from the histogram).
    """
    mass, moment = _accumulate(histogram.bins)
    first_edges = np.arange(len(mass))[:, None] * mass.shape[1] + BINS
    levels = table.astype(np.float64)
    top, base = levels[:, -1:], (0.5 / np.abs(levels).max(1))[:, None]
    gaps, midpoints = np.diff(levels), (levels[:, 1:] + levels[:, :-1]) / 2
    limit = 8 * np.maximum(np.maximum(histogram.highest, -histogram.lowest), 1)[:, None]
    best = np.full((len(mass), 1), MARGIN)
    coarse, around = np.arange(0, len(grid) - 2 * MARGIN, COARSE), np.arange(-MIDDLE, MIDDLE + 1)
    for offsets in (coarse[grid[MARGIN + coarse] <= limit.max()], around * (COARSE // MIDDLE), around):
        index = best + offsets
        scales = base * grid[index]
        square, product = (top * top) * mass[:, -1:], top * moment[:, -1:]
        for k in range(levels.shape[1] - 1):
            gap, midpoint = gaps[:, k : k + 1], midpoints[:, k : k + 1]
            edge = _find_edge(midpoint * scales) + first_edges
            square = square - (2 * gap * midpoint) * mass.ravel().take(edge)
            product = product - gap * moment.ravel().take(edge)
        errors = scales * (scales * square - 2 * product)
        if offsets[0] == 0:
            errors[grid[index] > limit] = np.inf
        best = np.take_along_axis(index, errors.argmin(1)[:, None], 1)
    return (base * grid[best])[:, 0]


def _polish_scales(
    scale: NDArray[np.float32], table: Integers, rows: NDArray[np.float32], columns: Floats
) -> NDArray[np.float32]:
    """Return the best of each row's scale and POLISHES least-squares scales, each given the codes of the one before."""
    best, smallest = scale, np.full(len(rows), np.inf)
    levels, bits = torch.from_numpy(table), table.shape[1].bit_length() - 1
    for _ in range(POLISHES + 1):
        codes = Codebook("", bits, levels, torch.from_numpy(scale)).encode(torch.from_numpy(rows))
        nearest = _look_up(levels, codes.to(torch.int32)).numpy()
        weighted = nearest * columns
        square, product = _sum_columns(weighted * nearest), _sum_columns(weighted * rows)
        error = scale.astype(np.float64) * (scale.astype(np.float64) * square - 2 * product)
        best, smallest = np.where(error < smallest, scale, best), np.minimum(error, smallest)
        better = (product / np.where(square > 0, square, 1)).astype(np.float32)
        scale = np.where(product > 0, better, scale)
    return best


def read_matrix(operation: str, weight: Tensor) -> NDArray[np.float32]:
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        found, allowed = f"{weight.dtype} of shape {tuple(weight.shape)}", "a nonempty floating-point matrix (out, in)"
        raise ConfigError(f"codebook.{operation}: weight is {found}; pass {allowed}")
    matrix = weight.detach().to("cpu", torch.float32).contiguous()
    if not all(map(torch.isfinite, matrix.aminmax())):
        raise NumericalError(f"codebook.{operation}: weight contains NaN or Inf; check the checkpoint, or its dtype")
    return matrix.numpy()


def _read_importance(operation: str, importance: Tensor | None, in_features: int) -> Floats:
    """Return the columns' importance, its largest 1."""
    if importance is None:
        return np.ones(in_features)
    columns = importance.detach().to("cpu", torch.float64).numpy()
    if columns.shape != (in_features,):
        allowed = f"pass one number per column, ({in_features},)"
        raise ConfigError(f"codebook.{operation}: importance has shape {columns.shape}; {allowed}")
    if not (np.isfinite(columns) & (columns >= 0)).all():
        raise NumericalError(
            f"codebook.{operation}: importance contains NaN, Inf or negative numbers; check its source"
        )
    largest = columns.max()
    return columns / largest if largest > 0 else np.ones(in_features)
