"""Trellis-coded levels: a code of b bits chooses among 2**b levels, and earlier codes decide which 2**b of 2**(b + 1).

This is trellis-coded quantization (Marcellin and Fischer, 1990). The table of a layer has 2**(bits + 1) levels in
ascending order, dealt in turn to four subsets. A convolutional code decides which two of the four subsets the next code
may choose from. Here it is Ungerboeck's code with 64 states (IEEE Trans. Inf. Theory 28, 1982; parity polynomials 103
and 024 in octal). It is written in feedforward form: a level depends on its own code and on the codes 1, 2, 4 and 6
steps before, not on a state that a decoder would have to carry along:

    level[n] = table[2 · (c[n] ^ ((c[n-1] ^ c[n-6]) & 1)) + ((c[n-2] ^ c[n-4]) & 1)],      c[n] = 0 for n < 0.

The steps n of a path are the **output channels** of one input column. Two things follow. A decoder that wants some
channels needs the six channels before them and nothing else. And GPTQ, which rounds a weight one column after another,
rounds a whole path at a time, so its feedback from column to column stays exact.

:meth:`TrellisCodebook.encode` finds, for each column, the path with the least squared error Σ (w - scale · level)², by
the Viterbi algorithm. The costs are float32 and are added in a fixed order, so that the native search (csrc/trellis.h)
gives the same codes. The relative squared error on Gaussian weights is .0816, .0228 and .0063 at 2, 3 and 4 bits; the
best levels without a trellis (Lloyd-Max) leave .1172, .0343 and .0092 (benchmarks/quality/bench_levels.py).
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrqdit import native
from lrqdit.config import TRELLIS_BITS
from lrqdit.errors import ConfigError
from lrqdit.numerics.codebook import SLOTS, Codebook, read_matrix, round_levels

STATES, HISTORY = 64, 6
STEPS_PER_SHIFT = 32  # after so many rows the smallest cost becomes 0 again
UNREACHED = np.float32(1e30)
FIT_STEPS, FIT_WEIGHTS, FIT_COLUMNS = 8, 1 << 15, 8


@dataclasses.dataclass(frozen=True, eq=False)
class TrellisCodebook(Codebook):
    """A :class:`Codebook` whose table, int8 (1, 2**(bits + 1)), is twice as long as its codes can name."""

    def encode(self, weight: Tensor) -> Tensor:
        """The codes, uint8, of the paths of least squared error through the columns of a finite (out, columns)."""
        self.check_rows("encode", weight)
        matrix = weight.detach().to("cpu", torch.float32).contiguous()
        scale = self.row_scale.cpu().contiguous()
        codes = torch.empty(matrix.shape, dtype=torch.uint8)
        if matrix.numel() and native.is_available():
            description = native.Matrix(matrix.data_ptr(), *matrix.shape, None)
            table, threads = self.table.cpu().contiguous(), torch.get_num_threads()
            native.call("lrq_trellis_encode", description, table, self.bits, scale, threads, codes)
        else:
            codes = torch.from_numpy(_encode(matrix.numpy(), self.table[0].cpu().numpy(), scale.numpy()))
        return codes.to(weight.device)

    def decode(self, codes: Tensor) -> Tensor:
        """row_scale · level, float32 (out, columns), for uint8 codes (out, columns)."""
        self.check_rows("decode", codes)
        return self.table[0].float()[level_index(codes)].mul_(self.row_scale[:, None])


def level_index(codes: Tensor) -> Tensor:
    """Which level of the table each code stands for: uint8 codes (out, columns) -> int32 (out, columns).

    Row 0 counts as channel 0. A caller that starts at a later channel passes HISTORY rows more and drops their results.
    """
    padded = torch.nn.functional.pad(codes, (0, 0, HISTORY, 0))

    def earlier(channels: int) -> Tensor:
        return padded[HISTORY - channels : len(padded) - channels]

    chosen = codes ^ (earlier(1) ^ earlier(6)) & 1
    return (chosen.int() << 1).add_((earlier(2) ^ earlier(4)) & 1)


def expand(levels: Codebook, weight: Tensor) -> TrellisCodebook:
    """Double the levels of a scalar codebook, fitted to ``weight`` (out, in), into those of a trellis.

    Each level becomes two, which lie a quarter of the way to its neighbours. Then Lloyd's iteration runs FIT_STEPS
    times: it finds the best paths and moves every level to the mean of the weights that the paths assign to it. A
    sample of columns is enough: FIT_COLUMNS at least, and so many that they hold FIT_WEIGHTS weights.

    Raises:
        ConfigError: for more than 5 bits, or a table per row.
    """
    if levels.bits not in TRELLIS_BITS or len(levels.table) != 1:
        raise ConfigError(
            f"trellis.expand: {levels.bits} bits with {len(levels.table)} tables; "
            "a trellis has one table of 2 to 5 bits"
        )
    levels.check_rows("expand", weight)
    count = max(FIT_COLUMNS, -(-FIT_WEIGHTS // len(weight)))
    sample = read_matrix("expand", weight[:, :: max(1, weight.shape[1] // count)])
    scale = levels.row_scale.cpu()
    table = _split(levels.table[0].cpu().numpy().astype(np.float64))
    units = sample / np.where(scale == 0, 1, scale.double().numpy())[:, None]
    energy = np.broadcast_to(np.square(scale.double().numpy())[:, None], units.shape)
    sums = energy.ravel(), (energy * units).ravel()
    book = _rounded(levels, table, scale)
    for _ in range(FIT_STEPS):
        index = level_index(book.encode(torch.from_numpy(sample))).numpy().ravel()
        mass, moment = (np.bincount(index, w, len(table)) for w in sums)
        table = np.maximum.accumulate(np.where(mass > 0, moment / np.where(mass > 0, mass, 1), table))
        book = _rounded(levels, table, scale)
    return dataclasses.replace(book, table=book.table.to(weight.device), row_scale=book.row_scale.to(weight.device))


def _split(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    gaps = np.diff(levels)
    below, above = np.concatenate([gaps[:1], gaps]), np.concatenate([gaps, gaps[-1:]])
    return np.stack([levels - below / 4, levels + above / 4], 1).ravel()


def _rounded(levels: Codebook, table: NDArray[np.float64], scale: Tensor) -> TrellisCodebook:
    """The table as int8 with 127 its largest magnitude, and the row scales that go with it."""
    peak = float(np.abs(table).max())
    if not peak > 0:
        table, peak = np.arange(1, len(table) + 1, dtype=np.float64), 127.0
    table8 = torch.from_numpy(round_levels(table[None]))
    return TrellisCodebook(levels.kind, levels.bits, table8, scale * (peak / 127))


def _encode(matrix: NDArray[np.float32], table: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The Viterbi algorithm, all columns side by side; bit i of a state is the lowest bit of c[t - 1 - i]."""
    rows, columns = matrix.shape
    subsets = table.astype(np.int32).reshape(-1, 4)
    slots = np.arange(-SLOTS // 2, SLOTS // 2)
    ranks = np.stack([np.searchsorted(s[1:] + s[:-1], slots, side="right") for s in subsets.T], 1).astype(np.uint8)
    level = np.take_along_axis(subsets, ranks.astype(np.int64), 0).astype(np.float32)
    weights = (scale / scale.max() if scale.max() > 0 else scale).astype(np.float32)
    units = matrix / np.where(scale == 0, np.float32(1), scale)[:, None]
    index = np.clip(np.floor(2 * units), -SLOTS // 2, SLOTS // 2 - 1).astype(np.int64) + SLOTS // 2

    h = np.arange(STATES // 2)
    parity, first = (h >> 1 ^ h >> 3) & 1, h & 1
    same, other = 2 * first + parity, 2 * (first ^ 1) + parity
    costs = np.full((columns, STATES), UNREACHED, np.float32)
    costs[:, 0] = 0
    decisions = np.empty((rows, columns, STATES), np.bool_)
    for t in range(rows):
        distances = np.square((units[t][:, None] - level[index[t]]) * weights[t])
        a, b = distances[:, same], distances[:, other]
        young, old = costs[:, : STATES // 2], costs[:, STATES // 2 :]
        even, odd = (young + a, old + b), (young + b, old + a)
        decisions[t, :, 0::2], decisions[t, :, 1::2] = even[1] < even[0], odd[1] < odd[0]
        costs = np.stack([np.minimum(*even), np.minimum(*odd)], 2).reshape(columns, STATES)
        if t % STEPS_PER_SHIFT == STEPS_PER_SHIFT - 1:
            costs = costs - costs.min(1, keepdims=True)
    codes = np.empty((rows, columns), np.uint8)
    state, every = costs.argmin(1), np.arange(columns)
    for t in range(rows - 1, -1, -1):
        bit, h = state & 1, state >> 1
        old = decisions[t, every, state].astype(np.int64)
        subset = 2 * (bit ^ h & 1 ^ old) + ((h >> 1 ^ h >> 3) & 1)
        codes[t] = 2 * ranks[index[t], subset] + bit
        state = h | old << (HISTORY - 1)
    return codes
