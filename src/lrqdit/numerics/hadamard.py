"""Hadamard matrices, and how a width is split into small ones.

Sylvester's doubling, Paley's two constructions over GF(q) for every prime power q (1933), and four circulants in the
Goethals-Seidel array (1967) for 92, 116, 156 and 172. Every multiple of 4 below 188 is reached.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from lrqdit.errors import RotationError
from lrqdit.numerics.shapes import has_hadamard_order, paley_field, prime_factors

# First rows of four circulants, most significant bit first, 1 for +1 and 0 for -1. Their power spectra add up to the
# order at every frequency; those of 92, 116 and 172 are symmetric (Williamson matrices). Found by search.
_CIRCULANTS = {
    92: (0x4AFFD4, 0x4D5EAC, 0x719E63, 0x49C0E4),
    116: (0x12C7FE34, 0x1589F91A, 0x1DBC63DB, 0x150D9B0A),
    156: (0x4DB0B2F833, 0x68EA67D833, 0x445C0E75A4, 0x40810A56BA),
    172: (0x467AECDD798, 0x63D260192F1, 0x7595E85EA6B, 0x6FC29B650FD),
}


def hadamard_matrix(order: int) -> Tensor:
    """Return a Hadamard matrix H, entries +1 and -1, H Hᵀ = order · I.

    Sylvester's doubling for powers of two, Paley's constructions (Paley 1933) for q + 1 (q = 3 mod 4) and 2 (q + 1)
    (q = 1 mod 4) with q a prime power, the Goethals-Seidel array for 92, 116, 156 and 172, and doublings of these.

    Args:
        order: the order of the matrix.

    Returns:
        int8 (order, order), a fresh copy.

    Raises:
        RotationError: if none of the constructions gives this order.
    """
    if not has_hadamard_order(order):
        raise RotationError(
            f"hadamard_matrix: order={order!r} has no construction here; an order must be 1, 2 or a multiple of 4 that "
            "Paley, Goethals-Seidel or doubling reaches; use kronecker_factors(in_features) to split a width"
        )
    return torch.from_numpy(_hadamard(order).copy())


@functools.cache
def factor_matrix(factor: int, device: torch.device) -> Tensor:
    """Orthogonal float32 matrix of a factor: Hadamard / sqrt(order), or a DCT-II whose first output is the mean."""
    if factor > 0:
        matrix = _hadamard(factor) / math.sqrt(factor)
    else:
        order = -factor
        matrix = np.cos(np.pi / order * (np.arange(order)[:, None] + 0.5) * np.arange(order)) * math.sqrt(2 / order)
        matrix[:, 0] = math.sqrt(1 / order)
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        return torch.from_numpy(matrix.astype(np.float32)).to(device)


@functools.cache
def kronecker_matrix(factors: tuple[int, ...], device: torch.device) -> Tensor:
    """The Kronecker product of the factors' matrices, orthogonal float32."""
    with torch.inference_mode(False):
        return functools.reduce(torch.kron, [factor_matrix(factor, device) for factor in factors])


@functools.cache
def _hadamard(order: int) -> np.ndarray:
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order in _CIRCULANTS:
        return _goethals_seidel(_CIRCULANTS[order], order // 4)
    size = paley_field(order) if order > 4 and order & (order - 1) else 0
    if not size:
        return np.kron(np.array([[1, 1], [1, -1]], np.int8), _hadamard(order // 2))
    # Bordered Jacobsthal matrix: S Sᵀ = size · I, antisymmetric for size = 3 mod 4 and symmetric for 1 mod 4.
    bordered = np.zeros((size + 1, size + 1), np.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = 1 if size % 4 == 1 else -1
    bordered[1:, 1:] = _jacobsthal(size)
    identity = np.eye(size + 1, dtype=np.int8)
    if size % 4 == 3:
        return bordered + identity
    outer, inner = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(bordered, outer) + np.kron(identity, inner)


def _goethals_seidel(first_rows: tuple[int, ...], size: int) -> np.ndarray:
    place = np.arange(size)
    shift = (place - place[:, None]) % size
    a, b, c, d = (
        np.array([1 if row >> (size - 1 - i) & 1 else -1 for i in range(size)], np.int8)[shift] for row in first_rows
    )
    (b, b_back), (c, c_back), (d, d_back) = ((m[:, ::-1], m.T[:, ::-1]) for m in (b, c, d))
    return np.block([[a, b, c, d], [-b, a, d_back, -c_back], [-c, -d_back, a, b_back], [-d, c_back, -b_back, a]])


def _jacobsthal(size: int) -> np.ndarray:
    """Q_ij = χ(a_i - a_j) over GF(size), χ the quadratic character: +1 for even powers of a primitive element."""
    prime = prime_factors(size)[0]
    degree, character = len(prime_factors(size)), np.zeros(size, np.int8)
    for low in range(1, size):
        # The monic polynomial whose lower digits are those of low is primitive if x takes size - 1 distinct powers.
        reduction = [-(low // prime**place) % prime for place in range(degree)]
        element, character[:] = [1] + [0] * (degree - 1), 0
        for power in range(size - 1):
            number = sum(digit * prime**place for place, digit in enumerate(element))
            if number == 0 or character[number]:
                break
            character[number] = 1 - 2 * (power % 2)
            shifted = [0, *element[:-1]]
            element = [(digit + element[-1] * term) % prime for digit, term in zip(shifted, reduction, strict=True)]
        else:
            break
    digits = np.arange(size)[:, None] // prime ** np.arange(degree) % prime
    difference = (digits[:, None] - digits[None]) % prime
    return character[difference @ prime ** np.arange(degree)]
