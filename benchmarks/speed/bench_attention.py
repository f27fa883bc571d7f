"""Attention of bfloat16 tokens on the CPU: ours against torch's, at shapes of real models; the last line is JSON.

Run: python -m benchmarks.speed.bench_attention [--threads 2] [--seconds 1] [--shape 2,16,1024,1024,72 ...]

A shape is batch, heads, queries, keys, width of a head, and `mask` for an additive one by key. Tensors are laid out as
diffusers hands them over, (batch, tokens, heads, width) seen as (batch, heads, tokens, width). Times are medians of
calls in turns. The peak is that of bfloat16 products on registers, on all threads.
"""

import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.machine import measure_peak, read_processor
from lrqdit import native
from lrqdit.kernels import cpu_attention as attention

SHAPES = {
    "PixArt, 512 px": "2,16,1024,1024,72",
    "PixArt, 512 px, caption": "2,16,1024,300,72,mask",
    "PixArt, 1024 px": "2,16,4096,4096,72",
    "Stable Diffusion 3.5, 512 px": "1,24,1101,1101,64",
    "DiT, 256 px": "2,16,256,256,72",
    "Hunyuan-DiT, caption": "2,16,1024,333,88,mask",
    "FLUX, 512 px": "1,24,1536,1536,128",
    "Wan, 8192 tokens": "1,4,8192,8192,128",
    "CogVideoX, caption": "1,30,1024,226,64",
    "Stable Diffusion, caption": "2,8,1024,77,80",
    "Lumina, 96": "1,8,1024,1024,96",
    "112": "1,8,2048,512,112",
}


def measure(name: str, shape: str, seconds: float, peak: float) -> dict:
    """Median seconds of both kernels, called in turns for some seconds."""
    *numbers, last = [*shape.split(","), ""] if not shape.endswith("mask") else shape.split(",")
    batch, heads, queries, keys, width = map(int, numbers)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, n, heads, width, generator=generator).bfloat16().transpose(1, 2)
        for n in (queries, keys, keys)
    )
    mask = None
    if last:
        mask = torch.zeros(batch, 1, 1, keys).bfloat16().expand(batch, heads, 1, keys).contiguous()
        mask[..., keys // 2 :] = -10000
    times: dict[str, list[float]] = {kernel: [] for kernel in attention.CHOICES}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch"]) < 4:
        for kernel, taken in times.items():
            with attention.use(kernel):
                for repeat in range(3):
                    start = time.perf_counter()
                    F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
                    if repeat:  # the first call after a change of kernels sets torch's tables up
                        taken.append(time.perf_counter() - start)
    ours, torchs = (statistics.median(times[kernel]) for kernel in attention.CHOICES)
    operations = 4 * batch * heads * queries * keys * width
    speed = {"gflops": operations / ours / 1e9, "torch_gflops": operations / torchs / 1e9}
    print(
        f"{name:<30}{shape:>24}{1e3 * ours:>10.2f}{1e3 * torchs:>10.2f}{speed['gflops']:>9.0f}"
        f"{torchs / ours:>8.2f}{operations / ours / peak:>8.2f}"
    )
    fraction = operations / ours / peak
    return {"name": name, "shape": shape, **speed, "ratio_to_torch": torchs / ours, "peak_fraction": fraction}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1, help="for each shape")
    parser.add_argument("--shape", nargs="*", help="others than those of models")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{read_processor()}, {arguments.threads} threads, torch {torch.__version__}")
    print("\n".join([*native.describe(), attention.describe()]))
    if attention.why_torch():
        raise SystemExit("nothing to compare")
    peak = measure_peak(function="lrq_repeat_pairs")
    print(
        f"peak: {peak / 1e9:.0f} Gflop/s\n\n{'':<30}{'B, H, Lq, Lk, D':>24}{'ms':>10}{'torch':>10}{'Gflop/s':>9}",
        end="",
    )
    print(f"{'ratio':>8}{'of peak':>8}")
    shapes = {shape: shape for shape in arguments.shape} if arguments.shape else SHAPES
    rows = [measure(name, shape, arguments.seconds, peak) for name, shape in shapes.items()]
    ratios = [row["ratio_to_torch"] for row in rows]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"\n{mean:.2f} x as fast as torch's (geometric mean; {min(ratios):.2f} to {max(ratios):.2f})")
    machine = {"processor": read_processor(), "threads": arguments.threads}
    result = {"machine": machine, "threads": arguments.threads, "peak_gflops": peak / 1e9, "shapes": rows}
    print(json.dumps({**result, "geometric_mean": mean, "smallest": min(ratios)}))


if __name__ == "__main__":
    main()
