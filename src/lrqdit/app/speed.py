"""What a device gains: a few layers, packed ones beside float ones, measured in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lrqdit.config import QuantizationConfig
from lrqdit.packed.dummy import random_layer

# (tokens, in_features, out_features): PixArt at 512 pixels, FLUX at 1024 and 512 pixels, FLUX's modulation
SHAPES = ((1024, 1152, 1152), (1024, 1152, 4608), (4096, 3072, 3072), (1536, 3072, 12288), (1, 3072, 18432))
MIN_RUNS, MAX_RUNS = 2, 100


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> list[float]:
    """Median milliseconds of each call, measured in turns after one untimed round.

    Args:
        calls: what to run; each is warmed up first.
        device: of their tensors; CUDA events are used where there are any.
        seconds: stop after about this time (at least MIN_RUNS rounds).
    """
    for call in calls:
        call()
    _synchronize(device)
    times: list[list[float]] = [[] for _ in calls]
    end = time.monotonic() + seconds
    for number in range(MAX_RUNS):
        if number >= MIN_RUNS and time.monotonic() > end:
            break
        for call, found in zip(calls, times, strict=True):
            found.append(_time_once(call, device))
    return [statistics.median(found) for found in times]


def _time_once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    _synchronize(device)
    return 1000 * (time.perf_counter() - begin)


def _synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def measure_layers(device: torch.device, seconds: float = 60.0, preset: str = "w4a8") -> list[dict[str, Any]]:
    """Time a float linear layer against a packed one at SHAPES.

    Args:
        device: where to run; bfloat16 everywhere but on MPS (float16).
        seconds: for all shapes together, about.
        preset: of the packed layer; the modulation layer of one token is weight-only.

    Returns:
        One dictionary per shape: tokens, in_features, out_features, float_ms, packed_ms, speedup (above 1: faster).
    """
    config = QuantizationConfig.from_name(preset)
    dtype = torch.float16 if device.type == "mps" else torch.bfloat16
    rows = []
    for tokens, in_features, out_features in SHAPES:
        activation_bits = config.activation_bits if tokens > 1 else 16
        x = torch.randn(tokens, in_features, device=device, dtype=dtype)
        dense = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        packed = random_layer(in_features, out_features, config.weight_bits, activation_bits, device)
        with torch.no_grad():
            calls = [lambda layer=layer, x=x: layer(x) for layer in (dense, packed)]
            float_ms, packed_ms = time_calls(calls, device, seconds / len(SHAPES))
        rows.append({
            "tokens": tokens, "in_features": in_features, "out_features": out_features,
            "float_ms": float_ms, "packed_ms": packed_ms, "speedup": float_ms / packed_ms,
        })  # fmt: skip
    return rows
