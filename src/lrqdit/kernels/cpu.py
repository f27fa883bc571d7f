"""The native kernels of the operators in ops.py, registered for the "CPU" key unless torch is to compute.

A layer that computes at once, on plain CPU tensors, calls the same kernels by :class:`LayerCalls`.
"""

import ctypes
import functools
import operator
import weakref
from typing import Any

import torch
from torch import Tensor

from lrqdit import native
from lrqdit.errors import KernelError
from lrqdit.kernels import ops
from lrqdit.kernels.ops import Rounding, Tokens, TransformArgs, WeightArgs
from lrqdit.numerics.hadamard import factor_matrix
from lrqdit.numerics.shapes import packed_shape
from lrqdit.numerics.tokens import normal_lookup

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROTATION_CODES = {"none": 0, "hadamard": 1, "block_hadamard": 2, "outlier": 3}
BUTTERFLIES = native.constant("LRQ_BUTTERFLIES")  # orders beside the powers of two that need no matrix
(MAX_RANK,) = native.constant("LRQ_MAX_RANK") or (0,)  # of a principal part in the kernels
(MAX_IN_FEATURES,) = native.constant("LRQ_MAX_IN_FEATURES") or (0,)  # beyond, an int32 sum could overflow


def _require(name: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
    """A kernel trusts its pointers: what does not have the shape it reads is refused here."""
    if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
        raise KernelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but must be {dtype} {shape}")


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _factor_arrays(rotation: str, factors: tuple[int, ...]) -> tuple[Any, Any, list[Tensor]]:
    """The factors and the addresses of their matrices as C arrays, and the matrices themselves."""
    matrices, kept = (ctypes.c_void_p * len(factors))(), []
    for i, factor in enumerate(factors):
        is_butterfly = factor > 0 and (factor & (factor - 1) == 0 or factor in BUTTERFLIES)
        if rotation in ("hadamard", "block_hadamard") and not is_butterfly:
            kept.append(factor_matrix(factor, torch.device("cpu")))
            matrices[i] = kept[-1].data_ptr()
    return (ctypes.c_int64 * len(factors))(*factors), matrices, kept


def _describe_transform(x: Tensor, transform: TransformArgs) -> tuple[native.Transform, Any]:
    """The C structure of a transform of x (rows, width), and the tensors that it points to."""
    x = (x if x.dtype in TYPE_CODES else x.float()).contiguous()
    offset, scale, rotation, factors, block1, permutation, block2 = transform
    if permutation is not None:
        permutation = permutation.to(torch.int32)
    rows, width = x.shape
    block = factors[0] if rotation == "outlier" else 0
    _require("input_offset", offset, torch.float16, width)
    _require("input_scale", scale, torch.float16, width)
    _require("block1", block1, torch.float32, block, block)
    _require("permutation", permutation, torch.int32, width)
    _require("block2", block2, torch.float32, block, block)
    kept = x, *(_contiguous(t) for t in (offset, scale, block1, block2, permutation))
    start, offsets, scales, *rest = (_address(t) for t in kept)
    orders, matrices, _ = _factor_arrays(rotation, tuple(factors))
    structure = native.Transform(
        start, TYPE_CODES[x.dtype], ROTATION_CODES[rotation], rows, width, offsets, scales,
        orders, matrices, len(factors), *rest,
    )  # fmt: skip
    return structure, kept


def _describe_weight(in_features: int, weight: WeightArgs) -> tuple[native.Weight, Any]:
    """The C structure of a weight, and the tensors that it points to."""
    packed, table, row_scale, bias, bits = weight
    out_features, table_rows = weight.out_features, 0 if table is None else len(table)
    levels = (2 if weight.is_trellis else 1) << bits
    _require("packed", packed, torch.uint8, *packed_shape(out_features, in_features, bits))
    _require("table", table, torch.int8, 1 if table_rows == 1 else out_features, levels)
    _require("row_scale", row_scale, torch.float32, out_features)
    _require("bias", bias, torch.float32, out_features)
    kept = [_contiguous(t) for t in (packed, table, row_scale, bias)]
    shape = out_features, in_features, table_rows, bits, weight.is_trellis
    return native.Weight(*map(_address, kept), *shape), kept


def _describe_rounding(rounding: Rounding) -> tuple[int, float, int | None]:
    """The bits that a kernel rounds to, the clip, and the address of its lookup."""
    is_normal = rounding.levels == "normal"
    return 8 if is_normal else rounding.bits, rounding.clip, normal_lookup().data_ptr() if is_normal else None


def apply_transform(x: Tensor, transform: TransformArgs) -> Tensor:
    """x~ = ((x - offset) * scale) R, float32 (rows, width), of a CPU tensor x (rows, width)."""
    structure, _kept = _describe_transform(x, transform)
    return _apply(structure)


def _apply(transform: native.Transform) -> Tensor:
    out = torch.empty(transform.rows, transform.width, dtype=torch.float32)
    native.call_plain("lrq_apply_transform", transform, torch.get_num_threads(), out.data_ptr())
    return out


def _quantize_tokens(x: Tensor, transform: TransformArgs, rounding: Rounding) -> tuple[Tensor, Tensor]:
    structure, _kept = _describe_transform(x, transform)
    return _quantize(structure, _describe_rounding(rounding))


def _quantize(
    transform: native.Transform, rounding: tuple, principal: native.Principal | None = None
) -> tuple[Tensor, Tensor]:
    codes = torch.empty(transform.rows, transform.width, dtype=torch.int8)
    scale = torch.empty(transform.rows, dtype=torch.float32)
    last = principal, torch.get_num_threads(), codes.data_ptr(), scale.data_ptr()
    native.call_plain("lrq_quantize_tokens", transform, *rounding, *last)
    return codes, scale


def _quantized_linear(tokens: Tokens, weight: WeightArgs, out_dtype: torch.dtype) -> Tensor:
    rows, in_features = tokens.codes.shape
    if in_features > MAX_IN_FEATURES:
        return ops.reference_quantized_linear(tokens, weight, out_dtype)
    _require("codes", tokens.codes, torch.int8, rows, in_features)
    _require("scale", tokens.scale, torch.float32, rows)
    structure, _kept = _describe_weight(in_features, weight)
    return _multiply_codes(structure, Tokens(tokens.codes.contiguous(), tokens.scale.contiguous()), out_dtype)


def _multiply_codes(
    weight: native.Weight, tokens: Tokens, out_dtype: torch.dtype, principal: native.Principal | None = None
) -> Tensor:
    """The product of contiguous tokens."""
    codes, rows = tokens.codes, tokens.codes.shape[0]
    out = _empty_output(rows, weight, out_dtype)
    last = principal, TYPE_CODES[out.dtype], torch.get_num_threads(), out.data_ptr()
    native.call_plain("lrq_quantized_linear", weight, rows, codes.data_ptr(), tokens.scale.data_ptr(), *last)
    return out if out.dtype == out_dtype else out.to(out_dtype)


def _weight_only_linear(x: Tensor, transform: TransformArgs, weight: WeightArgs, out_dtype: torch.dtype) -> Tensor:
    if transform.rotation != "none" or transform.input_offset is not None or transform.input_scale is not None:
        x = apply_transform(x, transform)
    structure, _kept = _describe_weight(x.shape[1], weight)
    return _multiply_floats(structure, x.float().contiguous(), out_dtype)


def _multiply_floats(weight: native.Weight, x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The product of float32 tokens, contiguous."""
    rows = x.shape[0]
    out = _empty_output(rows, weight, out_dtype)
    last = TYPE_CODES[out.dtype], torch.get_num_threads(), out.data_ptr()
    native.call_plain("lrq_weight_only_linear", weight, rows, x.data_ptr(), *last)
    return out if out.dtype == out_dtype else out.to(out_dtype)


def _empty_output(rows: int, weight: native.Weight, out_dtype: torch.dtype) -> Tensor:
    """In the dtype itself, or in float32 where no kernel writes it."""
    return torch.empty(rows, weight.out_features, dtype=out_dtype if out_dtype in TYPE_CODES else torch.float32)


_KEYS = "CPU", "AutogradCPU", "AutocastCPU", "ADInplaceOrView", "BackendSelect"  # of a plain tensor outside of modes
_PLAIN = functools.reduce(operator.or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, k)) for k in _KEYS))
_OTHER_KEYS = ~_PLAIN.raw_repr()


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read a tensor past torch: on the CPU, contiguous, nothing deferred, and nobody looks on: no
    compiler, tracer, fake tensor, transform of torch.func or mode."""
    if torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled():
        return False
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    keys = torch._C._dispatch_keys(tensor) | torch._C._dispatch_tls_local_include_set()
    return not keys.raw_repr() & _OTHER_KEYS and tensor.is_contiguous()


class LayerCalls:
    """The calls of :class:`lrqdit.kernels.ops.LayerArgs`, past torch's dispatcher, which takes several times as long as
    a small product.

    The C structures are filled in once, and again when a tensor is another one or lies elsewhere. After a large product
    no cache holds any of the interpreter, and all that is asked of torch here costs ten times as much as in a loop.

    ``principal`` is handed on to the kernels, see principal.py.
    """

    def __init__(self) -> None:
        self.tensors: list[int] = []  # the identities of the layer's
        self.addresses: list[int] = []
        self.references: list[weakref.ref] = []  # lest another takes the identity of a tensor that is gone

    def __getstate__(self) -> dict[str, Any]:
        return vars(LayerCalls())  # copies and pickles leave the addresses behind

    def _forget(self, _: weakref.ref) -> None:
        self.tensors = []

    def prepare(self, x: Tensor, out_dtype: torch.dtype, layer: Any) -> bool:
        """Whether the kernels can be called on x."""
        if native.LIBRARY is None or x.dtype not in TYPE_CODES or out_dtype not in TYPE_CODES or not is_plain(x):
            return False
        tensors = [*layer._parameters.values(), *layer._buffers.values()]
        if self.tensors == [*map(id, tensors)] and self.addresses == [*map(Tensor.data_ptr, tensors)]:
            return True
        if layer.in_features > MAX_IN_FEATURES or not all(map(is_plain, tensors)):
            return False
        transform, rounding, weight = layer.arguments()
        self.transform, _ = _describe_transform(x.new_empty(0, layer.in_features), transform)
        self.rounding = _describe_rounding(rounding)
        self.weight, _ = _describe_weight(layer.in_features, weight)
        self.references = [weakref.ref(tensor, self._forget) for tensor in tensors]
        self.tensors, self.addresses = [*map(id, tensors)], [*map(Tensor.data_ptr, tensors)]
        return True

    def quantize_tokens(self, x: Tensor, principal: native.Principal | None = None) -> Tokens:
        return Tokens(*_quantize(self._transform(x), self.rounding, principal))

    def quantized_linear(
        self, tokens: Tokens, out_dtype: torch.dtype, principal: native.Principal | None = None
    ) -> Tensor:
        return _multiply_codes(self.weight, tokens, out_dtype, principal)

    def linear(
        self, x: Tensor, out_dtype: torch.dtype, principal: native.Principal | None = None
    ) -> tuple[Tensor, Tokens]:
        """Both in one call, which costs less."""
        transform, weight = self._transform(x), self.weight
        rows = transform.rows
        codes = torch.empty(rows, transform.width, dtype=torch.int8)
        scale = torch.empty(rows, dtype=torch.float32)
        out = torch.empty(rows, weight.out_features, dtype=out_dtype)
        last = codes.data_ptr(), scale.data_ptr(), out.data_ptr()
        how = TYPE_CODES[out_dtype], torch.get_num_threads()
        native.call_plain("lrq_linear", transform, *self.rounding, weight, principal, *how, *last)
        return out, Tokens(codes, scale)

    def weight_only_linear(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        return _multiply_floats(self.weight, _apply(self._transform(x)), out_dtype)

    def _transform(self, x: Tensor) -> native.Transform:
        transform = native.Transform.from_buffer_copy(self.transform)  # another thread may be in here, too
        transform.x, transform.x_type, transform.rows = x.data_ptr(), TYPE_CODES[x.dtype], x.numel() // transform.width
        return transform


if native.LIBRARY is not None or native.IS_FAULT:  # a fault is raised by the first call
    ops.register(
        "CPU",
        {
            "apply_transform": apply_transform,
            "quantize_tokens": _quantize_tokens,
            "quantized_linear": _quantized_linear,
            "weight_only_linear": _weight_only_linear,
        },
    )
