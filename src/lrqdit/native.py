"""The native CPU kernels: finds the compiled library, declares its C interface, and registers it for the "CPU" key.

The library (csrc/, plain C++17 behind a C interface) is optional: a package installed without a compiler runs on torch
alone, with the same results up to float rounding. ``LRQDIT_KERNELS`` chooses by hand: ``reference`` for torch, or the
name of an instruction set (``avx512vnni``, ``avxvnni``, ``avx2``, ``neon``, ``serial``).
"""

import ctypes
import functools
import math
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # before the library: one OpenMP runtime, torch's, for both
from torch import Tensor

import lrqdit
from lrqdit import ops
from lrqdit.errors import KernelError
from lrqdit.hadamard import factor_matrix
from lrqdit.packing import packed_shape

ABI_VERSION = 1
ENVIRONMENT = "LRQDIT_KERNELS"
LIBRARY_NAME = {"darwin": "liblrqdit_native.dylib", "win32": "liblrqdit_native.dll"}.get(
    sys.platform, "liblrqdit_native.so"
)
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROTATION_CODES = {"none": 0, "hadamard": 1, "block_hadamard": 2, "outlier": 3}
BUTTERFLIES = (12, 20, 28)  # orders beside the powers of two that need no matrix
MAX_IN_FEATURES = (1 << 17) - 1  # an int32 sum of int8 products could overflow beyond

_pointer = ctypes.c_void_p


class _Transform(ctypes.Structure):
    _fields_ = [
        ("x", _pointer),
        ("x_type", ctypes.c_int32),
        ("rotation", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("offset", _pointer),
        ("scale", _pointer),
        ("factors", ctypes.POINTER(ctypes.c_int64)),
        ("matrices", ctypes.POINTER(_pointer)),
        ("factor_count", ctypes.c_int64),
        ("block1", _pointer),
        ("block2", _pointer),
        ("permutation", _pointer),
    ]


class _Weight(ctypes.Structure):
    _fields_ = [
        ("packed", _pointer),
        ("table", _pointer),
        ("row_scale", _pointer),
        ("bias", _pointer),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("table_rows", ctypes.c_int64),
        ("bits", ctypes.c_int32),
    ]


_FUNCTIONS: dict[str, tuple[Any, tuple]] = {
    "lrq_abi_version": (ctypes.c_int, ()),
    "lrq_last_error": (ctypes.c_char_p, ()),
    "lrq_isa_count": (ctypes.c_int, ()),
    "lrq_isa_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "lrq_isa_missing": (ctypes.c_char_p, (ctypes.c_int,)),
    "lrq_isa": (ctypes.c_char_p, ()),
    "lrq_use_isa": (ctypes.c_int, (ctypes.c_char_p,)),
    "lrq_is_parallel": (ctypes.c_int, ()),
    "lrq_repeat_dots": (ctypes.c_int, (ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_int64))),
    "lrq_apply_transform": (ctypes.c_int, (ctypes.POINTER(_Transform), ctypes.c_int, _pointer)),
    "lrq_quantize_tokens": (
        ctypes.c_int,
        (ctypes.POINTER(_Transform), ctypes.c_int, ctypes.c_double, ctypes.c_int, _pointer, _pointer),
    ),
    "lrq_quantized_linear": (
        ctypes.c_int,
        (ctypes.POINTER(_Weight), ctypes.c_int64, _pointer, _pointer, ctypes.c_int, ctypes.c_int, _pointer),
    ),
    "lrq_weight_only_linear": (
        ctypes.c_int,
        (ctypes.POINTER(_Weight), ctypes.c_int64, _pointer, ctypes.c_int, ctypes.c_int, _pointer),
    ),
}


def find_library() -> Path | None:
    """The compiled library beside this package, or None. An editable install keeps it in another folder of the path."""
    for folder in lrqdit.__path__:
        if (path := Path(folder) / LIBRARY_NAME).is_file():
            return path
    return None


def _is_truncated(path: Path) -> bool:
    """Whether the end of an ELF file (its table of sections) is missing: opening it would end the process by SIGBUS."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:
        return False  # not ELF, 64 bits, little endian: left to the loader
    (start,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < start + size * count


def load(path: Path) -> ctypes.CDLL:
    """Open the library, declare its functions and check its version.

    Raises:
        KernelError: if it cannot be opened, or was built for another version of this package.
    """
    try:
        if _is_truncated(path):
            raise OSError("the file is truncated")
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path.name} cannot be loaded ({error}); reinstall lrqdit to build it again") from error
    if (version := library.lrq_abi_version()) != ABI_VERSION:
        raise KernelError(
            f"{path.name} has interface version {version}, this package needs {ABI_VERSION}; reinstall lrqdit"
        )
    return library


def instruction_sets(library: ctypes.CDLL) -> dict[str, str]:
    """Name -> what this CPU lacks for it ("" if nothing), best first."""
    count = library.lrq_isa_count()
    return {library.lrq_isa_name(i).decode(): library.lrq_isa_missing(i).decode() for i in range(count)}


def _check(status: int) -> None:
    if status:
        assert LIBRARY is not None
        raise KernelError(f"native kernel: {LIBRARY.lrq_last_error().decode()}")


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
    matrices, kept = (_pointer * len(factors))(), []
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
        self.structure = _Transform(
            pointers[0], TYPE_CODES[x.dtype], ROTATION_CODES[rotation], rows, width, pointers[1], pointers[2],
            orders, matrices, len(factors), *pointers[3:],
        )  # fmt: skip
        self.reference = ctypes.byref(self.structure)


def apply_transform(x, input_offset, input_scale, rotation, factors, block1, permutation, block2) -> Tensor:
    """x~ = ((x - offset) * scale) R, float32 (rows, width), of a CPU tensor x (rows, width)."""
    assert LIBRARY is not None
    call = _TransformCall(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    out = torch.empty(x.shape, dtype=torch.float32)
    _check(LIBRARY.lrq_apply_transform(call.reference, torch.get_num_threads(), out.data_ptr()))
    return out


def _quantize_tokens(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2, bits, clip
) -> tuple[Tensor, Tensor]:
    assert LIBRARY is not None
    call = _TransformCall(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], dtype=torch.float32)
    threads = torch.get_num_threads()
    _check(LIBRARY.lrq_quantize_tokens(call.reference, bits, clip, threads, codes.data_ptr(), scale.data_ptr()))
    return codes, scale


def _multiply(
    function: Callable, x: Tensor, scale: Tensor | None, packed, table, row_scale, bias, bits, out_dtype
) -> Tensor:
    (rows, in_features), out_features = x.shape, len(row_scale)
    table_rows = 0 if table is None else len(table)
    _require("packed", packed, torch.uint8, *packed_shape(out_features, in_features, bits))
    _require("table", table, torch.int8, 1 if table_rows == 1 else out_features, 1 << bits)
    _require("row_scale", row_scale, torch.float32, out_features)
    _require("bias", bias, torch.float32, out_features)
    _require("scale", scale, torch.float32, rows)
    native_dtype = out_dtype if out_dtype in TYPE_CODES else torch.float32
    out = torch.empty(rows, out_features, dtype=native_dtype)
    kept = [_contiguous(t) for t in (packed, table, row_scale, bias, x, scale)]
    pointers = [_address(t) for t in kept]
    weight = _Weight(*pointers[:4], out_features, in_features, table_rows, bits)
    inputs = pointers[4:5] if scale is None else pointers[4:]
    threads = torch.get_num_threads()
    _check(function(ctypes.byref(weight), rows, *inputs, TYPE_CODES[native_dtype], threads, out.data_ptr()))
    return out if native_dtype == out_dtype else out.to(out_dtype)


def _quantized_linear(codes, scale, packed, table, row_scale, bias, bits, out_dtype) -> Tensor:
    if codes.shape[1] > MAX_IN_FEATURES:
        return ops.reference_quantized_linear(codes, scale, packed, table, row_scale, bias, bits, out_dtype)
    assert LIBRARY is not None
    _require("codes", codes, torch.int8, *codes.shape)
    return _multiply(LIBRARY.lrq_quantized_linear, codes, scale, packed, table, row_scale, bias, bits, out_dtype)


def _weight_only_linear(
    x, input_offset, input_scale, rotation, factors, block1, permutation, block2,
    packed, table, row_scale, bias, bits, out_dtype,
) -> Tensor:  # fmt: skip
    assert LIBRARY is not None
    if rotation != "none" or input_offset is not None or input_scale is not None:
        x = apply_transform(x, input_offset, input_scale, rotation, factors, block1, permutation, block2)
    return _multiply(LIBRARY.lrq_weight_only_linear, x.float(), None, packed, table, row_scale, bias, bits, out_dtype)


def use(name: str) -> None:
    """Run on one instruction set; KernelError if it is unknown or this CPU lacks it."""
    if LIBRARY is None:
        raise KernelError(f"{name}: {WHY_REFERENCE}")
    _check(LIBRARY.lrq_use_isa(name.encode()))


def measure_peak(iterations: int = 1_000_000) -> float:
    """Integer operations per second (a multiply and an add are two) of dot products on registers, on all threads."""
    if LIBRARY is None:
        raise KernelError(f"measure_peak: {WHY_REFERENCE}")
    operations, best = ctypes.c_int64(), math.inf
    for _ in range(5):
        start = time.perf_counter()
        _check(LIBRARY.lrq_repeat_dots(iterations, torch.get_num_threads(), ctypes.byref(operations)))
        best = min(best, time.perf_counter() - start)
    return operations.value / best


def describe() -> list[str]:
    """What runs on this CPU and why nothing better, one line each."""
    if LIBRARY is None:
        return [f"CPU kernels: torch reference ({WHY_REFERENCE})"]
    lines = [f"CPU kernels: native, {LIBRARY.lrq_isa().decode()}, {torch.get_num_threads()} threads"]
    for name, missing in instruction_sets(LIBRARY).items():
        if name == LIBRARY.lrq_isa().decode():
            break
        lines.append(f"  not {name}: {missing or f'{ENVIRONMENT} chose another'}")
    if not LIBRARY.lrq_is_parallel():
        lines.append("  one thread only: the compiler had no OpenMP; install it (libomp) and reinstall lrqdit")
    return lines


def _start() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why the torch reference runs."""
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted == "reference":
        return None, f"{ENVIRONMENT}=reference"
    path = find_library()
    if path is None:
        if wanted:
            raise KernelError(f"{ENVIRONMENT}={wanted}, but lrqdit was installed without its native library")
        return None, "lrqdit was installed without its native library; install a C++ compiler and reinstall it"
    library = load(path)
    if wanted and library.lrq_use_isa(wanted.encode()):
        known = ", ".join(["reference", *instruction_sets(library)])
        raise KernelError(f"{ENVIRONMENT}={wanted}: {library.lrq_last_error().decode()}; it may be {known}")
    return library, ""


LIBRARY, WHY_REFERENCE = _start()
if LIBRARY is not None:
    ops.LIBRARY.impl("quantize_tokens", _quantize_tokens, "CPU")
    ops.LIBRARY.impl("quantized_linear", _quantized_linear, "CPU")
    ops.LIBRARY.impl("weight_only_linear", _weight_only_linear, "CPU")
