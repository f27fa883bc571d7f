"""The native kernels of the operators in ops.py, registered for the "CPU" key unless torch is to compute.

A layer that computes at once, on plain CPU tensors, calls the same kernels by :class:`LayerCalls`.
"""

import ctypes
import functools
import operator
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrqdit import native
from lrqdit.errors import KernelError
from lrqdit.kernels import ops
from lrqdit.numerics.hadamard import factor_matrix
from lrqdit.numerics.shapes import packed_shape
from lrqdit.numerics.tokens import normal_lookup

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROTATION_CODES = {"none": 0, "hadamard": 1, "block_hadamard": 2, "outlier": 3}
BUTTERFLIES = native.constant("LRQ_BUTTERFLIES")  # orders beside the powers of two that need no matrix
PRINCIPAL_BUFFERS = ("principal", "principal_scale_bits", "outlet", "outlet_scale_bits")
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


class _TransformCall:
    """The C structure of a transform, and everything it points to, alive."""

    def __init__(self, x, input_offset, input_scale, rotation, factors, block1, permutation, block2) -> None:
        x = _contiguous(x if x.dtype in TYPE_CODES else x.float())
        if permutation is not None:
            permutation = permutation.to(torch.int32)
        self.kept = x, *(_contiguous(t) for t in (input_offset, input_scale, block1, block2, permutation))
        pointers = [_address(t) for t in self.kept]
        rows, width = x.shape
        block = factors[0] if rotation == "outlier" else 0
        _require("input_offset", input_offset, torch.float16, width)
        _require("input_scale", input_scale, torch.float16, width)
        _require("block1", block1, torch.float32, block, block)
        _require("permutation", permutation, torch.int32, width)
        _require("block2", block2, torch.float32, block, block)
        orders, matrices, _ = _factor_arrays(rotation, tuple(factors))
        self.structure = native.Transform(
            pointers[0], TYPE_CODES[x.dtype], ROTATION_CODES[rotation], rows, width, pointers[1], pointers[2],
            orders, matrices, len(factors), *pointers[3:],
        )  # fmt: skip


def apply_transform(x, input_offset, input_scale, rotation, factors, block1, permutation, block2) -> Tensor:
    """x~ = ((x - offset) * scale) R, float32 (rows, width), of a CPU tensor x (rows, width)."""
    call = _TransformCall(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    return _apply(call.structure)


def _apply(transform: native.Transform) -> Tensor:
    out = torch.empty(transform.rows, transform.width, dtype=torch.float32)
    native.call_plain("lrq_apply_transform", transform, torch.get_num_threads(), out.data_ptr())
    return out


def _levels(bits: int, levels: str) -> tuple[int, int | None]:
    """The bits that a kernel rounds to, and the address of its lookup."""
    return (8, normal_lookup().data_ptr()) if levels == "normal" else (bits, None)


def _empty_codes(transform: native.Transform) -> tuple[Tensor, Tensor]:
    rows, width = transform.rows, transform.width
    return torch.empty(rows, width, dtype=torch.int8), torch.empty(rows, dtype=torch.float32)


def _quantize(
    transform: native.Transform, bits: int, clip: float, levels: str, principal: native.Principal | None = None
) -> tuple[Tensor, Tensor]:
    codes, scale = _empty_codes(transform)
    bits, lookup = _levels(bits, levels)
    last = torch.get_num_threads(), codes.data_ptr(), scale.data_ptr()
    native.call_plain("lrq_quantize_tokens", transform, bits, clip, lookup, principal, *last)
    return codes, scale


def _quantize_tokens(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2, bits, clip, levels="uniform"
) -> tuple[Tensor, Tensor]:
    call = _TransformCall(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    return _quantize(call.structure, bits, clip, levels)


class _WeightCall:
    """The C structure of a weight, and everything it points to, alive."""

    def __init__(self, in_features: int, packed, table, row_scale, bias, bits) -> None:
        out_features, table_rows = len(row_scale), 0 if table is None else len(table)
        _require("packed", packed, torch.uint8, *packed_shape(out_features, in_features, bits))
        is_trellis = ops.has_trellis(table, bits)
        _require("table", table, torch.int8, 1 if table_rows == 1 else out_features, (2 if is_trellis else 1) << bits)
        _require("row_scale", row_scale, torch.float32, out_features)
        _require("bias", bias, torch.float32, out_features)
        self.kept = [_contiguous(t) for t in (packed, table, row_scale, bias)]
        shape = out_features, in_features, table_rows, bits, is_trellis
        self.structure = native.Weight(*map(_address, self.kept), *shape)


def _empty_output(rows: int, weight: native.Weight, out_dtype: torch.dtype) -> tuple[torch.dtype, Tensor]:
    native_dtype = out_dtype if out_dtype in TYPE_CODES else torch.float32
    return native_dtype, torch.empty(rows, weight.out_features, dtype=native_dtype)


def _multiply(
    weight: native.Weight, x: Tensor, scale: Tensor | None, out_dtype: torch.dtype,
    principal: native.Principal | None = None,
) -> Tensor:  # fmt: skip
    """The product of contiguous tokens, codes with their steps or float32, with a weight."""
    rows = x.shape[0]
    native_dtype, out = _empty_output(rows, weight, out_dtype)
    last = TYPE_CODES[native_dtype], torch.get_num_threads(), out.data_ptr()
    if scale is None:
        native.call_plain("lrq_weight_only_linear", weight, rows, x.data_ptr(), *last)
    else:
        native.call_plain("lrq_quantized_linear", weight, rows, x.data_ptr(), scale.data_ptr(), principal, *last)
    return out if native_dtype == out_dtype else out.to(out_dtype)


def _quantized_linear(codes, scale, packed, table, row_scale, bias, bits, out_dtype) -> Tensor:
    rows, in_features = codes.shape
    if in_features > MAX_IN_FEATURES:
        return ops.reference_quantized_linear(codes, scale, packed, table, row_scale, bias, bits, out_dtype)
    _require("codes", codes, torch.int8, rows, in_features)
    _require("scale", scale, torch.float32, rows)
    call = _WeightCall(in_features, packed, table, row_scale, bias, bits)
    return _multiply(call.structure, _contiguous(codes), _contiguous(scale), out_dtype)


def _weight_only_linear(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2,
    packed, table, row_scale, bias, bits, out_dtype,
) -> Tensor:  # fmt: skip
    if rotation != "none" or input_offset is not None or input_scale is not None:
        x = apply_transform(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    call = _WeightCall(x.shape[1], packed, table, row_scale, bias, bits)
    return _multiply(call.structure, x.float().contiguous(), None, out_dtype)


_KEYS = "CPU", "AutogradCPU", "AutocastCPU", "ADInplaceOrView", "BackendSelect"  # of a plain tensor outside of modes
_PLAIN = functools.reduce(operator.or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, k)) for k in _KEYS))
_OTHER_KEYS = ~_PLAIN.raw_repr()


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read a tensor past torch: on the CPU, contiguous, nothing deferred, and nobody looks on: no
    compiler, tracer, fake tensor, transform of torch.func or mode."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or torch._C._is_torch_function_mode_enabled():
        return False
    keys = torch._C._dispatch_keys(tensor) | torch._C._dispatch_tls_local_include_set()
    return not keys.raw_repr() & _OTHER_KEYS and tensor.is_contiguous()


class LayerCalls:
    """A layer's calls of the kernels past torch's dispatcher, which takes several times as long as a small product.

    The C structures are filled in once, and again when a buffer is another one or lies elsewhere. After a large product
    no cache holds any of the interpreter, and all that is asked of torch here costs ten times as much as in a loop.
    """

    def __init__(self) -> None:
        self.buffers: list[int] = []  # their identities
        self.addresses: list[int] = []
        self.references: list[weakref.ref] = []  # lest another takes the identity of a buffer that is gone

    def __getstate__(self) -> dict[str, Any]:
        return vars(LayerCalls())  # copies and pickles leave the addresses behind

    def _forget(self, _: weakref.ref) -> None:
        self.buffers = []

    def prepare(self, x: Tensor, layer: Any) -> bool:
        """Whether the kernels can be called on x."""
        if native.LIBRARY is None or not is_plain(x) or x.dtype not in TYPE_CODES:
            return False
        buffers = layer._buffers.values()
        if self.buffers == [*map(id, buffers)] and self.addresses == [*map(Tensor.data_ptr, buffers)]:
            return True
        if layer.in_features > MAX_IN_FEATURES or not all(map(is_plain, buffers)):
            return False
        self.format = layer.format
        self.transform = _TransformCall(x.new_empty(0, layer.in_features), *layer._input_arguments()).structure
        self.weight = _WeightCall(layer.in_features, *layer._weight_arguments()).structure
        if layer.format.input.principal_rank:
            self.directions = [layer._buffers[name].data_ptr() for name in PRINCIPAL_BUFFERS]
        self.references = [weakref.ref(b, self._forget) for b in buffers]
        self.buffers, self.addresses = [*map(id, buffers)], [*map(Tensor.data_ptr, buffers)]
        return True

    def takes_principal(self, x: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> bool:
        """Whether the kernels take the principal part of x out and add what the weight makes of it."""
        rank = self.format.input.principal_rank
        is_bfloat16 = x.dtype == out_dtype == torch.bfloat16
        return is_bfloat16 and 0 < rank <= MAX_RANK and bool(native.LIBRARY.lrq_has_pairs())

    def quantize_tokens(self, x: Tensor, has_principal: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes and steps; with has_principal the coordinates of the principal part, too."""
        f, transform = self.format, self._transform(x)
        principal, coordinates = self._principal(transform.rows) if has_principal else (None, None)
        codes, scale = _quantize(transform, f.input.activation_bits, f.input.clip, f.input.token_levels, principal)
        return codes, scale, coordinates

    def quantized_linear(
        self, codes: Tensor, scale: Tensor, out_dtype: torch.dtype, coordinates: Tensor | None = None
    ) -> Tensor:
        """The output; coordinates: those of a principal part that is to be added."""
        principal, _kept = (None, None) if coordinates is None else self._principal(len(codes), coordinates)
        return _multiply(self.weight, codes, scale, out_dtype, principal)

    def linear(
        self, x: Tensor, out_dtype: torch.dtype, has_principal: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The output, and what it was computed from: :meth:`quantize_tokens` and the product of it in one call."""
        transform, f = self._transform(x), self.format
        codes, scale = _empty_codes(transform)
        principal, coordinates = self._principal(transform.rows) if has_principal else (None, None)
        native_dtype, out = _empty_output(transform.rows, self.weight, out_dtype)
        bits, lookup = _levels(f.input.activation_bits, f.input.token_levels)
        last = codes.data_ptr(), scale.data_ptr(), out.data_ptr()
        how = TYPE_CODES[native_dtype], torch.get_num_threads()
        native.call_plain("lrq_linear", transform, bits, f.input.clip, lookup, self.weight, principal, *how, *last)
        return (out if native_dtype == out_dtype else out.to(out_dtype)), codes, scale, coordinates

    def _principal(self, rows: int, coordinates: Tensor | None = None) -> tuple[native.Principal, Tensor]:
        rank = self.format.input.principal_rank
        if coordinates is None:
            coordinates = torch.empty(rows, rank + rank % 2, dtype=torch.bfloat16)
        elif coordinates.shape[1] % 2:  # torch's
            coordinates = F.pad(coordinates, (0, 1))
        return native.Principal(*self.directions, rank, coordinates.data_ptr()), coordinates

    def weight_only_linear(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        return _multiply(self.weight, _apply(self._transform(x)), None, out_dtype)

    def _transform(self, x: Tensor) -> native.Transform:
        transform = native.Transform.from_buffer_copy(self.transform)  # another thread may be in here, too
        transform.x, transform.x_type, transform.rows = x.data_ptr(), TYPE_CODES[x.dtype], x.numel() // transform.width
        return transform


if native.LIBRARY is not None or native.IS_FAULT:  # a fault is raised by the first call
    ops.LIBRARY.impl("apply_transform", apply_transform, "CPU")
    ops.LIBRARY.impl("quantize_tokens", _quantize_tokens, "CPU")
    ops.LIBRARY.impl("quantized_linear", _quantized_linear, "CPU")
    ops.LIBRARY.impl("weight_only_linear", _weight_only_linear, "CPU")
