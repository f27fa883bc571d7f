"""The native library: finds it, declares its C interface, and says what runs.

The library (csrc/, plain C++17 behind a C interface) is optional: a package installed without a compiler runs on torch
alone, with the same results up to float rounding. ``LRQDIT_KERNELS`` chooses by hand: ``reference`` for torch, or the
name of an instruction set. A library that cannot be loaded, or a choice that cannot be followed, is an error when a
kernel is first used, not when this module is imported.
"""

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # before the library: one OpenMP runtime, torch's, for both
from torch import Tensor

from lrqdit.errors import KernelError

ABI_VERSION = 5
ENVIRONMENT = "LRQDIT_KERNELS"
LIBRARY_NAME = {"darwin": "liblrqdit_native.dylib", "win32": "liblrqdit_native.dll"}.get(
    sys.platform, "liblrqdit_native.so"
)

_ADVICE = f"reinstall lrqdit, or set {ENVIRONMENT}=reference to run on torch, slower"
_NOT_BUILT = "lrqdit was installed without its native library; install a C++ compiler and reinstall lrqdit"
_pointer = ctypes.c_void_p


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Matrix(ctypes.Structure):
    _fields_ = [("weight", _pointer), *_fields(ctypes.c_int64, "rows columns"), ("importance", _pointer)]


class Transform(ctypes.Structure):
    _fields_ = [
        ("x", _pointer),
        *_fields(ctypes.c_int32, "x_type rotation"),
        *_fields(ctypes.c_int64, "rows width"),
        *_fields(_pointer, "offset scale"),
        ("factors", ctypes.POINTER(ctypes.c_int64)),
        ("matrices", ctypes.POINTER(_pointer)),
        ("factor_count", ctypes.c_int64),
        *_fields(_pointer, "block1 block2 permutation"),
    ]


class Weight(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "packed table row_scale bias"),
        *_fields(ctypes.c_int64, "out_features in_features table_rows"),
        *_fields(ctypes.c_int32, "bits is_trellis"),
    ]


class Principal(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "inlet inlet_scale outlet outlet_scale"),
        ("rank", ctypes.c_int64),
        ("coordinates", _pointer),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "query key value out logsumexp mask"),
        *_fields(ctypes.c_int64, "batch heads queries keys width"),
        *_fields(ctypes.c_int64 * 3, "query_stride key_stride value_stride out_stride logsumexp_stride mask_stride"),
        ("mask_type", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


_table = _pointer, ctypes.c_int64, ctypes.c_int  # levels, rows of them, bits
_rounding = ctypes.c_int, ctypes.c_double, _pointer  # bits, clip, lookup
_principal = ctypes.POINTER(Principal)
_FUNCTIONS: dict[str, tuple[Any, tuple]] = {
    "lrq_abi_version": (ctypes.c_int, ()),
    "lrq_last_error": (ctypes.c_char_p, ()),
    "lrq_size_of": (ctypes.c_int64, (ctypes.c_char_p,)),
    "lrq_constant": (ctypes.c_int, (ctypes.c_char_p, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)))),
    "lrq_isa_count": (ctypes.c_int, ()),
    "lrq_isa_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "lrq_isa_missing": (ctypes.c_char_p, (ctypes.c_int,)),
    "lrq_isa": (ctypes.c_char_p, ()),
    "lrq_use_isa": (ctypes.c_int, (ctypes.c_char_p,)),
    "lrq_is_parallel": (ctypes.c_int, ()),
    "lrq_repeat_dots": (ctypes.c_int, (ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_int64))),
    "lrq_repeat_pairs": (ctypes.c_int, (ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_int64))),
    "lrq_apply_transform": (ctypes.c_int, (ctypes.POINTER(Transform), ctypes.c_int, _pointer)),
    "lrq_quantize_tokens": (
        ctypes.c_int,
        (ctypes.POINTER(Transform), *_rounding, _principal, ctypes.c_int, _pointer, _pointer),
    ),
    "lrq_quantized_linear": (
        ctypes.c_int,
        (ctypes.POINTER(Weight), ctypes.c_int64, _pointer, _pointer, _principal, ctypes.c_int, ctypes.c_int, _pointer),
    ),
    "lrq_linear": (
        ctypes.c_int,
        (
            *(ctypes.POINTER(Transform), *_rounding, ctypes.POINTER(Weight), _principal),
            *(ctypes.c_int, ctypes.c_int, _pointer, _pointer, _pointer),
        ),
    ),
    "lrq_weight_only_linear": (
        ctypes.c_int,
        (ctypes.POINTER(Weight), ctypes.c_int64, _pointer, ctypes.c_int, ctypes.c_int, _pointer),
    ),
    "lrq_count_layer": (
        ctypes.c_int,
        (ctypes.POINTER(Matrix), ctypes.c_int64, ctypes.c_int64, ctypes.c_int, _pointer, _pointer),
    ),
    "lrq_count_rows": (ctypes.c_int, (ctypes.POINTER(Matrix), ctypes.c_int, *[_pointer] * 4)),
    "lrq_fit_scales": (
        ctypes.c_int,
        (ctypes.POINTER(Matrix), *_table, _pointer, ctypes.c_int64, ctypes.c_int, _pointer),
    ),
    "lrq_encode": (ctypes.c_int, (ctypes.POINTER(Matrix), *_table, _pointer, ctypes.c_int, _pointer)),
    "lrq_trellis_encode": (
        ctypes.c_int,
        (ctypes.POINTER(Matrix), _pointer, ctypes.c_int, _pointer, ctypes.c_int, _pointer),
    ),
    "lrq_pack": (
        ctypes.c_int,
        (_pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int, _pointer, _pointer),
    ),
    "lrq_has_pairs": (ctypes.c_int, ()),
    "lrq_attend": (ctypes.c_int, (ctypes.POINTER(Attention), ctypes.c_int)),
}


def find_library() -> Path | None:
    """The compiled library beside this package, or None. An editable install keeps it in another folder of the path."""
    for folder in sys.modules["lrqdit"].__path__:
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
        raise KernelError(f"{path.name} cannot be loaded ({error}); {_ADVICE}") from error
    if (version := library.lrq_abi_version()) != ABI_VERSION:
        raise KernelError(f"{path.name} has interface version {version}, this package needs {ABI_VERSION}; {_ADVICE}")
    return library


def instruction_sets(library: ctypes.CDLL) -> dict[str, str]:
    """Name -> what this CPU lacks for it ("" if nothing), best first."""
    count = library.lrq_isa_count()
    return {library.lrq_isa_name(i).decode(): library.lrq_isa_missing(i).decode() for i in range(count)}


def constant(name: str) -> tuple[int, ...]:
    """The values of a constant of lrqdit.h, such as "LRQ_MAX_RANK"; () if there is no library or no such constant."""
    if LIBRARY is None:
        return ()
    values = ctypes.POINTER(ctypes.c_int64)()
    return tuple(values[: LIBRARY.lrq_constant(name.encode(), values)])


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library; contiguous tensors and arrays stand for their address.

    Raises:
        KernelError: if the function fails.
    """
    call_plain(name, *map(_convert, arguments))


def call_plain(name: str, *arguments: Any) -> None:
    """:func:`call` with addresses alone."""
    if LIBRARY is None:
        raise KernelError(WHY_REFERENCE)
    if getattr(LIBRARY, name)(*arguments):
        raise KernelError(f"native kernel: {LIBRARY.lrq_last_error().decode()}")


def _convert(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument.ctypes.data if isinstance(argument, np.ndarray) else argument


def is_available() -> bool:
    """Whether the library computes, and not the torch reference.

    Raises:
        KernelError: if that cannot be said: the library or LRQDIT_KERNELS is at fault.
    """
    if IS_FAULT:
        raise KernelError(WHY_REFERENCE)
    return LIBRARY is not None


def use(name: str) -> None:
    """Run on one instruction set; KernelError if it is unknown or this CPU lacks it."""
    if LIBRARY is None:
        raise KernelError(f"{name}: {WHY_REFERENCE}")
    call("lrq_use_isa", name.encode())


def describe() -> list[str]:
    """What runs on this CPU and why nothing better, one line each."""
    if LIBRARY is None:
        return [f"CPU kernels: {'none' if IS_FAULT else 'torch reference'} ({WHY_REFERENCE})"]
    lines = [f"CPU kernels: native, {LIBRARY.lrq_isa().decode()}, {torch.get_num_threads()} threads"]
    for name, missing in instruction_sets(LIBRARY).items():
        if name == LIBRARY.lrq_isa().decode():
            break
        lines.append(f"  not {name}: {missing or f'{ENVIRONMENT} chose another'}")
    if not LIBRARY.lrq_is_parallel():
        lines.append("  one thread only: the compiler had no OpenMP; install it (libomp) and reinstall lrqdit")
    return lines


def _start() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why the torch reference runs.

    Raises:
        KernelError: if the library cannot be loaded or LRQDIT_KERNELS cannot be followed.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted == "triton":
        raise KernelError(f"{ENVIRONMENT}=triton: it chooses for the CPU; unset it and set LRQDIT_GPU_KERNELS=triton")
    if wanted == "reference":
        return None, f"{ENVIRONMENT}=reference"
    path = find_library()
    if path is None:
        if wanted:
            raise KernelError(f"{ENVIRONMENT}={wanted}, but {_NOT_BUILT}, or unset it")
        return None, _NOT_BUILT
    library = load(path)
    if wanted and library.lrq_use_isa(wanted.encode()):
        known = ", ".join(["reference", *instruction_sets(library)])
        raise KernelError(f"{ENVIRONMENT}={wanted}: {library.lrq_last_error().decode()}; set {known}, or unset it")
    return library, ""


IS_FAULT = False
try:
    LIBRARY, WHY_REFERENCE = _start()
except KernelError as _error:
    LIBRARY, WHY_REFERENCE, IS_FAULT = None, str(_error), True
