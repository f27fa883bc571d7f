"""The machine that a benchmark ran on."""

import ctypes
import math
import platform
import re
import time
from pathlib import Path

import torch

from lrqdit import native


def read_processor() -> str:
    """Return the processor's model."""
    path = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else []
    return models[0] if models else platform.processor() or platform.machine()


def measure_peak(iterations: int = 1_000_000, function: str = "lrq_repeat_dots") -> float:
    """Operations per second (a multiply and an add are two) of dot products on registers, on all threads: integers, or
    bfloat16 by ``"lrq_repeat_pairs"``."""
    operations, best = ctypes.c_int64(), math.inf
    for _ in range(5):
        start = time.perf_counter()
        native.call(function, iterations, torch.get_num_threads(), operations)
        best = min(best, time.perf_counter() - start)
    return operations.value / best
