"""Triton kernel of the input side: centre, smooth, rotate, clip, absmax and round to int8, a token at a time.

A token is read once into registers as a box of a x b x c channels, each axis padded to a power of two, and multiplied
by one small matrix per rotated axis on the tensor cores. A product with a Hadamard matrix is exact to about 2^-22 of
the token's largest entry: the token is divided by a power of two, its float32 entries are split into two float16 ones,
and the matrix has entries +1 and -1 (its norm is applied once, at the end). Dense matrices (DCT, R1 and R2) are
split, too.

R1 P R2 takes two trips through memory. What does not fit (overlapping rotations, a factor above 128, tokens above
32768 channels) is rotated by torch and only rounded here, see :func:`plan_rotation`.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lrqdit.kernels import ops
from lrqdit.kernels.ops import Rounding, TransformArgs
from lrqdit.numerics import tokens as activation
from lrqdit.numerics.hadamard import factor_matrix
from lrqdit.numerics.shapes import has_hadamard_order

CPU = torch.device("cpu")
LARGEST_AXIS = 128
LARGEST_TOKEN = 32768
SMALLEST_DOT = 16
# A rotated axis costs its padded length in products and about this many in moving the token between layouts.
AXIS_COST = 64
PROGRAMS_PER_PROCESSOR = 8
SIGNS, DENSE = 1, 2  # kinds of a rotated axis' matrix; 0: not rotated


@dataclass(frozen=True)
class Axis:
    """One axis of the box: its length, and the Kronecker factors of its matrix (empty: not rotated)."""

    length: int
    factors: tuple[int, ...] = ()

    @property
    def kind(self) -> int:
        return (DENSE if any(factor < 0 for factor in self.factors) else SIGNS) if self.factors else 0

    @property
    def padded(self) -> int:
        return max(_power_of_two(self.length), SMALLEST_DOT if self.factors else 1)


@dataclass(frozen=True)
class Matrix:
    """What multiplies the box along an axis: float32 (length, length), its kind, and the norm still to be applied."""

    values: Tensor | None = None
    kind: int = 0
    norm: float = 1.0


NO_MATRIX = Matrix()
_too_large: set[tuple] = set()  # (device, box) that its shared memory cannot hold


@functools.cache
def plan_rotation(rotation: str, factors: tuple[int, ...], in_features: int) -> tuple[Axis, Axis, Axis] | None:
    """The box of a token, outermost axis first, or None if the kernel does not cover this rotation.

    Args:
        rotation, factors: as in a layer's format.
        in_features: K.
    """
    if rotation == "none":
        plans = [(Axis(1), Axis(1), Axis(in_features))]
    elif rotation == "hadamard":
        if math.prod(map(abs, factors)) != in_features:
            return None
        plans = [
            (axes[0] if len(axes) > 1 else Axis(1), axes[1] if len(axes) > 2 else Axis(1), axes[-1])
            for axes in _partitions(_split_factors(factors), 3)
        ]
    else:
        plans = [(Axis(in_features // factors[0]), Axis(1), Axis(factors[0], factors))]
    plans = [plan for plan in plans if _is_covered(plan)]
    return min(plans, key=_cost, default=None)


def transform_tokens(x: Tensor, transform: TransformArgs) -> Tensor:
    """x (tokens, K), any float dtype -> the transformed x float32 (tokens, K)."""
    return _run(x, transform, None)[0]


def quantize_tokens(x: Tensor, transform: TransformArgs, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """``lrqdit::quantize_tokens``: codes int8 (tokens, K), steps float32 (tokens,)."""
    codes, steps = _run(x, transform, rounding)
    assert steps is not None
    return codes, steps


def _run(x: Tensor, transform: TransformArgs, rounding: Rounding | None) -> tuple[Tensor, Tensor | None]:
    """Codes and steps; without a rounding the transformed x, and None."""
    axes = plan_rotation(transform.rotation, tuple(transform.factors), x.shape[1])
    if axes is not None and (x.device, axes) not in _too_large:
        try:
            if transform.rotation != "outlier":
                matrices = tuple(_axis_matrix(axis, x.device) for axis in axes)
                return _launch(x, transform, axes, matrices, rounding)
            blocks = transform.block1, transform.block2
            first, second = ((NO_MATRIX, NO_MATRIX, Matrix(block, DENSE)) for block in blocks)
            rotated, _ = _launch(x, transform._replace(permutation=None), axes, first, None)
            return _launch(rotated, TransformArgs(permutation=transform.permutation), axes, second, rounding)
        except OutOfResources:
            _too_large.add((x.device, axes))
    x = ops.reference_apply_transform(x, transform)
    if rounding is None:
        return x, None
    if (axes := plan_rotation("none", (), x.shape[1])) is None:
        return activation.quantize_tokens(x.contiguous(), *rounding)
    return _launch(x, TransformArgs(), axes, (NO_MATRIX,) * 3, rounding)


def _launch(
    x: Tensor, transform: TransformArgs, axes: tuple[Axis, Axis, Axis], matrices: tuple[Matrix, Matrix, Matrix],
    rounding: Rounding | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One trip through memory: the transform's permutation, offset and scale, the axes' matrices, the rounding."""
    tokens, in_features = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(tokens, in_features, dtype=torch.float32 if rounding is None else torch.int8, device=x.device)
    steps = None if rounding is None else torch.empty(tokens, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, steps if steps is None else steps.zero_()
    clip, is_normal, largest = 1.0, False, 0
    if rounding is not None:
        clip, is_normal = rounding.clip, rounding.levels == "normal"
        largest = 127 if is_normal else 2 ** (rounding.bits - 1) - 1
    pads = _padded_box(axes)
    _tokens_kernel[(min(tokens, _processors(x.device) * PROGRAMS_PER_PROCESSOR),)](
        x, transform.input_offset, transform.input_scale, transform.permutation,
        *(matrix.values for matrix in matrices), out, steps,
        tokens, x.stride(0), math.prod(matrix.norm for matrix in matrices), clip / max(1, largest),
        *(axis.length for axis in axes), *pads, *(matrix.kind for matrix in matrices), largest, is_normal,
        num_warps=min(_most_warps(x.device), max(4, math.prod(pads) // 1024)), num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out, steps


def _padded_box(axes: tuple[Axis, Axis, Axis]) -> tuple[int, int, int]:
    """Padded lengths; a product along the innermost axis needs at least SMALLEST_DOT rows."""
    a, b, c = (axis.padded for axis in axes)
    return (max(a, SMALLEST_DOT // b) if axes[2].factors else a), b, c


def _is_covered(axes: tuple[Axis, Axis, Axis]) -> bool:
    return math.prod(_padded_box(axes)) <= LARGEST_TOKEN and all(
        not axis.factors or axis.padded <= LARGEST_AXIS for axis in axes
    )


def _cost(axes: tuple[Axis, Axis, Axis]) -> int:
    return math.prod(_padded_box(axes)) * sum(axis.padded + AXIS_COST for axis in axes if axis.factors)


def _partitions(factors: tuple[int, ...], parts: int) -> list[tuple[Axis, ...]]:
    """Every way to merge adjacent factors into at most this many axes."""
    if not factors:
        return [(Axis(1),)]
    whole = [(Axis(math.prod(map(abs, factors)), factors),)]
    if parts == 1:
        return whole
    heads = ((factors[:cut], factors[cut:]) for cut in range(1, len(factors)))
    return whole + [
        (Axis(math.prod(map(abs, head)), head), *rest) for head, tail in heads for rest in _partitions(tail, parts - 1)
    ]


def _split_factors(factors: tuple[int, ...]) -> tuple[int, ...]:
    """Factors whose matrix is a doubling (Sylvester), as 2 and the rest: the same product, more ways to cut it."""
    return tuple(part for factor in factors for part in _split_doublings(factor))


@functools.cache
def _split_doublings(factor: int) -> tuple[int, ...]:
    if factor < 4 or factor % 2 or not has_hadamard_order(factor // 2):
        return (factor,)
    doubled = torch.kron(factor_matrix(2, CPU), factor_matrix(factor // 2, CPU))
    if not torch.allclose(doubled, factor_matrix(factor, CPU)):
        return (factor,)
    return 2, *_split_doublings(factor // 2)


@functools.cache
def _axis_matrix(axis: Axis, device: torch.device) -> Matrix:
    if not axis.factors:
        return NO_MATRIX
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        values = functools.reduce(torch.kron, (factor_matrix(factor, device) for factor in axis.factors))
        if axis.kind == DENSE:
            return Matrix(values.contiguous(), DENSE)
        return Matrix(values.sign().contiguous(), SIGNS, axis.length**-0.5)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _most_warps(device: torch.device) -> int:
    """The compiler spills registers with 16 warps before Hopper."""
    return 16 if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0) else 8


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@triton.jit
def _load_matrix(values, SIZE: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr):
    """float32 (PAD, PAD), zero beyond SIZE."""
    i, j = tl.arange(0, PAD)[:, None], tl.arange(0, PAD)[None, :]
    offsets = j * SIZE + i if TRANSPOSED else i * SIZE + j
    return tl.load(values + offsets, mask=(i < SIZE) & (j < SIZE), other=0.0)


@triton.jit
def _split(x):
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _dot(x, matrix, KIND: tl.constexpr):
    """x matrix, float32, by float16 products of the parts."""
    x_high, x_low = _split(x)
    matrix_high, matrix_low = _split(matrix)
    product = tl.dot(x_low, matrix_high)
    if KIND == 2:
        product = tl.dot(x_high, matrix_low, product)
    return tl.dot(x_high, matrix_high, product)


@triton.jit
def _dot_left(matrix, x, KIND: tl.constexpr):
    x_high, x_low = _split(x)
    matrix_high, matrix_low = _split(matrix)
    product = tl.dot(matrix_high, x_low)
    if KIND == 2:
        product = tl.dot(matrix_low, x_high, product)
    return tl.dot(matrix_high, x_high, product)


@triton.jit
def _absmax(x):
    """Largest |x| by the order of its bits, in which NaN is above Inf."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.max(bits, 1), 0).to(tl.float32, bitcast=True)


@triton.jit
def _normal_level(code):
    """activation.normal_lookup: the nearest of NORMAL_LEVELS, 6, 18, 31, 44, 58, 75, 96 and 127 of either sign."""
    size = 2 * tl.abs(code)
    level = 6 + 12 * (size >= 24).to(tl.int32) + 13 * (size >= 49).to(tl.int32) + 13 * (size >= 75).to(tl.int32)
    level += 14 * (size >= 102).to(tl.int32) + 17 * (size >= 133).to(tl.int32)
    level += 21 * (size >= 171).to(tl.int32) + 31 * (size >= 223).to(tl.int32)
    return tl.where(code < 0, -level, level)


@triton.jit
def _tokens_kernel(
    x, offset, scale, permutation, matrix_a, matrix_b, matrix_c, out, steps, tokens, row_stride, norm, clip_ratio,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    PAD_A: tl.constexpr, PAD_B: tl.constexpr, PAD_C: tl.constexpr,
    KIND_A: tl.constexpr, KIND_B: tl.constexpr, KIND_C: tl.constexpr,
    LARGEST: tl.constexpr, HAS_NORMAL_LEVELS: tl.constexpr,
):  # fmt: skip
    IS_ROTATED: tl.constexpr = KIND_A + KIND_B + KIND_C > 0
    row, c = tl.arange(0, PAD_A * PAD_B)[:, None], tl.arange(0, PAD_C)[None, :]
    a, b = row // PAD_B, row % PAD_B
    channel = (a * B + b) * C + c
    mask = (a < A) & (b < B) & (c < C)
    if KIND_A:
        left = _load_matrix(matrix_a, A, PAD_A, True)
    if KIND_B:
        middle = _load_matrix(matrix_b, B, PAD_B, False)
    if KIND_C:
        right = _load_matrix(matrix_c, C, PAD_C, False)
    source = channel
    if permutation is not None:
        source = tl.load(permutation + channel, mask=mask, other=0)
    first, programs = tl.program_id(0), tl.num_programs(0)
    for trip in range(0, tl.cdiv(tokens - first, programs)):
        token = first + trip * programs
        start = token.to(tl.int64)
        value = tl.load(x + start * row_stride + source, mask=mask, other=0.0).to(tl.float32)
        if offset is not None:
            value -= tl.load(offset + channel, mask=mask, other=0.0).to(tl.float32)
        if scale is not None:
            value *= tl.load(scale + channel, mask=mask, other=0.0).to(tl.float32)
        if IS_ROTATED:
            # 2^e <= absmax < 2^(e+1) by the exponent's bits; Inf and NaN stay and become NaN in the split
            exponent = _absmax(value).to(tl.int32, bitcast=True) & 0x7F800000
            exponent = tl.where(exponent == 0x7F800000, 0x3F800000, tl.minimum(exponent, 0x7E000000))
            power = tl.maximum(exponent, 0x00800000).to(tl.float32, bitcast=True)
            value *= tl.div_rn(1.0, power)
            if KIND_C:
                value = _dot(value, right, KIND_C)
            if KIND_B:
                value = tl.permute(tl.reshape(value, (PAD_A, PAD_B, PAD_C)), (0, 2, 1))
                value = _dot(tl.reshape(value, (PAD_A * PAD_C, PAD_B)), middle, KIND_B)
            if KIND_A:
                value = _dot_left(left, tl.reshape(value, (PAD_A, PAD_B * PAD_C)), KIND_A)
            if KIND_B:
                value = tl.permute(tl.reshape(value, (PAD_A, PAD_C, PAD_B)), (0, 2, 1))
            value = tl.reshape(value, (PAD_A * PAD_B, PAD_C)) * (norm * power)
        if LARGEST > 0:
            step = _absmax(value) * clip_ratio
            is_normal = step > 1.1754943508222875e-38
            inverse = tl.where(is_normal, tl.div_rn(1.0, tl.where(is_normal, step, 1.0)), 0.0)
            code = value * inverse
            code = tl.minimum(tl.maximum(code, -LARGEST - 1.0), LARGEST + 0.0)
            # adding 1.5 * 2^23 rounds to the nearest whole number, ties to even, and leaves it in the low bits
            code = (code + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
            if HAS_NORMAL_LEVELS:
                code = _normal_level(code.to(tl.int32)).to(tl.int8)
            tl.store(out + start * (A * B * C) + channel, code, mask=mask)
            tl.store(steps + token, step)
        else:
            tl.store(out + start * (A * B * C) + channel, value, mask=mask)
