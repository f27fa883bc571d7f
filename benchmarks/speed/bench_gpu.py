"""Speed on a GPU: layers of FLUX, PixArt and Wan, then a FLUX.1-sized transformer; the last line is JSON.

Run: python -m benchmarks.speed.bench_gpu [--tokens 1024 4096 16384 32760] [--skip-model]. About ten minutes on
an H200, which is what the second table needs memory for: 24 GB of random bfloat16 weights first, then the packed model.
--self-check runs all of it at toy sizes on the CPU, to see that the script works; its times mean nothing.

Times are medians of CUDA events, in microseconds, after a warm-up in which the kernels choose their plans. Columns:
bf16: F.linear; int_mm: torch._int_mm alone; torchao: its int8 dynamic quantization, compiled, if it is installed;
prologue: our quantize_tokens with a full Hadamard rotation; w4, w3: our quantized_linear; w4a8, w3a8: the whole layer.
"""

import argparse
import contextlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrqdit.app import doctor
from lrqdit.app.memory import build_model, replace_layers
from lrqdit.app.speed import time_calls
from lrqdit.config import QuantizationConfig
from lrqdit.packed.dummy import fill_randomly, random_layer
from lrqdit.packed.linear import QuantLinear

TOKENS = (1024, 4096, 16384, 32760)
LAYERS = {
    "FLUX": ((3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072)),
    "PixArt": ((1152, 1152), (1152, 4608), (4608, 1152)),
    "Wan": ((5120, 5120), (5120, 13824), (13824, 5120)),
}
COLUMNS = (
    "bf16",
    "int_mm",
    "torchao",
    "prologue",
    "w4",
    "w3",
    "w4a8",
    "w3a8",
    "w4a8 x bf16",
    "w4a8 / (int_mm + prologue)",
)
SECONDS = 1.0  # per shape
TOY_MODEL = {
    "_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 24,
    "num_attention_heads": 4, "joint_attention_dim": 96, "pooled_projection_dim": 32, "axes_dims_rope": [8, 8, 8],
}  # fmt: skip
AIM, AIM_TOKENS, AIM_OVERHEAD, AIM_STEP = 1.5, 4096, 1.15, 1.35


def measure_layer(tokens: int, in_features: int, out_features: int, device: torch.device) -> dict[str, float | None]:
    """Microseconds of every column; None where a method cannot run this shape or is not installed."""
    x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
    dense = nn.Linear(in_features, out_features, device=device, dtype=torch.bfloat16)
    layers = {f"w{bits}": random_layer(in_features, out_features, bits, 8, device) for bits in (4, 3)}
    tokens = layers["w4"].quantize_input(x)
    whole = torch.randint(-127, 128, (out_features, in_features), device=device, dtype=torch.int8)
    calls = {
        "bf16": lambda: dense(x),
        "int_mm": lambda: torch._int_mm(tokens.codes, whole.t()),
        "prologue": lambda: layers["w4"].quantize_input(x),
        **{
            name: lambda layer=layer: layer.arguments().quantized_linear(tokens, torch.bfloat16)
            for name, layer in layers.items()
        },
        **{f"{name}a8": lambda layer=layer: layer(x) for name, layer in layers.items()},
    }
    if (rival := quantize_with_torchao(dense)) is not None:
        calls["torchao"] = lambda: rival(x)
    usable = {name: call for name, call in calls.items() if runs(call)}
    times = dict(zip(usable, time_calls(list(usable.values()), device, SECONDS), strict=True))
    row: dict[str, float | None] = {name: 1000 * times[name] if name in times else None for name in COLUMNS[:8]}
    row["w4a8 x bf16"] = row["bf16"] / row["w4a8"]
    row["w4a8 / (int_mm + prologue)"] = row["int_mm"] and row["w4a8"] / (row["int_mm"] + row["prologue"])
    return row


def quantize_with_torchao(dense: nn.Linear) -> Any:
    """The layer with torchao's int8 dynamic quantization, compiled; None if torchao is not installed."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    model = nn.Sequential(
        nn.Linear(dense.in_features, dense.out_features, device=dense.weight.device, dtype=dense.weight.dtype)
    )
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model)


def runs(call: Any) -> bool:
    try:
        call()
    except RuntimeError as error:
        print(f"  left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def measure_model(device: torch.device, name: str, latent_tokens: int, text_tokens: int) -> list[dict[str, Any]]:
    """Memory and one denoising step of a FLUX transformer with random weights: bfloat16, then packed."""
    rows = []
    for preset in (None, "w4a8", "w3a8"):
        model = nn.Module.to(build_model(name), torch.bfloat16)
        if preset is not None:
            replace_layers(model, QuantizationConfig.from_name(preset))
        before = allocated(device)
        model.to_empty(device=device).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                fill_randomly(module)
            else:
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if tensor.is_floating_point():
                        tensor.normal_(0, 0.01)
        weights = allocated(device) - before
        inputs = flux_inputs(model, device, latent_tokens, text_tokens)
        reset_peak(device)
        with torch.no_grad():  # inference mode would keep layers from sharing the codes of one input
            step_ms = time_calls([lambda model=model, inputs=inputs: model(**inputs)], device, 5.0)[0]
        rows.append(
            {"model": preset or "bf16", "weights_gb": weights / 1e9, "peak_gb": peak(device) / 1e9, "step_ms": step_ms}
        )
        rows[-1]["x bf16"] = rows[0]["step_ms"] / step_ms
        del model
    return rows


def flux_inputs(model: Any, device: torch.device, latent_tokens: int, text_tokens: int) -> dict[str, Any]:
    c = model.config
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, latent_tokens, c.in_channels, **options),
        "encoder_hidden_states": torch.randn(1, text_tokens, c.joint_attention_dim, **options),
        "pooled_projections": torch.randn(1, c.pooled_projection_dim, **options),
        "timestep": torch.full((1,), 0.5, **options),
        "img_ids": torch.zeros(latent_tokens, 3, **options),
        "txt_ids": torch.zeros(text_tokens, 3, **options),
    }
    return {**inputs, "guidance": torch.full((1,), 3.5, **options)} if c.guidance_embeds else inputs


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def print_row(cells: list[Any]) -> None:
    texts = ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(" | ".join(f"{text:>9}" for text in texts), flush=True)


def verdicts(layers: list[dict[str, Any]], models: list[dict[str, Any]]) -> list[str]:
    """One line per aim: met or not."""
    large = [row for row in layers if row["tokens"] >= AIM_TOKENS]
    lines = []
    if large:
        slowest = min(row["w4a8 x bf16"] for row in large)
        overheads = [row["w4a8 / (int_mm + prologue)"] for row in large if row["w4a8 / (int_mm + prologue)"]]
        lines.append(f"aim: {AIM} x bf16 from {AIM_TOKENS} tokens on; the slowest shape has {slowest:.2f}")
        if overheads:
            lines.append(f"aim: at most {AIM_OVERHEAD} x (int_mm + prologue); the worst shape has {max(overheads):.2f}")
    lines += [f"aim: a step {AIM_STEP} x bf16; {row['model']} has {row['x bf16']:.2f}" for row in models[1:]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens of the layers' table")
    parser.add_argument("--skip-model", action="store_true", help="leave out the transformer")
    parser.add_argument("--self-check", action="store_true", help="toy sizes on the CPU")
    arguments = parser.parse_args()
    if not arguments.self_check and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure (--self-check only tries the script)")
    device = torch.device("cpu" if arguments.self_check else "cuda")
    shapes, tokens = LAYERS, arguments.tokens
    if arguments.self_check:
        shapes, tokens = {"toy": ((48, 96),)}, [32]
    print("\n".join(doctor.describe(measure=True)))
    print_row(["model", "tokens", "K", "N", *COLUMNS])
    layers = []
    with torch.no_grad():
        for model, sizes in shapes.items():
            for count in tokens:
                for in_features, out_features in sizes:
                    row = measure_layer(count, in_features, out_features, device)
                    print_row([model, count, in_features, out_features, *row.values()])
                    layers.append({"model": model, "tokens": count, "K": in_features, "N": out_features, **row})
    models: list[dict[str, Any]] = []
    if not arguments.skip_model:
        with contextlib.suppress(torch.cuda.OutOfMemoryError), tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(TOY_MODEL), encoding="utf-8")
            models = (
                measure_model(device, folder, 16, 8)
                if arguments.self_check
                else measure_model(device, "flux", 4096, 512)
            )
        if not models:
            print("the bfloat16 transformer does not fit this device")
        for row in models:
            print_row(list(row.items()))
    print("\n".join(verdicts(layers, models)))
    name = platform.processor() if device.type == "cpu" else torch.cuda.get_device_name()
    print(json.dumps({"device": name, "torch": torch.__version__, "layers": layers, "models": models}))


if __name__ == "__main__":
    main()
