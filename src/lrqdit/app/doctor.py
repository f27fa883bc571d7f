"""What this machine's CPU and GPUs will do: which kernels are chosen, and why not better ones."""

import importlib.metadata
from typing import Any

import torch

from lrqdit import native
from lrqdit.app.speed import time_calls
from lrqdit.errors import LrqditError, first_line
from lrqdit.kernels import cpu_attention as attention
from lrqdit.kernels import gpu

SIDE = 4096  # of the square products that compare int8 with bfloat16
SLOW_INT8 = 1.2  # below this ratio int8 tensor cores are no reason to quantize activations


def describe_devices(measure: bool = False) -> list[dict[str, Any]]:
    """Facts about every GPU; empty if there is none.

    Args:
        measure: time a large int8 product against a bfloat16 one on each device (about a second).

    Returns:
        One dictionary per device: device, name, memory_bytes, kernels, reason, notes (a list of sentences); for CUDA
        devices compute_capability; with ``measure`` int8_over_bfloat16, or a note saying why it could not be measured.
    """
    devices = [_describe_cuda(torch.device("cuda", index), measure) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        reason = "Triton has no back end for Metal"
        devices.append({"device": "mps", "name": "Apple GPU", "kernels": "reference", "reason": reason, "notes": []})
    return devices


def describe(measure: bool = False) -> list[str]:
    """The same as lines of text, with the versions of torch and Triton first. What is at fault is told, not raised."""
    lines = [f"torch {torch.__version__}, triton {_triton_version() or 'not installed'}", *native.describe()]
    devices = []
    try:
        lines.append(attention.describe())
    except LrqditError as error:
        lines.append(f"CPU attention: {error}")
    try:
        gpu.read_choice()
        devices = describe_devices(measure)
        if not devices:
            lines.append("no GPU")
    except (LrqditError, RuntimeError) as error:
        lines.append(f"GPU kernels: {first_line(error)}")
    for facts in devices:
        capability = f", compute capability {facts['compute_capability']}" if "compute_capability" in facts else ""
        memory = f", {facts['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in facts else ""
        lines.append(f"{facts['device']}: {facts['name']}{capability}{memory}")
        lines.append(f"  kernels: {facts['kernels']} ({facts['reason']})")
        lines += [f"  {note}" for note in facts["notes"]]
    return lines


def _triton_version() -> str | None:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _describe_cuda(device: torch.device, measure: bool) -> dict[str, Any]:
    properties, choice = torch.cuda.get_device_properties(device), gpu.choose_kernels(device)
    facts: dict[str, Any] = {
        "device": str(device),
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "kernels": choice.kernels,
        "reason": choice.reason,
        "notes": [],
    }
    if choice.kernels == "reference":
        facts["notes"].append("layers stay packed, so memory is saved; each call decodes its weight and is slow")
    if measure:
        try:
            ratio = facts["int8_over_bfloat16"] = measure_int8(device)
        except RuntimeError as error:
            facts["notes"].append(f"int8 speed could not be measured: {error}")
            return facts
        verdict = (
            "int8 is slow here: where it measures faster the kernels multiply the same codes in float16"
            if ratio < SLOW_INT8
            else "int8 pays off"
        )
        facts["notes"].append(f"int8 products run at {ratio:.2f} times the speed of bfloat16: {verdict}")
    return facts


def measure_int8(device: torch.device) -> float:
    """Speed of ``torch._int_mm`` over that of a bfloat16 product, both SIDE x SIDE x SIDE.

    Raises:
        RuntimeError: if the device has no int8 product.
    """
    a = torch.randint(-127, 128, (SIDE, SIDE), device=device, dtype=torch.int8)
    b = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    int8_ms, float_ms = time_calls([lambda: torch._int_mm(a, a.t()), lambda: b @ b.t()], device, 0.5)
    return float_ms / int8_ms
