"""Orthogonal rotations of a linear layer's input: Hadamard, block Hadamard and outlier-aware.

Row vectors, and R orthogonal: a linear layer x Wᵀ equals (x R)(W R)ᵀ, so R is folded into the weight once and applied
to the activations at run time. Rotating spreads a channel that is large for every token over all channels, after which
one quantization step per token fits them all.

| kind             | R                                                     | signs | what is stored              |
|------------------|-------------------------------------------------------|-------|-----------------------------|
| `none`           | I                                                     | no    | nothing                     |
| `hadamard`       | a Kronecker product of small Hadamard matrices        | yes   | factors                     |
| `block_hadamard` | a Hadamard matrix of up to 128 in each block          | yes   | the size of a block         |
| `outlier`        | R1 · P · R2, fitted to the magnitude of every channel | no    | block1, block2, permutation |

Random signs make the Hadamard rotations random (QuaRot, arXiv 2404.00456). They come first: x is multiplied by them,
and `Rotation.apply` follows. :func:`build` returns them beside the rotation, because a layer multiplies its input by a
vector anyway and takes them into that. The outlier rotation is DuQuant's (arXiv 2406.01721).
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrqdit.errors import RotationError
from lrqdit.numerics.hadamard import factor_matrix, kronecker_matrix
from lrqdit.numerics.shapes import (
    MAX_BLOCK,
    check_width,
    divisors,
    is_whole,
    kronecker_factors,
    merge_factors,
)

GREEDY_STEPS = 256
SAMPLE_ROWS = 2048
# With fewer rows (5 to 7, 9 to 11, ...) the bits of a CPU matrix product depend on the number of threads.
MIN_ROWS = 32


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix R, (in_features, in_features), in factored form; made by `build`.

    Attributes:
        kind: a key of ROTATIONS.
        in_features: the width.
        factors: `hadamard`: see `kronecker_factors`; `block_hadamard` and `outlier`: (block,); `none`: ().
        block1: `outlier` only: float32 (block, block), orthogonal, R1 = I ⊗ block1.
        block2: `outlier` only: float32 (block, block), orthogonal, R2 = I ⊗ block2.
        permutation: `outlier` only: int64 (in_features,), output channel i of P is input channel permutation[i].
    """

    kind: str
    in_features: int
    factors: tuple[int, ...] = ()
    block1: Tensor | None = None
    block2: Tensor | None = None
    permutation: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Return x R.

        Args:
            x: (..., in_features), any floating dtype; converted to float32 first.

        Returns:
            float32, the shape of x, on x's device. The same bits with one or two CPU threads, and with any
            number where a multiple of 16 divides the width (most transformer widths).

        Raises:
            RotationError: if x is not floating point or its last dimension is not in_features.
        """
        return self._rotate(self._checked("apply", x))

    def apply_transpose(self, x: Tensor) -> Tensor:
        """Return x Rᵀ, the inverse of `apply`; arguments, result and errors as there."""
        return self._rotate(self._checked("apply_transpose", x), is_inverse=True)

    def matrix(self) -> Tensor:
        """Return R, dense: float32 (in_features, in_features), on the CPU."""
        return self.apply(torch.eye(self.in_features, dtype=torch.float32, device="cpu"))

    def _rotate(self, x: Tensor, is_inverse: bool = False) -> Tensor:
        if self.kind == "hadamard":
            return _rotate_width(x, self.factors, is_inverse)
        if self.kind == "block_hadamard":
            block = factor_matrix(self.factors[0], x.device)
            return _rotate_blocks(x, block.T if is_inverse else block)
        if self.block1 is None or self.block2 is None or self.permutation is None:
            return x
        block1, block2, permutation = (t.to(x.device) for t in (self.block1, self.block2, self.permutation))
        if is_inverse:
            return _rotate_blocks(_rotate_blocks(x, block2.T).index_select(-1, permutation.argsort()), block1.T)
        return _rotate_blocks(_rotate_blocks(x, block1).index_select(-1, permutation), block2)

    def _checked(self, operation: str, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise RotationError(
                f"{operation}: x of shape {tuple(x.shape)} does not end in in_features={self.in_features}; "
                "pass (..., in_features), or build the rotation for this width"
            )
        if not x.is_floating_point():
            raise RotationError(
                f"{operation}: x has dtype {x.dtype}, not a floating-point one; convert it with x.float()"
            )
        return x.float()


Built = tuple[Rotation, Tensor | None]


def build(
    in_features: int,
    kind: str,
    seed: int = 0,
    *,
    channel_absmax: Tensor | None = None,
    sample: Tensor | None = None,
) -> Built:
    """Build a rotation of a layer's input, and the signs that x is multiplied by before it.

    Args:
        in_features: the width, at least 1. Every width has every kind, but `outlier` needs a divisor of 2 to 128.
        kind: `none`, `hadamard`, `block_hadamard` or `outlier`, see the module's table.
        seed: 0 to 2**63 - 1; the rotation depends on the arguments alone, not on torch's global generator.
        channel_absmax: (in_features,), max |x_j| over calibration, finite, at least 0. `outlier` is fitted to it; other
            kinds ignore it. Without it and without a sample `outlier` is fitted to random magnitudes: still orthogonal,
            but it knows no outlier.
        sample: (tokens, in_features), some of the layer's input. `outlier` then fits to it instead of channel_absmax;
            other kinds ignore it.

    Returns:
        The rotation, and the signs, float32 (in_features,), +1 or -1, or None: both on the CPU.

    Raises:
        RotationError: if an argument breaks a rule above.
    """
    if kind not in ROTATIONS:
        raise RotationError(f"build: unknown kind={kind!r}; use one of {', '.join(map(repr, ROTATIONS))}")
    check_width("build", in_features)
    if not is_whole(seed) or not 0 <= seed < 2**63:
        raise RotationError(f"build: seed={seed!r} is not an integer from 0 to 2**63 - 1; use for example seed=0")
    return ROTATIONS[kind](in_features, torch.Generator().manual_seed(seed), channel_absmax, sample)


def zigzag_permutation(magnitudes: Tensor, block: int) -> Tensor:
    """Deal channels, sorted by magnitude, evenly over blocks: forwards in even rounds, backwards in odd ones.

    DuQuant's zigzag (arXiv 2406.01721, section 3.2) for any number of blocks: every block gets one of the largest
    channels, one of the next largest and so on, at the same position in every block.

    Args:
        magnitudes: (in_features,), real.
        block: channels in a block, a divisor of in_features.

    Returns:
        int64 (in_features,): channel permutation[i] goes to place i; block b holds places b · block and on.

    Raises:
        RotationError: if magnitudes is not a vector of a multiple of block.
    """
    if magnitudes.ndim != 1 or block < 1 or magnitudes.numel() % block:
        raise RotationError(
            f"zigzag_permutation: magnitudes of shape {tuple(magnitudes.shape)} is not a vector of a multiple of "
            f"block={block}; pass one magnitude for each channel and a divisor of their number"
        )
    order = torch.argsort(magnitudes, descending=True, stable=True)
    rounds = order.reshape(block, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1).contiguous()


def _build_none(in_features: int, *_: Any) -> Built:
    return Rotation("none", in_features), None


def _build_hadamard(in_features: int, generator: torch.Generator, *_: Any) -> Built:
    return Rotation("hadamard", in_features, kronecker_factors(in_features)), _random_signs(in_features, generator)


def _build_block_hadamard(in_features: int, generator: torch.Generator, *_: Any) -> Built:
    block = math.gcd(in_features, MAX_BLOCK)
    return Rotation("block_hadamard", in_features, (block,)), _random_signs(in_features, generator)


def _build_outlier(
    in_features: int, generator: torch.Generator, channel_absmax: Tensor | None, sample: Tensor | None
) -> Built:
    """DuQuant's R1 · P · R2 (arXiv 2406.01721, equations 3 to 6), with one block shared by all positions.

    Deviations: the block is the largest divisor of in_features up to 128, and the same at all positions, which keeps
    what is stored small; magnitudes are therefore the maximum over the blocks. With channel_absmax alone a channel's
    magnitude after R is sqrt(Σ_j v_j² R_jk²), as for channels of independent sign; with a sample it is measured.
    """
    block = max(divisor for divisor in divisors(in_features) if divisor <= MAX_BLOCK)
    if block == 1 and in_features > 1:
        raise RotationError(
            f"build: kind='outlier' with in_features={in_features}, which has no divisor from 2 to {MAX_BLOCK}; "
            "use kind='hadamard'"
        )
    if sample is not None:
        _check_magnitudes("sample", sample, 2, in_features)
        tokens = max(1, SAMPLE_ROWS * block // in_features)
        rows = sample[:: math.ceil(len(sample) / tokens)].detach().cpu().float()
        measure = _measured_magnitudes
    elif channel_absmax is not None:
        _check_magnitudes("channel_absmax", channel_absmax, 1, in_features)
        rows = channel_absmax.detach().cpu().float()[None]
        measure = _independent_magnitudes
    else:
        rows = torch.rand(1, in_features, generator=generator, dtype=torch.float32)
        measure = _independent_magnitudes
    with single_thread():
        block1 = _fit_block(rows, block, measure, generator)
        permutation = zigzag_permutation(measure(rows, block1).amax(0).flatten(), block)
        rows = _rotate_blocks(rows, block1.float()) if sample is not None else measure(rows, block1).reshape(1, -1)
        block2 = _fit_block(rows[:, permutation], block, measure, generator)
    return Rotation("outlier", in_features, (block,), block1.float(), block2.float(), permutation), None


ROTATIONS: dict[str, Callable[..., Built]] = {
    "none": _build_none,
    "hadamard": _build_hadamard,
    "block_hadamard": _build_block_hadamard,
    "outlier": _build_outlier,
}


def _fit_block(
    rows: Tensor, block: int, measure: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator
) -> Tensor:
    """Greedy search: swap the largest position to the front, spread it, keep the prefix with the smallest max - min."""
    spread = _spreading_matrix(block, generator)
    best = rotation = torch.eye(block, dtype=torch.float64)
    best_range = math.inf
    for step in range(GREEDY_STEPS + 1):
        magnitudes = measure(rows, rotation).flatten(0, -2).amax(0)
        value_range = float(magnitudes.max() - magnitudes.min())
        if value_range < best_range:
            best, best_range = rotation, value_range
        if value_range == 0 or step == GREEDY_STEPS:
            break
        swap = torch.arange(block, dtype=torch.int64)
        largest = int(magnitudes.argmax())
        swap[0], swap[largest] = largest, 0
        others = 1 + torch.randperm(block - 1, generator=generator)
        shuffled = spread[torch.cat((torch.zeros(1, dtype=torch.int64), others))]
        rotation = rotation[:, swap] @ shuffled
    return best


def _spreading_matrix(block: int, generator: torch.Generator) -> Tensor:
    """Orthogonal float64 (block, block): first row constant 1/sqrt(block), the others random."""
    gaussian = torch.randn(block, block, generator=generator, dtype=torch.float64)
    gaussian[:, 0] = 1.0
    spread = torch.linalg.qr(gaussian).Q.T
    spread[0] = block**-0.5
    return spread


def _measured_magnitudes(rows: Tensor, matrix: Tensor) -> Tensor:
    return _rotate_blocks(rows, matrix.float()).unflatten(-1, (-1, len(matrix))).abs()


def _independent_magnitudes(rows: Tensor, matrix: Tensor) -> Tensor:
    return (rows.unflatten(-1, (-1, len(matrix))).double().square() @ matrix.square()).sqrt()


def _rotate_width(x: Tensor, factors: tuple[int, ...], is_inverse: bool) -> Tensor:
    """Multiply the last axis by the Kronecker product of the factors, or by two overlapping ones if it is narrower."""
    width, covered = x.shape[-1], math.prod(map(abs, factors))
    if covered == width:
        return _multiply_kronecker(x, factors, is_inverse)
    # Signs in between keep the second product from undoing what the first has spread.
    index = torch.arange(width, dtype=torch.int64, device=x.device)
    signs = 1.0 - 2.0 * (index * index * 40503 >> 15 & 1).float()
    head, tail = slice(0, covered), slice(width - covered, width)
    first, second = (tail, head) if is_inverse else (head, tail)
    for part, scale in ((first, signs), (second, 1.0)):
        rotated = _multiply_kronecker(x[..., part], factors, is_inverse)
        x = torch.cat((x[..., : part.start], rotated, x[..., part.stop :]), -1) * scale
    return x


def _multiply_kronecker(x: Tensor, factors: tuple[int, ...], is_inverse: bool) -> Tensor:
    shape, inner = x.shape, 1
    for group in reversed(merge_factors(factors)):
        matrix = kronecker_matrix(group, x.device)
        matrix = matrix.T if is_inverse else matrix
        order = len(matrix)
        if inner == 1:
            x = _rotate_blocks(x, matrix)
        else:
            x = x.reshape(x.numel() // (order * inner), order, inner)
            x = torch.bmm(matrix.T.expand(len(x), order, order), x)
        inner *= order
    return x.reshape(shape)


def _rotate_blocks(x: Tensor, block: Tensor) -> Tensor:
    rows = x.reshape(x.numel() // len(block), len(block))
    count = len(rows)
    if count < MIN_ROWS:
        rows = torch.cat((rows, rows.new_zeros(MIN_ROWS - count, len(block))))
    return (rows @ block)[:count].reshape(x.shape)


def _random_signs(in_features: int, generator: torch.Generator) -> Tensor:
    return 1.0 - 2.0 * torch.randint(0, 2, (in_features,), generator=generator).float()


@contextmanager
def single_thread() -> Generator[None]:
    """QR and matrix products in float64 give the same bits on every run only with a fixed number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_magnitudes(name: str, values: Tensor, dimensions: int, in_features: int) -> None:
    if values.ndim != dimensions or values.shape[-1] != in_features or values.numel() == 0:
        shape = "(in_features,)" if dimensions == 1 else "(tokens, in_features), tokens at least 1,"
        raise RotationError(
            f"build: {name} of shape {tuple(values.shape)} is not {shape} for in_features={in_features}; "
            "pass what calibration observed at this layer"
        )
    if not values.isfinite().all() or (dimensions == 1 and (values < 0).any()):
        rule = "finite and at least 0" if dimensions == 1 else "finite"
        raise RotationError(
            f"build: {name} has values that are not {rule}; leave out the calibration batches with NaN or Inf"
        )
