"""The operators of a quantized linear layer: schemas, fake tensors, and the plain-torch reference of every kernel.

========================================  ==============================================================================
``lrqdit::apply_transform``               x -> centred, smoothed and rotated x in float32; also folds a weight
``lrqdit::quantize_tokens``               x -> int8 codes and one step per token (centre, smooth, rotate, clip, round)
``lrqdit::quantized_linear``              int8 codes x packed weights -> output (integer product, scales, bias)
``lrqdit::weight_only_linear``            the transformed x in float32 x packed weights -> output
``lrqdit::layer_tokens``                  x -> codes and steps, of the layer that a handle stands for
``lrqdit::layer_product``                 these x the layer's weights -> output
``lrqdit::layer_linear``                  x -> output, all of a layer
========================================  ==============================================================================

``quantize_tokens`` is separate so that layers which read the same tensor (q, k and v) quantize it once. The reference
implementations here run on every device; a kernel registers itself for one dispatch key and must agree with them: the
integer part exactly, the rest to float rounding.

The last three are for compilers. A compiled graph is made for the shapes and constants of the layers in it; with mixed
bits nearly every block of a model would have a graph of its own. A handle, a number in a tensor, hides all that
differs, so that blocks share one.

An operator's schema is flat, as torch wants it. Everything in Python passes its arguments as the records below, each a
tuple in the order of the schemas, so that a call unpacks them by ``*``; :func:`register` puts them together again.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrqdit.numerics.packing import unpack
from lrqdit.numerics.principal import LowRank, outlet
from lrqdit.numerics.rotation import MIN_ROWS, Rotation
from lrqdit.numerics.shapes import TILE
from lrqdit.numerics.tokens import InputTransform
from lrqdit.numerics.tokens import quantize_tokens as round_tokens
from lrqdit.numerics.trellis import level_index

_TRANSFORM = (
    "Tensor x, Tensor? input_offset, Tensor? input_scale, str rotation, int[] factors, "
    "Tensor? block1, Tensor? permutation, Tensor? block2"
)
_WEIGHT = "Tensor packed, Tensor? table, Tensor row_scale, Tensor? bias, int bits, ScalarType out_dtype"
CHUNK_ELEMENTS = 1 << 20  # that the reference computes at once: 4 MiB of float32, 8 MiB of indices

LIBRARY = torch.library.Library("lrqdit", "DEF")
LIBRARY.define(f"apply_transform({_TRANSFORM}) -> Tensor")
LIBRARY.define(f"quantize_tokens({_TRANSFORM}, int bits, float clip, str levels='uniform') -> (Tensor, Tensor)")
LIBRARY.define(f"quantized_linear(Tensor codes, Tensor scale, {_WEIGHT}) -> Tensor")
LIBRARY.define(f"weight_only_linear({_TRANSFORM}, {_WEIGHT}) -> Tensor")
LIBRARY.define("layer_tokens(Tensor x, Tensor handle) -> (Tensor, Tensor)")
LIBRARY.define("layer_product(Tensor codes, Tensor scale, Tensor handle, int out_features, ScalarType dtype) -> Tensor")
LIBRARY.define("layer_linear(Tensor x, Tensor handle, int out_features, ScalarType dtype) -> Tensor")
apply_transform = torch.ops.lrqdit.apply_transform.default
quantize_tokens = torch.ops.lrqdit.quantize_tokens.default
quantized_linear = torch.ops.lrqdit.quantized_linear.default
weight_only_linear = torch.ops.lrqdit.weight_only_linear.default
layer_tokens = torch.ops.lrqdit.layer_tokens.default
layer_product = torch.ops.lrqdit.layer_product.default
layer_linear = torch.ops.lrqdit.layer_linear.default


class TransformArgs(NamedTuple):
    """An input transform: float16 offset and scale (width,), the rotation's kind, factors, and the parts of R1 P R2."""

    input_offset: Tensor | None = None
    input_scale: Tensor | None = None
    rotation: str = "none"
    factors: Sequence[int] = ()
    block1: Tensor | None = None
    permutation: Tensor | None = None
    block2: Tensor | None = None

    def build_rotation(self, width: int) -> Rotation:
        return Rotation(self.rotation, width, tuple(self.factors), self.block1, self.block2, self.permutation)


class Rounding(NamedTuple):
    """How transformed tokens are rounded, see :func:`lrqdit.numerics.tokens.quantize_tokens`."""

    bits: int
    clip: float
    levels: str = "uniform"


class Tokens(NamedTuple):
    """Rounded tokens: codes int8 (tokens, width), steps float32 (tokens,), and coordinates (tokens, rank) of what of
    them is not rounded, where layers have a principal part (principal.py)."""

    codes: Tensor
    scale: Tensor
    coordinates: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.codes.device


class WeightArgs(NamedTuple):
    """A packed weight: packed uint8 (see packing.py); table int8 (1 or out_features, 2**bits), None for 8-bit codes,
    twice as long for a trellis; row_scale and bias float32 (out_features,)."""

    packed: Tensor
    table: Tensor | None
    row_scale: Tensor
    bias: Tensor | None
    bits: int

    @property
    def out_features(self) -> int:
        return self.row_scale.shape[0]

    @property
    def is_trellis(self) -> bool:
        return self.table is not None and self.table.shape[1] == 2 << self.bits


class LayerArgs(NamedTuple):
    """All that the operators are told of a layer, and its calls of them by torch's dispatcher."""

    transform: TransformArgs
    rounding: Rounding
    weight: WeightArgs

    def quantize_tokens(self, x: Tensor) -> Tokens:
        """x (..., in_features), any float dtype."""
        return Tokens(*quantize_tokens(x.reshape(-1, x.shape[-1]), *self.transform, *self.rounding))

    def quantized_linear(self, tokens: Tokens, out_dtype: torch.dtype) -> Tensor:
        """The output (tokens, out_features), of tokens that :meth:`quantize_tokens` gave."""
        return quantized_linear(tokens.codes, tokens.scale, *self.weight, out_dtype)

    def linear(self, x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tokens]:
        """Both, one after the other: the output, and the tokens that it was computed from."""
        tokens = self.quantize_tokens(x)
        return self.quantized_linear(tokens, out_dtype), tokens

    def weight_only_linear(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        return weight_only_linear(x.reshape(-1, x.shape[-1]), *self.transform, *self.weight, out_dtype)


_RECORDS: dict[str, Callable[[tuple], tuple]] = {
    "apply_transform": lambda args: (args[0], TransformArgs(*args[1:])),
    "quantize_tokens": lambda args: (args[0], TransformArgs(*args[1:8]), Rounding(*args[8:])),
    "quantized_linear": lambda args: (Tokens(*args[:2]), WeightArgs(*args[2:7]), args[7]),
    "weight_only_linear": lambda args: (args[0], TransformArgs(*args[1:8]), WeightArgs(*args[8:13]), args[13]),
}


def take_records(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's implementation, of its flat arguments, from a function of the records."""
    return lambda *args: kernel(*_RECORDS[name](args))


def register(key: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Implement operators, by name, for a dispatch key; the kernels take records."""
    for name, kernel in kernels.items():
        LIBRARY.impl(name, take_records(name, kernel), key)


def decode_weight(weight: WeightArgs, in_features: int) -> Tensor:
    """Packed codes -> the int8 weights that are multiplied, (out_features, in_features)."""
    rows = max(1, CHUNK_ELEMENTS // (TILE * in_features)) * TILE
    stops = range(rows, weight.out_features + rows, rows)
    return torch.cat([_decode_rows(weight, in_features, stop - rows, min(stop, weight.out_features)) for stop in stops])


def _decode_rows(weight: WeightArgs, in_features: int, start: int, stop: int) -> Tensor:
    """Output channels start (a multiple of TILE) to stop - 1."""
    first = max(0, start - TILE) if weight.is_trellis else start  # a path needs codes of the tile before
    packed = weight.packed[first // TILE : -(-stop // TILE)]
    codes = unpack(packed, stop - first, in_features, weight.bits)
    if weight.table is None:
        return (codes ^ 128).view(torch.int8)  # code - 128
    index = level_index(codes)[start - first :] if weight.is_trellis else codes
    return weight.table.expand(weight.out_features, -1)[start:stop].gather(1, index.long())


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact a b^T of int8 (m, k) and (n, k) -> int32 (m, n), on any device."""
    if a.device.type == "cpu" and a.shape[1] > 1:  # of one column _int_mm reads b with wrong strides (torch 2.13)
        return torch._int_mm(a, b.t())
    return float_integer_matmul(a, b)


def float_integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """:func:`integer_matmul` by float products: |a b| <= 2^14, so 1024 of them stay within the 24 bits of a float32."""
    parts = (x.float() @ y.float().t() for x, y in zip(a.split(1024, dim=1), b.split(1024, dim=1), strict=True))
    return sum((part.int() for part in parts), torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device))


def _rows_at_once(width: int) -> int:
    """How many rows of a width the reference transforms or multiplies at once; a multiple of MIN_ROWS, because the bits
    of a product of fewer may depend on the number of threads."""
    return max(1, CHUNK_ELEMENTS // (MIN_ROWS * width)) * MIN_ROWS


def _transformed(x: Tensor, transform: TransformArgs) -> Iterator[Tensor]:
    """x~ in parts."""
    width = x.shape[-1]
    built = InputTransform(transform.build_rotation(width), transform.input_offset, transform.input_scale)
    return (built.apply(part) for part in x.split(_rows_at_once(width)))


def reference_apply_transform(x: Tensor, transform: TransformArgs) -> Tensor:
    return torch.cat([*_transformed(x, transform)])


def reference_quantize_tokens(x: Tensor, transform: TransformArgs, rounding: Rounding) -> tuple[Tensor, Tensor]:
    codes, scale = zip(*(round_tokens(part, *rounding) for part in _transformed(x, transform)), strict=True)
    return torch.cat(codes), torch.cat(scale)


def reference_quantized_linear(tokens: Tokens, weight: WeightArgs, out_dtype: torch.dtype) -> Tensor:
    decoded, out = decode_weight(weight, tokens.codes.shape[1]), []
    rows = _rows_at_once(max(decoded.shape))
    for codes, scale in zip(tokens.codes.split(rows), tokens.scale.split(rows), strict=True):
        y = integer_matmul(codes, decoded).float() * weight.row_scale * scale[:, None]
        out.append((y if weight.bias is None else y + weight.bias).to(out_dtype))
    return torch.cat(out)


def reference_weight_only_linear(
    x: Tensor, transform: TransformArgs, weight: WeightArgs, out_dtype: torch.dtype
) -> Tensor:
    x = reference_apply_transform(x, transform)
    parts = decode_weight(weight, x.shape[1]).split(_rows_at_once(x.shape[1]))
    y = torch.cat([x @ part.float().T for part in parts], dim=1) * weight.row_scale
    return (y if weight.bias is None else y + weight.bias).to(out_dtype)


REFERENCE: dict[str, Callable[..., Any]] = {
    "apply_transform": reference_apply_transform,
    "quantize_tokens": reference_quantize_tokens,
    "quantized_linear": reference_quantized_linear,
    "weight_only_linear": reference_weight_only_linear,
}
_FAKE: dict[str, Callable[..., Any]] = {
    "apply_transform": lambda x, _: x.new_empty(x.shape, dtype=torch.float32),
    "quantize_tokens": lambda x, *_: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:1], dtype=torch.float32),
    ),
    "quantized_linear": lambda tokens, weight, out_dtype: tokens.codes.new_empty(
        tokens.codes.shape[0], weight.out_features, dtype=out_dtype
    ),
    "weight_only_linear": lambda x, _, weight, out_dtype: x.new_empty(x.shape[0], weight.out_features, dtype=out_dtype),
}
register("CompositeExplicitAutograd", REFERENCE)
for _name, _function in _FAKE.items():
    torch.library.register_fake(f"lrqdit::{_name}", take_records(_name, _function), lib=LIBRARY)


_LAYERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def make_handle(layer: Any) -> Tensor:
    """A number that the operators for compilers find a layer by while it lives, int64 without dimensions, on the CPU.

    The layer has ``calls_for(x, dtype)``, which returns what computes on x, such as :class:`LayerArgs`, and
    ``compute(x, dtype, is_shared)``, which does all of it.
    """
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _layer_tokens(x: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale, _ = _LAYERS[int(handle)].calls_for(x, x.dtype).quantize_tokens(x)
    return codes, scale


def _layer_product(codes: Tensor, scale: Tensor, handle: Tensor, _: int, dtype: torch.dtype) -> Tensor:
    tokens = Tokens(codes, scale)
    return _LAYERS[int(handle)].calls_for(codes.new_empty(0, dtype=dtype), dtype).quantized_linear(tokens, dtype)


def _layer_linear(x: Tensor, handle: Tensor, _: int, dtype: torch.dtype) -> Tensor:
    return _LAYERS[int(handle)].compute(x, dtype, is_shared=False)


for _name, _function, _fake in (
    ("layer_tokens", _layer_tokens, lambda x, _: _FAKE["quantize_tokens"](x)),
    (
        "layer_product",
        _layer_product,
        lambda codes, _, __, width, dtype: codes.new_empty(len(codes), width, dtype=dtype),
    ),
    ("layer_linear", _layer_linear, lambda x, _, width, dtype: x.new_empty(len(x), width, dtype=dtype)),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lrqdit::{_name}", _fake, lib=LIBRARY)


def fold(transform: InputTransform, weight: Tensor) -> Tensor:
    """W (out_features, in_features) -> W~ = (W / m) R, float32, without what acts on the principal part.

    It is computed by the kernel of the weight's device. A kernel's additions have another order than the reference's
    matrix products, so W~ agrees among devices to float rounding.
    """
    r, scale = transform.rotation, transform.input_scale
    if transform.principal is not None:
        part = outlet(transform.unsmooth(weight), transform.principal).T @ transform.principal.values
        weight = weight - (part if scale is None else part * scale.float())
    if scale is not None and not bool((scale.abs() == 1).all()):  # signs are their own inverse; others have none
        weight, scale = transform.unsmooth(weight), None
    if r.kind == "none" and scale is None:
        return weight.float()
    return apply_transform(weight, *TransformArgs(None, scale, r.kind, r.factors, r.block1, r.permutation, r.block2))


def unfold(transform: InputTransform, weight: Tensor, acting: LowRank | None = None) -> Tensor:
    """The inverse of :func:`fold`: W~ -> W, float32. ``acting`` is C, what of W acts on the principal part."""
    scale = 1.0 if transform.input_scale is None else transform.input_scale.float()
    weight = transform.rotation.apply_transpose(weight) * scale
    if acting is None or transform.principal is None:
        return weight
    u = transform.principal.values
    return weight + (acting.values.T - transform.unsmooth(weight) @ u.T) @ u * scale
