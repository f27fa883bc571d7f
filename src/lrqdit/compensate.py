"""Rounding that compensates its own error: GPTQ on any codebook, towards the best target for quantized activations.

With x~q the quantized tokens a layer really multiplies, and x~ what they stand for, the weights that minimize
|| x~q V^T - x~ W~^T ||^2 before rounding are the Wiener solution

    V = W~ (X~^T X~q + lambda I) (X~q^T X~q + lambda I)^-1,

which equals W~ where activations are exact. V is then rounded column by column, each column's error spread over the
columns still to come (GPTQ, arXiv 2210.17323: the optimal brain surgeon's update with H = X~q^T X~q), in descending
order of diag(H).

Both steps fit the calibration tokens, so tokens held out decide per layer: plain rounding, GPTQ, or GPTQ on V.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lrqdit.activation import InputTransform, dequantize_tokens, quantize_tokens
from lrqdit.codebook import Codebook
from lrqdit.rotation import single_thread

DAMPING = 0.01
COLUMNS_PER_BLOCK = 128
MAX_HESSIAN_WIDTH = 4096
HELD_OUT_EVERY = 5


def round_weight(
    weight: Tensor, levels: Codebook, transform: InputTransform, tokens: Tensor, activation_bits: int
) -> tuple[Tensor, dict[str, float]]:
    """Round a folded weight by every way and keep the one with the smallest error on held-out tokens.

    Args:
        weight: W~, float32 (out_features, in_features), already folded.
        levels: fitted to it.
        transform: of the layer's input.
        tokens: the layer's raw input, (count, in_features), any float dtype.
        activation_bits: 16 leaves the transformed tokens as they are.

    Returns:
        Codes uint8 (out_features, in_features), and by way of rounding (``nearest``, ``gptq``, ``wiener``) the squared
        output error on held-out tokens relative to plain rounding's; the codes are those of the smallest.
    """
    exact = transform.apply(tokens)
    seen = exact
    if activation_bits < 16:
        seen = dequantize_tokens(*quantize_tokens(exact, activation_bits, transform.clip))
    is_held_out = torch.arange(len(tokens)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    codes = {"nearest": levels.encode(weight)}
    with single_thread():
        for columns in torch.arange(weight.shape[1]).split(MAX_HESSIAN_WIDTH):
            fitted, wanted = seen[~is_held_out][:, columns].double(), exact[~is_held_out][:, columns].double()
            hessian = fitted.T @ fitted
            energy = hessian.diagonal().mean()
            if not energy > 0:
                continue
            hessian.div_(energy).diagonal().add_(DAMPING)
            factor = torch.linalg.cholesky(hessian)
            part = weight[:, columns]
            inverse = torch.cholesky_inverse(factor)
            targets = {"gptq": part}
            if activation_bits < 8:  # with more, V is W~ to rounding
                cross = fitted.T @ wanted
                cross.div_(energy).diagonal().add_(DAMPING)
                targets["wiener"] = torch.cholesky_solve(cross @ part.double().T, factor).T.float()
            for kind, target in targets.items():
                found = codes.setdefault(kind, codes["nearest"].clone())
                found[:, columns] = _compensate(target, levels, hessian, inverse)
        target = F.linear(exact[is_held_out], weight)
        squared = {
            kind: float((F.linear(seen[is_held_out], levels.decode(c)) - target).double().square().sum())
            for kind, c in codes.items()
        }
    best = min(squared, key=lambda kind: squared[kind])
    plain = squared["nearest"] or 1.0
    return codes[best], {kind: error / plain for kind, error in squared.items()}


def _compensate(weight: Tensor, levels: Codebook, hessian: Tensor, inverse: Tensor) -> Tensor:
    """GPTQ: codes of weight (out, columns) under H (columns, columns) and its inverse, in blocks of columns."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = torch.linalg.cholesky(inverse[order][:, order], upper=True).float()
    left = weight[:, order].clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    width = weight.shape[1]
    for start in range(0, width, COLUMNS_PER_BLOCK):
        stop = min(start + COLUMNS_PER_BLOCK, width)
        errors = torch.empty(len(weight), stop - start)
        for column in range(start, stop):
            current = left[:, column : column + 1]
            code = levels.encode(current)
            error = (current - levels.decode(code)) / upper[column, column]
            left[:, column + 1 : stop] -= error * upper[column, column + 1 : stop]
            codes[:, order[column]] = code[:, 0]
            errors[:, column - start] = error[:, 0]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes
