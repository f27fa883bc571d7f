"""The operators of a quantized linear layer: schemas, fake tensors, and the plain-torch reference of every kernel.

========================================  ==============================================================================
``lrqdit::apply_transform``               x -> centred, smoothed and rotated x in float32; also folds a weight
``lrqdit::quantize_tokens``               x -> int8 codes and one step per token (centre, smooth, rotate, clip, round)
``lrqdit::quantized_linear``              int8 codes x packed weights -> output (integer product, scales, bias)
``lrqdit::weight_only_linear``            the transformed x in float32 x packed weights -> output
========================================  ==============================================================================

``quantize_tokens`` is separate so that layers which read the same tensor (q, k and v) quantize it once. The reference
implementations here run on every device; a kernel registers itself for one dispatch key and must agree with them: the
integer part exactly, the rest to float rounding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lrqdit.numerics import tokens as activation
from lrqdit.numerics.packing import unpack
from lrqdit.numerics.principal import outlet
from lrqdit.numerics.rotation import MIN_ROWS, Rotation
from lrqdit.numerics.trellis import find_places, order_by_place

_TRANSFORM = (
    "Tensor x, Tensor? input_offset, Tensor? input_scale, str rotation, int[] factors, "
    "Tensor? block1, Tensor? permutation, Tensor? block2"
)
_WEIGHT = "Tensor packed, Tensor? table, Tensor row_scale, Tensor? bias, int bits, ScalarType out_dtype"
ROWS_PER_CHUNK = 2048
CACHE_BYTES = 5 << 20

LIBRARY = torch.library.Library("lrqdit", "DEF")
LIBRARY.define(f"apply_transform({_TRANSFORM}) -> Tensor")
LIBRARY.define(f"quantize_tokens({_TRANSFORM}, int bits, float clip, str levels='uniform') -> (Tensor, Tensor)")
LIBRARY.define(f"quantized_linear(Tensor codes, Tensor scale, {_WEIGHT}) -> Tensor")
LIBRARY.define(f"weight_only_linear({_TRANSFORM}, {_WEIGHT}) -> Tensor")


def decode_weight(packed: Tensor, table: Tensor | None, in_features: int, out_features: int, bits: int) -> Tensor:
    """Packed codes -> the int8 weights that are multiplied, (out_features, in_features).

    ``table`` is int8 (1 or out_features, 2**bits); None stands for 8-bit codes, whose value is code - 128. A table
    twice as long belongs to a trellis (:mod:`lrqdit.numerics.trellis`).
    """
    if table is not None and table.shape[0] == 1:
        return _decode_pairs(packed, table[0], bits)[:out_features, :in_features].contiguous()
    codes = unpack(packed, out_features, in_features, bits)
    if table is None:
        return (codes ^ 128).view(torch.int8)  # code - 128
    return torch.cat(
        [
            t.gather(1, chunk.long())
            for t, chunk in zip(table.split(ROWS_PER_CHUNK), codes.split(ROWS_PER_CHUNK), strict=True)
        ]
    )


def has_trellis(table: Tensor | None, bits: int) -> bool:
    """Whether a layer's table is that of a trellis: twice as many levels as its codes can name."""
    return table is not None and table.shape[1] == 2 << bits


def _decode_pairs(packed: Tensor, table: Tensor, bits: int) -> Tensor:
    """Codes of one table for all -> int8 weights of whole tiles, several times as fast as code by code.

    Two neighbouring inputs' places in the table, a byte each, are an index into all pairs of levels.
    """
    out_tiles, in_tiles, _ = packed.shape
    is_trellis = has_trellis(table[None], bits)
    levels = (order_by_place(table, bits) if is_trellis else table).short()
    pairs = torch.nn.functional.pad((levels & 255) | (levels[:, None] << 8), (0, 256 - len(levels))).view(1, -1)
    weight = torch.empty(out_tiles, 128 * in_tiles, dtype=torch.int16, device=packed.device)
    tiles = max(8, -(-out_tiles // -(-2 * weight.nbytes // CACHE_BYTES)))  # an index takes four times as much
    for start in range(0, out_tiles, tiles):
        part = weight[start : start + tiles]
        places = find_places(packed, start, start + len(part), bits, is_trellis)
        index = places.view(torch.uint16).view(part.shape).long()
        torch.gather(pairs.expand(len(part), -1), 1, index, out=part)
    return weight.view(torch.int8).view(16 * out_tiles, 16 * in_tiles)


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact a b^T of int8 (m, k) and (n, k) -> int32 (m, n), on any device."""
    if a.device.type == "cpu" and a.shape[1] > 1:  # of one column _int_mm reads b with wrong strides (torch 2.13)
        return torch._int_mm(a, b.t())
    return float_integer_matmul(a, b)


def float_integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """:func:`integer_matmul` by float products: |a b| <= 2^14, so 1024 of them stay within the 24 bits of a float32."""
    parts = (x.float() @ y.float().t() for x, y in zip(a.split(1024, dim=1), b.split(1024, dim=1), strict=True))
    return sum((part.int() for part in parts), torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device))


def parts_in_cache(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equally many rows in parts of :func:`rows_in_cache`."""
    rows = rows_in_cache(width, tensors[0])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def rows_in_cache(width: int, tensor: Tensor) -> int:
    """How many rows of a tensor a processor's cache keeps through several passes, as float32 of this width: the tensor
    in equal parts; on a GPU all at once."""
    parts = -(-4 * width * len(tensor) // CACHE_BYTES) if tensor.device.type == "cpu" else 1
    return MIN_ROWS * max(1, -(-len(tensor) // (MIN_ROWS * max(1, parts))))


def _transform(
    width, input_offset, input_scale, rotation, factors, block1, permutation, block2
) -> activation.InputTransform:
    parts = Rotation(rotation, width, tuple(factors), None, block1, block2, permutation)
    return activation.InputTransform(parts, input_offset, input_scale)


def reference_apply_transform(x, input_offset, input_scale, rotation, factors, block1, permutation, block2) -> Tensor:
    width, out = x.shape[-1], torch.empty(x.shape, dtype=torch.float32, device=x.device)
    transform = _transform(width, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    work = torch.empty(2, min(len(x), rows_in_cache(width, x)), width, device=x.device)
    for tokens, to in parts_in_cache(width, x, out):
        to.copy_(transform.apply(tokens, work[:, : len(tokens)]))
    return out


def reference_quantize_tokens(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2, bits, clip, levels="uniform"
) -> tuple[Tensor, Tensor]:
    width, codes = x.shape[-1], torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    transform = _transform(width, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    work = torch.empty(2, min(len(x), rows_in_cache(width, x)), width, device=x.device)
    for tokens, *to in parts_in_cache(width, x, codes, scale):
        activation.quantize_into(*to, transform.apply(tokens, work[:, : len(tokens)]), bits, clip, levels)
    return codes, scale


def reference_quantized_linear(codes, scale, packed, table, row_scale, bias, bits, out_dtype) -> Tensor:
    weight = decode_weight(packed, table, codes.shape[1], row_scale.shape[0], bits)
    sums = integer_matmul(codes, weight)
    out = torch.empty(sums.shape, dtype=out_dtype, device=sums.device)
    # the products lie where their sums were: as few bytes as possible go through the cache
    for part, y, step, to in parts_in_cache(len(weight), sums, sums.view(torch.float32), scale, out):
        y.copy_(part).mul_(row_scale).mul_(step[:, None])
        to.copy_(y if bias is None else y.add_(bias))
    return out


def reference_weight_only_linear(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2,
    packed, table, row_scale, bias, bits, out_dtype,
) -> Tensor:  # fmt: skip
    x = reference_apply_transform(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    weight = decode_weight(packed, table, x.shape[1], row_scale.shape[0], bits)
    y = torch.nn.functional.linear(x, weight.float()).mul_(row_scale)
    return (y if bias is None else y.add_(bias)).to(out_dtype)


REFERENCE = {
    "apply_transform": reference_apply_transform,
    "quantize_tokens": reference_quantize_tokens,
    "quantized_linear": reference_quantized_linear,
    "weight_only_linear": reference_weight_only_linear,
}
for _name, _function in REFERENCE.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("lrqdit::apply_transform", lib=LIBRARY)
def _(x, input_offset, input_scale, rotation, factors, block1, permutation, block2):
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("lrqdit::quantize_tokens", lib=LIBRARY)
def _(x, input_offset, input_scale, rotation, factors, block1, permutation, block2, bits, clip, levels="uniform"):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.register_fake("lrqdit::quantized_linear", lib=LIBRARY)
def _(codes, scale, packed, table, row_scale, bias, bits, out_dtype):
    return codes.new_empty(codes.shape[0], row_scale.shape[0], dtype=out_dtype)


@torch.library.register_fake("lrqdit::weight_only_linear", lib=LIBRARY)
def _(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2,
    packed, table, row_scale, bias, bits, out_dtype,
):  # fmt: skip
    return x.new_empty(x.shape[0], row_scale.shape[0], dtype=out_dtype)


apply_transform = torch.ops.lrqdit.apply_transform.default
quantize_tokens = torch.ops.lrqdit.quantize_tokens.default
quantized_linear = torch.ops.lrqdit.quantized_linear.default
weight_only_linear = torch.ops.lrqdit.weight_only_linear.default


def fold(transform: activation.InputTransform, weight: Tensor) -> Tensor:
    """:meth:`InputTransform.fold` by the kernel of the weight's device: W~ = (W / m) R, float32.

    A kernel's additions have another order than the reference's matrix products: W~ agrees to float rounding.
    """
    r, scale = transform.rotation, transform.input_scale
    if transform.principal is not None:
        c = outlet(transform.unsmooth(weight), transform.principal)
        part = c.T @ transform.principal.values
        weight = weight - (part if scale is None else part * scale.float())
    if scale is not None and not bool((scale.abs() == 1).all()):  # signs are their own inverse; others have none
        weight, scale = weight / scale.float(), None
    if r.kind == "none" and scale is None:
        return weight.float()
    return apply_transform(weight, None, scale, r.kind, r.factors, r.block1, r.permutation, r.block2)
