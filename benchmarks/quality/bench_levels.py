"""Relative squared error of the int8 levels times their scale, by codebook and bits; the last line is JSON.

Run: python -m benchmarks.quality.bench_levels [--rows 1024] [--threads 1]. It takes well under a minute.
"""

import argparse
import json
import re
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import read_processor
from lrqdit.app.demo import find_model
from lrqdit.config import TRELLIS_BITS
from lrqdit.numerics import trellis
from lrqdit.numerics.codebook import fit, relative_error

IN_FEATURES = 1152
BITS = (6, 5, 4, 3, 2)
SCALES = (1e-6, 1e-4, 1e-2, 0.03, 1.0, 1e3)
COLUMNS = {
    "twin_log": ("twin_log", "layer"),
    "trellis": ("twin_log", "trellis"),
    "twin_log_row": ("twin_log", "row"),
    "uniform": ("uniform", "layer"),
    "minmax": ("minmax", "row"),
    "lloyd_max": ("lloyd_max", "layer"),
    "lloyd_max_row": ("lloyd_max", "row"),
}
DEMO_NAMES = re.compile(r"transformer_blocks\..*\.?(attn|ff).*weight$")
DEMO_WEIGHTS = 4_000_000


def measure(weights: list[Tensor], bits: int, kind: str, scope: str) -> float:
    """Return the mean of the weights' relative errors; scope "trellis" doubles the levels of the layer's table,
    up to 5 bits."""
    errors, is_trellis = [], scope == "trellis" and bits in TRELLIS_BITS
    for weight in weights:
        levels = fit(weight, bits, kind, scope="layer" if scope == "trellis" else scope)
        errors.append(relative_error(weight, trellis.expand(levels, weight) if is_trellis else levels))
    return sum(errors) / len(errors)


def measure_all(title: str, weights: list[Tensor]) -> dict[str, dict[str, float]]:
    """Print a table of errors and return it, column -> bits -> error."""
    errors = {
        column: {str(bits): measure(weights, bits, *choice) for bits in BITS} for column, choice in COLUMNS.items()
    }
    print(f"\n{title}\nbits" + "".join(f"{column:>15}" for column in errors))
    for bits in BITS:
        print(f"{bits:>4}" + "".join(f"{column[str(bits)]:>15.5f}" for column in errors.values()))
    return errors


def measure_scales(weight: Tensor) -> dict[str, dict[str, float]]:
    """Print and return the Twin-Log errors of the same weight at several scales, bits -> scale -> error."""
    print("\nGaussian, twin_log, one table for the layer, by the scale of the weights")
    print("bits" + "".join(f"{scale:>12g}" for scale in SCALES) + "   largest relative deviation")
    results = {}
    for bits in BITS:
        errors = [measure([weight * scale], bits, "twin_log", "layer") for scale in SCALES]
        deviation = max(errors) / min(errors) - 1
        print(f"{bits:>4}" + "".join(f"{error:>12.6f}" for error in errors) + f"   {deviation:.1e}")
        results[str(bits)] = {f"{scale:g}": error for scale, error in zip(SCALES, errors, strict=True)}
    return results


def read_demo_weights() -> list[Tensor]:
    """Return weights of the demo model's blocks, evenly drawn from its layers."""
    files = sorted((find_model() / "transformer").glob("*.safetensors"))
    from safetensors import safe_open

    weights = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in sorted(tensors.keys()) if DEMO_NAMES.search(name)]
            found = (tensors.get_tensor(name) for name in names)
            weights += [weight for weight in found if weight.ndim == 2 and weight.is_floating_point()]
    stride = max(1, -(-sum(weight.numel() for weight in weights) // DEMO_WEIGHTS))
    return weights[::stride]


def measure_seconds(call: Callable[[], object]) -> float:
    """Return the shortest of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_speed() -> dict[str, float]:
    """Print and return the seconds it takes to fit, encode and decode a weight (4608, 1152) at 4 bits."""
    weight = torch.randn(4608, IN_FEATURES, generator=torch.Generator().manual_seed(2))
    codebook = fit(weight, 4)
    codes = codebook.encode(weight)
    results = {
        "fit_layer_seconds": measure_seconds(lambda: fit(weight, 4)),
        "fit_row_seconds": measure_seconds(lambda: fit(weight, 4, scope="row")),
        "encode_seconds": measure_seconds(lambda: codebook.encode(weight)),
        "decode_seconds": measure_seconds(lambda: codebook.decode(codes)),
    }
    print("\n4608 x 1152, twin_log, 4 bits: " + ", ".join(f"{name} {value:.3f}" for name, value in results.items()))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {"processor": read_processor(), "threads": arguments.threads, "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("relative squared error of the int8 table times the row's scale; one table for the layer unless '_row'")
    shape = (arguments.rows, IN_FEATURES)
    gaussian = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    student = torch.from_numpy(np.random.default_rng(1).standard_t(4, shape)).float()
    errors = measure_all(f"Gaussian rows, {shape[0]} x {shape[1]}", [gaussian])
    scales = measure_scales(gaussian)
    student_errors = measure_all(f"Student-t rows, 4 degrees of freedom, {shape[0]} x {shape[1]}", [student])
    weights = read_demo_weights()
    demo = measure_all(f"Demo model, mean over {len(weights)} layers of its blocks, not rotated", weights)
    results = {
        "machine": machine,
        "gaussian": {bits: max(by_scale.values()) for bits, by_scale in scales.items()},
        **{column: by_bits for column, by_bits in errors.items() if column != "twin_log"},
        "scales": scales,
        "student_t": student_errors["twin_log"],
        "student_t_all": student_errors,
        "demo": demo["twin_log"] if demo else None,
        "demo_all": demo,
        "speed": measure_speed(),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
