"""Shapes in plain integers: how a width is split into small orthogonal matrices, how a weight is cut into tiles.

Nothing here imports torch, so that a checkpoint can be described from its headers alone.
"""

import functools
import math

from lrqdit.config import WEIGHT_BITS
from lrqdit.errors import ConfigError, RotationError

MAX_HADAMARD_FACTOR = 512
MAX_DCT_FACTOR = 2048
CIRCULANT_ORDERS = (92, 116, 156, 172)  # Hadamard matrices made of four circulants
# Additions per element of a fast butterfly; a power of two takes its logarithm, any other order itself.
BUTTERFLY_COST = {12: 5, 20: 7, 28: 9}
PASS_COST = 2  # one pass over a row in cache, in additions
MAX_POWER_FACTOR = 64  # larger powers of two are split: a butterfly takes them as one, matrix products as small ones
# As matrix products (torch, one core, widths 1152 to 4608) one pass costs as much as about 96 multiply-adds per
# element: 12 x 96 is several times as fast as 12 x 12 x 8.
PRODUCT_PASS_COST = 96
# With more than two threads the bits of a product whose width is not a multiple of this depend on their number.
EVEN_WIDTH = 16


@functools.cache
def has_hadamard_order(order: int) -> bool:
    """Tell whether `hadamard_matrix(order)` exists."""
    if not is_whole(order) or order < 1:
        return False
    if order <= 2:
        return True
    if order % 4:
        return False
    return order in CIRCULANT_ORDERS or paley_field(order) > 0 or has_hadamard_order(order // 2)


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
def merge_factors(factors: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Adjacent factors joined into the groups whose matrix products, one after the other, cost the least."""
    if len(factors) < 2:
        return (factors,) if factors else ()

    def cost(groups: tuple[tuple[int, ...], ...]) -> int:
        orders = [math.prod(map(abs, group)) for group in groups]
        return sum(orders) + PRODUCT_PASS_COST * len(orders) + EVEN_WIDTH * (orders[-1] % EVEN_WIDTH != 0)

    return min(((factors[:size], *merge_factors(factors[size:])) for size in range(1, len(factors) + 1)), key=cost)


def paley_field(order: int) -> int:
    """The prime power whose Paley construction gives this order, 0 if there is none."""
    for size, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if size > 2 and size % 4 == residue and len(set(prime_factors(size))) == 1:
            return size
    return 0


def prime_factors(number: int) -> list[int]:
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


TILE = 16


def packed_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed uint8 tensor: (output tiles, input tiles, bytes per tile)."""
    check_bits(bits)
    return -(-out_features // TILE), -(-in_features // TILE), 32 * bits


def check_bits(bits: int) -> None:
    if bits not in WEIGHT_BITS:
        raise ConfigError(f"packing: bits={bits!r} is not supported; use one of {WEIGHT_BITS}")


ROTATION_KINDS = ("none", "hadamard", "block_hadamard", "outlier")
MAX_BLOCK = 128  # of a block rotation


def check_factors(kind: str, in_features: int, factors: tuple[int, ...]) -> None:
    """Raise :class:`RotationError` unless the factors make a rotation of this kind and width."""
    is_valid = kind in ROTATION_KINDS and all(map(is_whole, factors)) and 0 not in factors
    covered = math.prod(map(abs, factors)) if is_valid else 0
    if kind == "hadamard":
        is_valid = is_valid and (covered == in_features or covered < in_features <= 2 * covered)
        is_valid = is_valid and all(-MAX_DCT_FACTOR <= factor <= MAX_HADAMARD_FACTOR for factor in factors)
        is_valid = is_valid and all(factor < -1 or has_hadamard_order(factor) for factor in factors)
    elif kind == "none":
        is_valid = factors == ()
    else:
        is_valid = is_valid and len(factors) == 1 and 0 < factors[0] <= MAX_BLOCK and in_features % covered == 0
        is_valid = is_valid and (kind == "outlier" or has_hadamard_order(covered))
    if not is_valid:
        raise RotationError(
            f"factors={factors} do not make a {kind!r} rotation of in_features={in_features}; "
            "pass those that build chose for this width"
        )
