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

MAX_HADAMARD_FACTOR = 512
MAX_DCT_FACTOR = 2048
# Additions per element of a fast butterfly; a power of two takes its logarithm, any other order itself.
BUTTERFLY_COST = {12: 5, 20: 7, 28: 9}
PASS_COST = 2  # one pass over a row in cache, in additions
MAX_POWER_FACTOR = 64  # larger powers of two are split: a butterfly takes them as one, matrix products as small ones
# As matrix products (torch, one core, widths 1152 to 4608) one pass costs as much as about 96 multiply-adds per
# element: 12 x 96 is several times as fast as 12 x 12 x 8.
PRODUCT_PASS_COST = 96
# With more than two threads the bits of a product whose width is not a multiple of this depend on their number.
EVEN_WIDTH = 16

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
def has_hadamard_order(order: int) -> bool:
    """Tell whether `hadamard_matrix(order)` exists."""
    if not is_whole(order) or order < 1:
        return False
    if order <= 2:
        return True
    if order % 4:
        return False
    return order in _CIRCULANTS or _paley_field(order) > 0 or has_hadamard_order(order // 2)


@functools.cache
def kronecker_factors(in_features: int) -> tuple[int, ...]:
    """Split a width into the orders of the small matrices whose Kronecker product is the `hadamard` rotation.

    A positive factor is the order of a Hadamard matrix, a negative factor -m an orthonormal DCT-II of order m.
    Hadamard factors alone are taken where they exist, at the least cost of fast butterflies: 1152 = 12·12·8, 4608 =
    12·12·32. (Matrix products prefer fewer and larger factors and may merge adjacent ones.) Elsewhere the largest
    divisor that has them is joined with one DCT factor for the rest, so that every output still mixes every input. If
    the rest is above MAX_DCT_FACTOR, the product of the factors is k < in_features, the nearest multiple of 64 below
    with Hadamard factors: the rotation is then two overlapping ones, of the first k and the last k channels (less even
    than a full one: 4-bit error about that of the outlier rotation).

    Args:
        in_features: the width, at least 1.

    Returns:
        The factors, outermost first. Deterministic: it depends on in_features alone. Empty for width 1.

    Raises:
        RotationError: if in_features is not a positive integer.
    """
    check_width("kronecker_factors", in_features)
    for hadamard_part in reversed(divisors(in_features)):
        rest, factors = in_features // hadamard_part, _cheapest_hadamard_factors(hadamard_part)
        if factors is not None and rest <= MAX_DCT_FACTOR:
            return factors if rest == 1 else (-rest, *factors)
    width = (in_features - 1) // 64 * 64
    while (factors := _cheapest_hadamard_factors(width)) is None:
        width -= 64
    return factors


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
def merge_factors(factors: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Adjacent factors joined into the groups whose matrix products, one after the other, cost the least."""
    if len(factors) < 2:
        return (factors,) if factors else ()

    def cost(groups: tuple[tuple[int, ...], ...]) -> int:
        orders = [math.prod(map(abs, group)) for group in groups]
        return sum(orders) + PRODUCT_PASS_COST * len(orders) + EVEN_WIDTH * (orders[-1] % EVEN_WIDTH != 0)

    return min(((factors[:size], *merge_factors(factors[size:])) for size in range(1, len(factors) + 1)), key=cost)


@functools.cache
def _hadamard(order: int) -> np.ndarray:
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order in _CIRCULANTS:
        return _goethals_seidel(_CIRCULANTS[order], order // 4)
    size = _paley_field(order) if order > 4 and order & (order - 1) else 0
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
    prime = _prime_factors(size)[0]
    degree = len(_prime_factors(size))
    for low in range(1, size):
        # The monic polynomial whose lower digits are those of low is primitive if x takes size - 1 distinct powers.
        reduction = [-(low // prime**place) % prime for place in range(degree)]
        element, character = [1] + [0] * (degree - 1), np.zeros(size, np.int8)
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


def _paley_field(order: int) -> int:
    """The prime power whose Paley construction gives this order, 0 if there is none."""
    for size, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if size > 2 and size % 4 == residue and len(set(_prime_factors(size))) == 1:
            return size
    return 0


def _prime_factors(number: int) -> list[int]:
    primes, candidate = [], 2
    while candidate * candidate <= number:
        while number % candidate == 0:
            primes.append(candidate)
            number //= candidate
        candidate += 1
    return [*primes, number] if number > 1 else primes


def divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted(set(small) | {number // divisor for divisor in small})


@functools.cache
def _cheapest_hadamard_factors(width: int) -> tuple[int, ...] | None:
    """The Hadamard orders with product width at the least cost; the one with the most factors of two is innermost."""
    if width == 1:
        return ()
    options = []
    for order in divisors(width)[1:]:
        is_split = order > MAX_POWER_FACTOR and order & (order - 1) == 0
        if order <= MAX_HADAMARD_FACTOR and has_hadamard_order(order) and not is_split:
            rest = _cheapest_hadamard_factors(width // order)
            if rest is not None:
                options.append(tuple(sorted((order, *rest), key=lambda o: (o & -o, -o))))
    return min(options, key=_pass_cost, default=None)


def _pass_cost(orders: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return sum(_butterfly_cost(order) + PASS_COST for order in orders), orders


def _butterfly_cost(order: int) -> int:
    return order.bit_length() - 1 if order & (order - 1) == 0 else BUTTERFLY_COST.get(order, order)


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_width(operation: str, in_features: int) -> None:
    if not is_whole(in_features) or in_features < 1:
        raise RotationError(
            f"{operation}: in_features={in_features!r} is not a positive integer; pass the layer's in_features"
        )
