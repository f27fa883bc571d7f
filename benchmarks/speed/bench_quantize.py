"""Weights per second of quantizing: folding the rotation, fitting levels, encoding, packing; the last line is JSON.

Compared in one process, interleaved, medians: the native library, the numpy and torch reference, a grid search as the
paper's released code does it, and the quantizers of other packages where they are installed. The setting is twin_log,
4 bits, one table for the layer, a full Hadamard rotation, rounding to nearest; with a trellis, the nearest path.

Run: python -m benchmarks.speed.bench_quantize [--rounds 5] [--threads 2]. It takes about two minutes.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import read_processor
from lrqdit import QuantizationConfig, native
from lrqdit.fitting.transform import data_free_transform
from lrqdit.kernels import ops
from lrqdit.numerics import codebook, trellis
from lrqdit.numerics.packing import pack

SHAPES = ((4608, 1152), (1152, 4608), (3072, 3072), (12288, 3072), (3072, 12288))
SMALL_SHAPES = ((288, 288), (1152, 288), (288, 1152))  # of the demo model
BITS = 4
PHASES = ("fold", "fit", "encode", "pack")
FLUX_WEIGHTS = 12e9
TRELLIS = "native, trellis"
ETAS, CLIPS = 13, 25
GRID_ROWS = 64


@contextmanager
def reference() -> Iterator[None]:
    """The numpy and torch code instead of the native library."""
    library, native.LIBRARY = native.LIBRARY, None
    try:
        yield
    finally:
        native.LIBRARY = library


def quantize(
    weight: Tensor, fold: Callable[[Tensor], Tensor], has_trellis: bool = False
) -> tuple[dict[str, float], Tensor]:
    """The seconds of each phase, and the packed codes."""
    seconds, start = {}, time.perf_counter()
    result = weight
    for name in PHASES:
        if name == "fold":
            result = folded = fold(result)
        elif name == "fit":
            levels = codebook.fit(folded, BITS)
            if has_trellis:
                levels = trellis.expand(levels, folded)
        elif name == "encode":
            result = levels.encode(folded)
        else:
            result = pack(result, BITS)
        seconds[name] = time.perf_counter() - start - sum(seconds.values())
    return seconds, result


def search_grid(weight: np.ndarray) -> None:
    """Twin-Log levels per row as in the paper's code: for every η and clip percentiles, codes and the error anew."""
    best = np.full(len(weight), np.inf)
    largest = 2 ** (BITS - 1) - 1
    for eta in np.geomspace(1e-4, 1, ETAS):
        logs = np.log2(np.abs(weight) + eta)
        for clip in np.linspace(0, 6, CLIPS):
            lo, hi = np.percentile(logs, (clip, 100 - clip), 1, keepdims=True)
            step = np.maximum((hi - lo) / largest, 1e-9)
            codes = np.clip(np.rint((logs - lo) / step), 0, largest)
            levels = np.sign(weight) * (np.exp2(codes * step + lo) - eta)
            best = np.minimum(best, np.square(levels - weight).mean(1))


def find_peers() -> dict[str, Callable[[Tensor], object] | str]:
    """4-bit quantizers of other packages, or why one is not compared. They neither rotate nor search as we do."""

    def torchao(m):
        module = importlib.import_module("torchao.quantization.quant_primitives")
        kinds = module.MappingType.ASYMMETRIC, (1, 64), torch.int32

        def run(w):
            scale, zero = module.choose_qparams_affine(w, *kinds, 0, 15)
            return module.quantize_affine(w, (1, 64), scale, zero, torch.int32, 0, 15)

        return run

    def quanto(m):
        def run(w):
            scale, shift = m.MaxOptimizer()(w, m.qint4, 0, 64)
            return m.quantize_weight(w, m.qint4, 0, scale, shift, 64)

        return run

    def gguf(m):
        return lambda w: m.quantize(w.numpy(), m.GGMLQuantizationType.Q4_0)

    def bitsandbytes(m):
        return lambda w: m.functional.quantize_4bit(w, quant_type="nf4")

    def sdnq(m):
        return lambda w: m.sdnq_quantize_layer_weight(w, "Linear", weights_dtype="uint4", group_size=64)

    peers: dict[str, Callable[[Tensor], object] | str] = {}
    probe = torch.randn(256, 512)
    for name, package, build in (
        ("torchao int4, groups of 64", "torchao", torchao),
        ("optimum-quanto int4, groups of 64", "optimum.quanto", quanto),
        ("SDNQ uint4, groups of 64", "sdnq.quantizer", sdnq),
        ("gguf Q4_0", "gguf", gguf),
        ("bitsandbytes NF4", "bitsandbytes", bitsandbytes),
    ):
        try:
            peers[name] = build(importlib.import_module(package))
            peers[name](probe)
        except Exception as error:  # any package, any version: the comparison goes on without it
            is_absent = isinstance(error, ImportError)
            peers[name] = "not installed" if is_absent else f"failed: {type(error).__name__}: {error}"
    return peers


def measure(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(shape: tuple[int, int], rounds: int, peers: dict[str, Callable[[Tensor], object]]) -> dict:
    """Print and return weights per second, in all and by phase, of every way on one shape."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    transform = data_free_transform(shape[1], QuantizationConfig.from_name("w4a8"), 8)
    ways: dict[str, list[dict[str, float]]] = {name: [] for name in ("native", TRELLIS, "reference", *peers)}
    part = weight[:GRID_ROWS].numpy().astype(np.float64)
    ways["grid search"] = []
    for _ in range(rounds):
        ways["native"].append(quantize(weight, lambda w: ops.fold(transform, w))[0])
        ways[TRELLIS].append(quantize(weight, lambda w: ops.fold(transform, w), True)[0])
        with reference():
            ways["reference"].append(quantize(weight, lambda w: transform.rotation.apply(transform.unsmooth(w)))[0])
        for name, peer in peers.items():
            ways[name].append({"quantize": measure(lambda run=peer: run(weight))})
    slice_seconds = [measure(lambda: search_grid(part))]
    ways["grid search"] = [{"fit": seconds * len(weight) / len(part)} for seconds in slice_seconds]
    results = {}
    print(f"\n{shape[0]} x {shape[1]}, million weights per second")
    print(f"{'':>36}{'all':>9}" + "".join(f"{name:>9}" for name in PHASES))
    for name, runs in ways.items():
        phases = {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
        total = statistics.median(sum(run.values()) for run in runs)
        results[name] = {"all": weight.numel() / total} | {k: weight.numel() / v for k, v in phases.items()}
        shown = [f"{results[name][k] / 1e6:>9.1f}" if k in results[name] else " " * 9 for k in ("all", *PHASES)]
        print(f"{name:>36}" + "".join(shown))
    for name, way in (("seconds", "native"), ("trellis_seconds", TRELLIS)):
        results[name] = statistics.median(sum(run.values()) for run in ways[way])
    folded = ops.fold(transform, weight)
    with reference():
        expected = quantize(folded, lambda w: w)[1]
    results["is_identical"] = torch.equal(quantize(folded, lambda w: w)[1], expected)
    print(f"packed codes of both paths are {'identical' if results['is_identical'] else 'DIFFERENT'}")
    return results


def compare_small(rounds: int) -> dict[str, dict[str, float]]:
    """Print and return the milliseconds of one fit of a small layer."""
    print("\nfit of a small layer, milliseconds: native, reference")
    results = {}
    for shape in SMALL_SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {"native": [], "reference": []}
        for _ in range(4 * rounds):
            seconds["native"].append(measure(lambda w=weight: codebook.fit(w, BITS)))
            with reference():
                seconds["reference"].append(measure(lambda w=weight: codebook.fit(w, BITS)))
        name = f"{shape[0]}x{shape[1]}"
        results[name] = {way: 1e3 * statistics.median(runs) for way, runs in seconds.items()}
        print(f"{name:>12}" + "".join(f"{value:>9.1f}" for value in results[name].values()))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {"processor": read_processor(), "threads": arguments.threads, "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("\n".join(native.describe()))
    if not native.is_available():
        raise SystemExit("nothing to compare without the native library")
    peers = find_peers()
    for name, why in peers.items():
        if isinstance(why, str):
            print(f"{name}: {why}")
    print(f"grid search: {ETAS} η x {CLIPS} clips on {GRID_ROWS} rows, scaled to all; it has no folding and no packing")
    peers = {name: peer for name, peer in peers.items() if not isinstance(peer, str)}
    codebook.fit(torch.randn(64, 64), BITS)
    shapes = {f"{shape[0]}x{shape[1]}": compare(shape, arguments.rounds, peers) for shape in SHAPES}
    weights = sum(rows * columns for rows, columns in SHAPES)
    rate, trellis_rate = (
        weights / sum(results[name] for results in shapes.values()) for name in ("seconds", "trellis_seconds")
    )
    print("\nall shapes, million weights per second, and seconds for 12 billion")
    for name, value in (("native", rate), (TRELLIS, trellis_rate)):
        print(f"{name:>20} {value / 1e6:8.1f} {FLUX_WEIGHTS / value:6.0f}")
    results = {
        "machine": machine | {"kernels": native.describe()[0]},
        "setting": {"codebook": "twin_log", "bits": BITS, "scope": "layer", "rotation": "hadamard"},
        "weights_per_second": rate,
        "trellis_weights_per_second": trellis_rate,
        "is_identical": all(results["is_identical"] for results in shapes.values()),
        "shapes": shapes,
        "small_fit_milliseconds": compare_small(arguments.rounds),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
