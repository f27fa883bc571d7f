"""The native kernels of the operators in ops.py, registered for the "CPU" key if there is a native library."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from lrqdit import native, ops
from lrqdit.activation import normal_lookup
from lrqdit.errors import KernelError
from lrqdit.hadamard import factor_matrix
from lrqdit.packing import packed_shape

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROTATION_CODES = {"none": 0, "hadamard": 1, "block_hadamard": 2, "outlier": 3}
BUTTERFLIES = (12, 20, 28)  # orders beside the powers of two that need no matrix
MAX_IN_FEATURES = (1 << 17) - 1  # an int32 sum of int8 products could overflow beyond


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
    out = torch.empty(x.shape, dtype=torch.float32)
    native.call("lrq_apply_transform", call.structure, torch.get_num_threads(), out)
    return out


def _quantize_tokens(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2, bits, clip, levels="uniform"
) -> tuple[Tensor, Tensor]:
    call = _TransformCall(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], dtype=torch.float32)
    bits, lookup = (8, normal_lookup()) if levels == "normal" else (bits, None)
    native.call("lrq_quantize_tokens", call.structure, bits, clip, lookup, torch.get_num_threads(), codes, scale)
    return codes, scale


def _multiply(
    function: str, x: Tensor, scale: Tensor | None, packed, table, row_scale, bias, bits, out_dtype
) -> Tensor:
    (rows, in_features), out_features = x.shape, len(row_scale)
    table_rows = 0 if table is None else len(table)
    _require("packed", packed, torch.uint8, *packed_shape(out_features, in_features, bits))
    is_trellis = ops.has_trellis(table, bits)
    _require("table", table, torch.int8, 1 if table_rows == 1 else out_features, (2 if is_trellis else 1) << bits)
    _require("row_scale", row_scale, torch.float32, out_features)
    _require("bias", bias, torch.float32, out_features)
    _require("scale", scale, torch.float32, rows)
    native_dtype = out_dtype if out_dtype in TYPE_CODES else torch.float32
    out = torch.empty(rows, out_features, dtype=native_dtype)
    kept = [_contiguous(t) for t in (packed, table, row_scale, bias, x, scale)]
    pointers = [_address(t) for t in kept]
    weight = native.Weight(*pointers[:4], out_features, in_features, table_rows, bits, is_trellis)
    inputs = pointers[4:5] if scale is None else pointers[4:]
    native.call(function, weight, rows, *inputs, TYPE_CODES[native_dtype], torch.get_num_threads(), out)
    return out if native_dtype == out_dtype else out.to(out_dtype)


def _quantized_linear(codes, scale, packed, table, row_scale, bias, bits, out_dtype) -> Tensor:
    if codes.shape[1] > MAX_IN_FEATURES:
        return ops.reference_quantized_linear(codes, scale, packed, table, row_scale, bias, bits, out_dtype)
    _require("codes", codes, torch.int8, *codes.shape)
    return _multiply("lrq_quantized_linear", codes, scale, packed, table, row_scale, bias, bits, out_dtype)


def _weight_only_linear(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2,
    packed, table, row_scale, bias, bits, out_dtype,
) -> Tensor:  # fmt: skip
    if rotation != "none" or input_offset is not None or input_scale is not None:
        x = apply_transform(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    return _multiply("lrq_weight_only_linear", x.float(), None, packed, table, row_scale, bias, bits, out_dtype)


if native.LIBRARY is not None:
    ops.LIBRARY.impl("apply_transform", apply_transform, "CPU")
    ops.LIBRARY.impl("quantize_tokens", _quantize_tokens, "CPU")
    ops.LIBRARY.impl("quantized_linear", _quantized_linear, "CPU")
    ops.LIBRARY.impl("weight_only_linear", _weight_only_linear, "CPU")
