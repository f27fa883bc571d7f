"""The principal part of a layer's input, kept out of its low-bit codes.

A token of four bits carries a rounding error in proportion to its length, spread evenly over all channels by the
rotation. A few directions U hold most of that length (their shares are eigenvalues of the input's second moment), so
with x^ the centred and smoothed input, p = x^ U its coordinates there and C the weight's image of U,

    x^ W^T = (x^ - p U^T) (W - C^T U^T)^T + p C,        C = (U^T U)^-1 U^T W^T,

exactly and for any U of full rank. What is rounded is much shorter, and the codes' error falls with it; p C is a
product of ``rank`` columns in the model's own dtype. The idea is ResQ's (arXiv 2412.14363), which keeps that part at 8
bits inside the product; SVDQuant's low-rank branch (arXiv 2411.05007) follows the weight instead and leaves the tokens
as long as they are. U and C are stored as int8, one scale per direction.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lrqdit.numerics.rotation import MIN_ROWS, single_thread

ITERATIONS, EXTRA_DIRECTIONS = 8, 8


@dataclass(frozen=True)
class LowRank:
    """A matrix of few rows as int8 (rank, width) and float32 (rank,)."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def round(cls, values: Tensor) -> "LowRank":
        """The nearest one to values (rank, width)."""
        scale = values.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return cls((values / scale[:, None]).round().to(torch.int8), scale.float())

    @property
    def values(self) -> Tensor:
        """float32 (rank, width)."""
        return self.codes.float() * self.scale[:, None]


def find_directions(multiply: Callable[[Tensor], Tensor], width: int, rank: int, seed: int) -> LowRank:
    """The leading eigenvectors of a positive matrix by subspace iteration (Halko et al., arXiv 0909.4061), rounded.

    Args:
        multiply: float32 (width, columns) -> the matrix times it.
        width: of the matrix.
        rank: how many.
        seed: of the start.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, min(width, rank + EXTRA_DIRECTIONS), generator=generator, dtype=torch.float32)
    with single_thread():
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(multiply(basis)).Q
        _, vectors = torch.linalg.eigh(basis.double().T @ multiply(basis).double())
        basis = basis.double() @ vectors.flip(1)[:, :rank]
    return LowRank.round(basis.T)


def outlet(weight: Tensor, directions: LowRank) -> Tensor:
    """C = (U^T U)^-1 U^T W^T, float32 (rank, out_features), of a smoothed weight (out_features, in_features)."""
    u = directions.values.double()
    with single_thread():
        return torch.linalg.solve(u @ u.T, u @ weight.double().T).float()


def split(x: Tensor, directions: LowRank, offset: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """A layer's input without its principal part, and the coordinates p of that part, in the dtype of the input.

    Args:
        x: (tokens, in_features).
        directions: U^T, of the centred and smoothed input.
        offset, scale: float16 (in_features,), what is subtracted from x and multiplied with it.

    Returns:
        x' (tokens, in_features) and p (tokens, rank), both in float32 for float16, which p may exceed. Centred and
        smoothed, x' is what is left.
    """
    x = x.float() if x.dtype == torch.float16 else x
    u = directions.values
    inlet, back = (u, u) if scale is None else (u * scale.float(), u / scale.float())
    start = x.new_zeros(len(u)) if offset is None else -(inlet @ offset.float()).to(x.dtype)
    rows = len(x)
    if rows < MIN_ROWS:  # products of few rows depend on the number of threads
        x = F.pad(x, (0, 0, 0, MIN_ROWS - rows))
    p = torch.addmm(start, x, inlet.T.to(x.dtype))
    return torch.addmm(x, p, back.to(x.dtype), alpha=-1)[:rows], p[:rows]
