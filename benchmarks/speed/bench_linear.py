"""A quantized linear layer beside float and int8 ones, interleaved in one process; the last line is JSON.

Run: python -m benchmarks.speed.bench_linear [--threads 2] [--presets w4a8,w4a4] [--seconds 3] [--shapes pixart,flux]

Every contender is a whole layer, bfloat16 in and out, if not said otherwise; ours includes centring, smoothing,
rotation and quantization of its input. That prologue is timed by itself, where it waits for memory, and as what it
adds to the product inside the layer. These inputs have no principal part that pays; what one costs at 4-bit
activations is a line of its own. torchao, onnxruntime and OpenVINO take part where they are installed, each with
its fastest setting known to us. Their waiting threads slow whoever comes next, so they take rounds of many calls in
turns with ours, a pause between; the median of the ratios of neighbouring rounds counts.

Caches: each timed call follows an untimed one of the same contender, so that all find their own weights in the caches
as far as they fit, whoever ran before. Below 1024 tokens this decides, so the other end is measured, too: before each
"cold" call more memory than the last cache holds is written, which drives out everything, the interpreter included.

On a machine that others use, too, --clock cpu counts the process's CPU time over its threads; they should wait
passively then (OMP_WAIT_POLICY=passive). It does not see threads that wait for each other.

Output buffers: a fresh large block costs page faults that every library pays alike. By default malloc is told to keep
and reuse freed memory (glibc only), for all contenders; --fresh-buffers leaves it alone.
"""

import argparse
import ctypes
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import lrqdit
from benchmarks.machine import measure_peak, read_processor
from lrqdit import native
from lrqdit.config import QuantizationConfig
from lrqdit.packed.linear import QuantLinear

SHAPES = {
    "pixart": [(m, k, n) for m in (1024, 4096) for k, n in ((1152, 1152), (1152, 4608), (4608, 1152))],
    "flux": [(1536, 3072, 3072), (1536, 3072, 12288), (1536, 12288, 3072)],
    "small": [(1, 1152, 6912), (8, 1152, 1152), (120, 1152, 1152)],
}
ROUNDS, PAUSE = 5, 0.1  # of a peer and ours; seconds
FEW_TOKENS = 1024  # below, what is in the caches decides
FLUSH_BYTES = 256 << 20  # more than a last cache holds
DIRECTIONS = QuantizationConfig().principal_rank
CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": lambda: time.process_time() / torch.get_num_threads(),
}
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse freed blocks of any size."""
    try:
        libc = ctypes.CDLL(None)
        return all(libc.mallopt(option, 2**31 - 1) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
    except (AttributeError, OSError):
        return False


def activations(rows: int, width: int) -> torch.Tensor:
    """Tokens with a few large channels and offsets, as a transformer's."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator)
    salient = torch.randperm(width, generator=generator)[: max(1, width // 128)]
    x[:, salient] = x[:, salient] * 8 + 5
    return x.bfloat16()


def build_ours(linear: nn.Linear, preset: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features)).bfloat16()
    model.load_state_dict({"0.weight": linear.weight, "0.bias": linear.bias})
    sample = activations(256, linear.in_features)
    lrqdit.quantize(model, preset, forward_loop=lambda m: m(sample), show_progress=False, rounding="nearest")
    return model[0]


def build_product(layer: QuantLinear, x: torch.Tensor) -> Callable:
    """What is left of a layer once its input is rounded."""
    tokens = layer.quantize_input(x)
    calls = layer.calls if layer.calls.prepare(x, x.dtype, layer) else layer.arguments()
    return lambda: calls.quantized_linear(tokens, x.dtype)


def build_torchao(linear: nn.Linear, x: torch.Tensor) -> Callable:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features)).bfloat16()
    model.load_state_dict({"0.weight": linear.weight, "0.bias": linear.bias})
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with torch.no_grad():
        compiled(x)
    return lambda: compiled(x)


def build_onnxruntime(linear: nn.Linear, x: torch.Tensor) -> Callable:
    import tempfile
    from pathlib import Path

    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper, save
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "plain.onnx", Path(folder) / "quantized.onnx"
        weight = numpy_helper.from_array(linear.weight.detach().float().t().contiguous().numpy(), "w")
        bias = numpy_helper.from_array(linear.bias.detach().float().numpy(), "b")
        nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
        ends = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])]
            for name, width in (("x", linear.in_features), ("y", linear.out_features))
        ]
        model = helper.make_model(
            helper.make_graph(nodes, "linear", *ends, [weight, bias]), opset_imports=[helper.make_opsetid("", 17)]
        )
        model.ir_version = 9
        save(model, plain)
        quantize_dynamic(plain, quantized, weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(quantized), options)
    values = x.float().numpy()
    return lambda: session.run(None, {"x": values})


def add_principal_part(layer: nn.Module) -> nn.Module:
    """The layer with as many directions beside its codes as the default takes at most, of random entries."""
    inputs = dataclasses.replace(layer.format.input, principal_rank=DIRECTIONS)
    changed = QuantLinear(dataclasses.replace(layer.format, input=inputs), torch.bfloat16)
    state = layer.state_dict()
    for name, width in (("principal", layer.in_features), ("outlet", layer.out_features)):
        state[name] = torch.randint(-127, 128, (DIRECTIONS, width), dtype=torch.int8)
        state[f"{name}_scale_bits"] = torch.full((DIRECTIONS,), 1e-3).view(torch.int32)
    changed.load_state_dict(state)
    return changed


def build_openvino(linear: nn.Linear, x: torch.Tensor) -> Callable:
    import nncf
    import openvino

    dense = nn.Sequential(nn.Linear(linear.in_features, linear.out_features))
    dense.load_state_dict({"0.weight": linear.weight.float(), "0.bias": linear.bias.float()})
    model = openvino.convert_model(dense, example_input=x.float())
    model = nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=-1, ratio=1.0, all_layers=True
    )
    options = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(linear.in_features),
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "bf16",
    }
    request = openvino.compile_model(model, "CPU", options).create_infer_request()
    values = openvino.Tensor(x.float().numpy())
    return lambda: request.infer([values], share_inputs=True, share_outputs=True)


PEERS = {
    "torchao int8 dynamic, compiled": build_torchao,
    "onnxruntime int8 dynamic (float32 in and out)": build_onnxruntime,
    "OpenVINO int4, dynamic group K (float32 in and out)": build_openvino,
}


def measure(
    contenders: dict[str, Callable], seconds: float, is_cold: bool = False, clock: str = "wall"
) -> dict[str, float]:
    """Median time of each by one of CLOCKS, in turns, after an untimed call of the same contender or with cold caches.

    Every turn has another order: who follows the one that sweeps most out of the caches pays for it.
    """
    other = torch.zeros(FLUSH_BYTES if is_cold else 0, dtype=torch.uint8)
    for call in contenders.values():
        call(), call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    turns, order, now = random.Random(0), list(contenders.items()), CLOCKS[clock]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0][0]]) < 5:
        turns.shuffle(order)
        for name, call in order:
            other.add_(1) if is_cold else call()
            start = now()
            call()
            times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare_in_rounds(peer: dict[str, Callable], ours: dict[str, Callable], seconds: float) -> float:
    """Median of a peer's time over ours, in ROUNDS rounds of each in turns, as long as all take."""
    ratios = []
    for _ in range(ROUNDS):
        pair = []
        for contender in (peer, ours):
            time.sleep(PAUSE)  # a peer's threads spin for a while
            pair += measure(contender, seconds / 2 / ROUNDS).values()
        ratios.append(pair[0] / pair[1])
    return statistics.median(ratios)


def measure_shape(
    shape: tuple[int, int, int], presets: list[str], seconds: float, has_peers: bool, clock: str
) -> list[dict]:
    rows, in_features, out_features = shape
    linear = nn.Linear(in_features, out_features).bfloat16().requires_grad_(False)
    x = activations(rows, in_features)
    wide, wide_x = nn.Linear(in_features, out_features).requires_grad_(False), x.float()
    ours = {preset: build_ours(linear, preset) for preset in presets}
    dense = torch.randint(-127, 128, (in_features, out_features)).to(torch.int8)
    codes = torch.randint(-127, 128, (rows, in_features)).to(torch.int8)
    contenders: dict[str, Callable] = {
        "bfloat16 F.linear": lambda: F.linear(x, linear.weight, linear.bias),
        "float32 F.linear": lambda: F.linear(wide_x, wide.weight, wide.bias),
        "torch._int_mm alone": lambda: torch._int_mm(codes, dense),
    }
    for preset, layer in ours.items():
        contenders[f"ours {preset}"] = lambda layer=layer: layer(x)
        if preset.endswith("a4"):
            wider = add_principal_part(layer)
            contenders[f"  {preset} with {DIRECTIONS} directions beside its codes"] = lambda wider=wider: wider(x)
        contenders[f"  prologue of {preset}"] = lambda layer=layer: layer.quantize_input(x)
        contenders[f"  product of {preset}"] = build_product(layer, x)
    with torch.no_grad():
        times = measure(contenders, seconds, clock=clock)
        cold = measure(contenders, seconds, is_cold=True, clock=clock) if rows < FEW_TOKENS else {}
        peak = measure_peak() if native.is_available() else math.nan
        ratios, own = {}, {"ours": contenders[f"ours {presets[0]}"]}
        for name, build in PEERS.items() if has_peers else ():
            try:
                ratios[name] = compare_in_rounds({name: build(linear, x)}, own, seconds)
            except ImportError as error:
                print(f"  {name}: not installed ({error.name})")
            except Exception as error:  # a peer that fails must not end the benchmark, and is named
                print(f"  {name}: failed ({type(error).__name__}: {str(error)[:100]})")
    rotations = ", ".join(
        f"{layer.format.input.rotation} {layer.format.input.factors} ({p})" for p, layer in ours.items()
    )
    print(f"\nM, K, N = {rows}, {in_features}, {out_features}; rotations {rotations}")
    base = times["bfloat16 F.linear"]
    for name, seconds_each in times.items():
        line = f"  {name:<52}{seconds_each * 1e3:10.3f} ms   {base / seconds_each:6.2f} x bfloat16"
        print(
            line
            + (f"   cold {cold[name] * 1e3:10.3f} ms {cold['bfloat16 F.linear'] / cold[name]:6.2f} x" if cold else "")
        )
    for name, ratio in ratios.items():
        print(f"  {presets[0]} over {name:<48}{ratio:6.2f} x")
    results = []
    for preset in presets:
        whole = times[f"ours {preset}"]
        results.append(
            {
                "shape": list(shape),
                "preset": preset,
                "rotation": ours[preset].format.input.rotation,
                "factors": list(ours[preset].format.input.factors),
                "ratio_to_bf16": base / whole,
                "cold_ratio_to_bf16": cold["bfloat16 F.linear"] / cold[f"ours {preset}"] if cold else None,
                "ratio_to_fp32": times["float32 F.linear"] / whole,
                "time_over_int_mm": whole / times["torch._int_mm alone"],
                "prologue_share": times[f"  prologue of {preset}"] / whole,
                "prologue_share_inside": 1 - times[f"  product of {preset}"] / whole,
                "peak_fraction": 2 * math.prod(shape) / whole / peak,
                "ratio_to_peers": ratios if preset == presets[0] else {},
            }
        )
    print(f"  whole layer at {results[0]['peak_fraction']:.0%} of {peak / 1e9:.0f} Gop/s, the peak measured just now")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--presets", default="w4a8,w4a4,w3a8")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--fresh-buffers", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    is_kept = not arguments.fresh_buffers and keep_freed_memory()
    print(f"{read_processor()}, {arguments.threads} threads, torch {torch.__version__}")
    print("\n".join(native.describe()))
    print(f"freed memory is {'kept and reused' if is_kept else 'left to malloc'}, for every contender")
    presets = arguments.presets.split(",")
    layers = []
    for group in arguments.shapes.split(","):
        for shape in SHAPES[group]:
            layers += measure_shape(shape, presets, arguments.seconds, not arguments.without_peers, arguments.clock)
    large = [layer["ratio_to_bf16"] for layer in layers if layer["shape"][0] >= 1024]
    machine = {"processor": read_processor(), "threads": arguments.threads}
    how = {"threads": arguments.threads, "clock": arguments.clock, "buffers_reused": is_kept}
    summary = {"machine": machine, "isa": native.describe()[0], **how}
    if large:
        summary |= {"geometric_mean": statistics.geometric_mean(large), "smallest": min(large)}
        print(
            f"\nM >= 1024: {summary['geometric_mean']:.2f} x bfloat16 in the geometric mean, at least {min(large):.2f}"
        )
    print(json.dumps({"layers": layers, **summary}))


if __name__ == "__main__":
    main()
