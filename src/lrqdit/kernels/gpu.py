"""The operators on a GPU (dispatch key CUDA: NVIDIA and ROCm): Triton kernels where the device has them.

Triton is imported at the first call on a GPU. Where the kernels cannot run, the torch reference does, from the same
packed weights, and :func:`choose_kernels` says why.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lrqdit.errors import ConfigError
from lrqdit.kernels import ops

OVERRIDE = "LRQDIT_GPU_KERNELS"  # environment variable: one of KERNELS; what is fastest and works if not set
KERNELS = ("triton", "reference")
SMALLEST_CAPABILITY = (8, 0)
MODULES = {
    "quantize_tokens": "lrqdit.kernels.triton_prologue",
    "quantized_linear": "lrqdit.kernels.triton_gemm",
    "weight_only_linear": "lrqdit.kernels.triton_gemm",
}


@dataclass(frozen=True)
class Choice:
    """Which kernels a device uses, one of KERNELS, and why."""

    kernels: str
    reason: str


def read_choice() -> str:
    """The value of LRQDIT_GPU_KERNELS, "" if it is not set; ConfigError if it is none of KERNELS."""
    wanted = os.environ.get(OVERRIDE, "")
    if wanted not in ("", *KERNELS):
        raise ConfigError(f"{OVERRIDE}={wanted!r} is not one of {', '.join(KERNELS)}; set one of them, or unset it")
    return wanted


@functools.cache
def choose_kernels(device: torch.device) -> Choice:
    """Decide once per process and device.

    Args:
        device: a CUDA (or ROCm) device.

    Raises:
        ConfigError: if LRQDIT_GPU_KERNELS is set to something else, or to triton where it is not installed.
    """
    wanted = read_choice()
    if wanted == "reference":
        return Choice("reference", f"{OVERRIDE}=reference")
    if importlib.util.find_spec("triton") is None:
        if wanted:
            raise ConfigError(f"{OVERRIDE}={wanted}, but Triton is not installed; pip install triton, or unset it")
        return Choice("reference", "Triton is not installed: pip install triton (or triton-windows)")
    if wanted:
        return Choice("triton", f"{OVERRIDE}=triton")
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < SMALLEST_CAPABILITY:
        least, found = (".".join(map(str, version)) for version in (SMALLEST_CAPABILITY, capability))
        return Choice("reference", f"Triton needs compute capability {least}, this device has {found}")
    return Choice("triton", "int8 tensor cores; the plan of each shape is measured on its first call")


def _make_operator(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        device = args[0].device  # of x, or of Tokens
        if choose_kernels(device).kernels == "reference":
            return ops.REFERENCE[name](*args)
        with torch.cuda.device(device):
            return getattr(importlib.import_module(MODULES[name]), name)(*args)

    return call


ops.register("CUDA", {name: _make_operator(name) for name in MODULES})
