"""One denoising step of PixArt-Sigma XL/2 (full size, random weights) in bfloat16 and quantized; the last line is JSON.

Run: python -m benchmarks.speed.bench_step [--threads 2] [--preset w4a8] [--pixels 512] [--repeats 5] [--layers 28]

The step is the transformer's, with classifier-free guidance (a batch of two), 300 caption tokens. The bfloat16 model
runs with torch's attention, as it does without this package, and once more with ours. Times are interleaved in one
process. Memory is measured in a fresh process for each: the peak of the resident set while loading the saved model and
running one step, less what the process held before loading.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

import lrqdit
from benchmarks.machine import read_processor
from lrqdit import native
from lrqdit.kernels import cpu_attention as attention
from lrqdit.packed.linear import QuantLinear

CONFIG = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "patch_size": 2,
    "caption_channels": 4096,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "num_embeds_ada_norm": 1000,
    "use_additional_conditions": False,
}
CAPTION_TOKENS = 300
WITH_OURS = "bfloat16, our attention"


def build(pixels: int, layers: int) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**{**CONFIG, "sample_size": pixels // 8, "num_layers": layers}).bfloat16().eval()


def inputs(pixels: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, pixels // 8, pixels // 8, generator=generator).repeat(2, 1, 1, 1)
    captions = torch.randn(2, CAPTION_TOKENS, CONFIG["caption_channels"], generator=generator)
    return {
        "hidden_states": latents.bfloat16(),
        "encoder_hidden_states": captions.bfloat16(),
        "encoder_attention_mask": torch.ones(2, CAPTION_TOKENS),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no /proc/self/status: memory can be measured on Linux only")


def measure_memory(folder: str, pixels: int) -> None:
    """Child process: load the model in a folder, run one step, print the peak above the start."""
    step = inputs(pixels)
    before = memory("VmRSS")
    model = PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with torch.no_grad():
        model(**step)
    print(memory("VmHWM") - before)


def time_layers(model: nn.Module, step: dict) -> dict[str, float]:
    """Seconds of one step by kind of layer, attention as what is left of the attention blocks."""
    totals: dict[str, float] = defaultdict(float)
    starts: dict[nn.Module, float] = {}
    handles = []

    def watch(module: nn.Module, kind: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda m, _: starts.__setitem__(m, time.perf_counter())))

        def stop(m: nn.Module, *_: object) -> None:
            totals[kind] += time.perf_counter() - starts[m]

        handles.append(module.register_forward_hook(stop))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, QuantLinear)):
            watch(module, "linear layers")
            if ".attn" in name:
                watch(module, "linear layers of attention")
        elif name.endswith((".attn1", ".attn2")):
            watch(module, "attention blocks")
        elif isinstance(module, (nn.LayerNorm,)):
            watch(module, "norms")
    start = time.perf_counter()
    model(**step)
    whole = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    attention = totals["attention blocks"] - totals["linear layers of attention"]
    rest = whole - totals["linear layers"] - attention - totals["norms"]
    parts = {"linear layers": totals["linear layers"], "attention itself": attention, "norms": totals["norms"]}
    return {**parts, "the rest (GELU, modulation, residuals, embeddings)": rest, "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--preset", default="w4a8")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=CONFIG["num_layers"], help="fewer for a quick look")
    parser.add_argument("--measure-memory", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory:
        return measure_memory(arguments.measure_memory, arguments.pixels)
    print(f"{read_processor()}, {arguments.threads} threads, torch {torch.__version__}")
    print("\n".join([*native.describe(), attention.describe()]))
    step = inputs(arguments.pixels)
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = build(arguments.pixels, arguments.layers), build(arguments.pixels, arguments.layers)
        start = time.perf_counter()
        report = lrqdit.quantize(quantized, arguments.preset, is_calibrated=False, show_progress=False)
        print(f"quantized in {time.perf_counter() - start:.0f} s, {report.size.true_bits:.2f} bits a parameter")
        for name, model in (("bfloat16", plain), (arguments.preset, quantized)):
            model.save_pretrained(f"{folder}/{name}")
            command = [sys.executable, "-m", "benchmarks.speed.bench_step", "--measure-memory", f"{folder}/{name}",
                       "--threads", str(arguments.threads), "--pixels", str(arguments.pixels)]  # fmt: skip
            child = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[name] = int(child.stdout.split()[-1])
    ours = attention.current()  # since the model is quantized
    models = {"bfloat16": (plain, "torch"), WITH_OURS: (plain, ours), arguments.preset: (quantized, ours)}
    times: dict[str, list[float]] = {name: [] for name in models}
    parts = {}
    with torch.no_grad():
        for repeat in range(arguments.repeats + 1):
            for name, (model, kernel) in models.items():
                with attention.use(kernel):
                    start = time.perf_counter()
                    model(**step)
                    if repeat:
                        times[name].append(time.perf_counter() - start)
        for name, (model, kernel) in models.items():
            with attention.use(kernel):
                parts[name] = time_layers(model, step)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\none step at {arguments.pixels} px, batch 2; medians of {arguments.repeats} in turns")
    for name in models:
        memory_used = f"   peak memory {peaks[name] / 2**20:7.0f} MiB above the start" if name in peaks else ""
        print(f"  {name:<24}{medians[name]:8.3f} s{memory_used}")
    print(f"\n  {'where a step goes':<52}" + "".join(f"{name:>24}" for name in models))
    for part in parts["bfloat16"]:
        print(f"  {part:<52}" + "".join(f"{parts[name][part]:22.3f} s" for name in models))
    result = {
        "machine": {"processor": read_processor(), "threads": arguments.threads},
        "preset": arguments.preset,
        "pixels": arguments.pixels,
        "threads": arguments.threads,
        "layers": arguments.layers,
        "ratio_to_bf16": medians["bfloat16"] / medians[arguments.preset],
        "ratio_to_bf16_with_our_attention": medians[WITH_OURS] / medians[arguments.preset],
        "memory_ratio": peaks[arguments.preset] / peaks["bfloat16"],
        "parts": parts,
    }
    print(
        f"\n{result['ratio_to_bf16']:.2f} x as fast as bfloat16, {result['memory_ratio']:.2f} x its memory; "
        f"{result['ratio_to_bf16_with_our_attention']:.2f} x as fast as bfloat16 with our attention"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
