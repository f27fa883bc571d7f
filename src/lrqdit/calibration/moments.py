"""Second moments of a linear layer's input: of its tokens, and of its tokens weighted by their effect on the output.

Rounding changes a layer's weight by a matrix D, and so its output by D x for every token x. Two quantities measure how
much that matters:

- **Tokens alone.** The squared change of the layer's output is Σ |D x|² = tr D E[x xᵀ] Dᵀ. E[x xᵀ] is the Hessian of
  GPTQ (arXiv 2210.17323).
- **The model's output.** Let r be a random Gaussian direction of the model's output, so that E |rᵀ e|² = |e|² for any
  error e, and g the gradient of rᵀ output to the layer's output at a token. To first order, rounding changes rᵀ output
  by Σ_tokens gᵀ D x = ⟨M, D⟩, with M = Σ g xᵀ over the tokens of a picture. An error that all tokens have in common
  adds up in this sum; in a sum over tokens of squares it does not. Of the Fisher matrix E[vec M vec Mᵀ] only the input
  side is kept, E[Mᵀ M].

Both are second moments of rows z: the tokens, or the rows of M. A row moves by -w times the offset when the tokens move
by -offset. The weight w is 1 for a token, and Σ g for a row of M.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrqdit.numerics.rotation import single_thread

ROWS_PER_BLOCK, ROWS_PER_PRODUCT = 4096, 1024
PROJECTIONS = 32  # of the rows of M, random signs: E[(P M)ᵀ(P M)] = Mᵀ M


class SecondMoment:
    """Σ z zᵀ over rows z = x - w · shift, with Σ w z and Σ w², from which it follows for any other offset.

    Args:
        shift: near the mean of x, float32 (width,). Without it, float32 sums of a large constant offset would lose the
            part that varies.
    """

    def __init__(self, shift: Tensor) -> None:
        self.shift = shift
        self.count = 0
        self._square = torch.zeros(len(shift), len(shift), dtype=torch.float32, device=shift.device)
        self._sum = np.zeros(len(shift))
        self._weight_square = 0.0
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Add rows z, float32 (count, width), of weights (count,)."""
        self._pending.append((rows, weights))  # few rows at a time would add the whole matrix for each few
        if sum(len(part) for part, _ in self._pending) >= ROWS_PER_PRODUCT:
            self._add_pending()

    def _add_pending(self) -> None:
        if not self._pending:
            return
        rows, weights = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        with single_thread():
            for block, weight in zip(rows.split(ROWS_PER_BLOCK), weights.split(ROWS_PER_BLOCK), strict=True):
                self._square += block.T @ block
                w = weight.cpu().numpy().astype(np.float64)
                self._sum += (block.cpu().numpy() * w[:, None]).sum(axis=0)
                self._weight_square += float(np.square(w).sum())
                self.count += len(block)

    def about(self, offset: Tensor) -> Tensor:
        """E[z zᵀ] of z = x - w · offset, float64 (width, width)."""
        self._add_pending()
        count = max(1, self.count)
        distance = offset.double() - self.shift.double().cpu()
        product = torch.outer(torch.from_numpy(self._sum / count), distance)
        square = self._square.double().cpu() / count
        return (
            square.sub_(product)
            .sub_(product.T)
            .add_(torch.outer(distance, distance), alpha=self._weight_square / count)
        )

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Everything :meth:`from_tensors` needs."""
        self._add_pending()
        vectors = [self.shift.double().cpu(), torch.from_numpy(self._sum)]
        return {
            prefix: self._square.cpu(),
            f"{prefix}_vectors": torch.stack(vectors),
            f"{prefix}_weights": torch.tensor([self.count, self._weight_square], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "SecondMoment | None":
        """Inverse of :meth:`to_tensors`; None if there is none of that name."""
        if prefix not in tensors:
            return None
        shift, total = tensors[f"{prefix}_vectors"]
        moment = cls(shift.float())
        moment._square, moment._sum = tensors[prefix], total.numpy().copy()
        count, moment._weight_square = tensors[f"{prefix}_weights"].tolist()
        moment.count = int(count)
        return moment


def project_gradient(gradient: Tensor, x: Tensor, shift: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of M and their weights, for every picture of a batch.

    Args:
        gradient: to the layer's output, (batch, ..., out_features).
        x: the layer's input, (batch, ..., in_features).
        shift: float32 (in_features,).
        generator: of the signs.

    Returns:
        float32 (rows, in_features) and (rows,), rows = batch * min(PROJECTIONS, out_features).
    """
    gradient = gradient.reshape(len(gradient), -1, gradient.shape[-1]).float()
    tokens = x.reshape(len(x), -1, x.shape[-1]).float() - shift
    if gradient.shape[-1] > PROJECTIONS:
        signs = torch.randint(0, 2, (gradient.shape[-1], PROJECTIONS), generator=generator).float().mul_(2).sub_(1)
        gradient = gradient @ (signs / PROJECTIONS**0.5).to(gradient.device)
    with single_thread():
        rows = gradient.transpose(1, 2) @ tokens
        weights = gradient.sum(dim=1)
    return rows.flatten(0, 1), weights.flatten()


class Tap(torch.autograd.Function):
    """A linear layer's output as it is; in the backward pass ``note(gradient, x)`` is called."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, note: Callable[[Tensor, Tensor], object]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.note = note
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.note(*gradients, *ctx.saved_tensors)
        return gradients[0], None, None
