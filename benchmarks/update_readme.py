"""Rewrite the numbers of the README and of the demo model's card from benchmarks/results/*.json; none is typed by hand.

make demo && cp demo-out/results.json benchmarks/results/demo.json && cp demo-out/comparison.png docs/
python -m benchmarks.quality.bench_captions w4a8 w3a8 w4a4 | tail -1 > benchmarks/results/captions.json
python -m benchmarks.quality.bench_levels | tail -1 > benchmarks/results/levels.json
python -m benchmarks.quality.bench_quality && python -m benchmarks.quality.bench_quality --layers
python -m benchmarks.speed.bench_linear | tail -1 > benchmarks/results/linear.json
python -m benchmarks.speed.bench_step | tail -1 > benchmarks/results/step.json
python -m benchmarks.speed.bench_attention | tail -1 > benchmarks/results/attention.json
python -m benchmarks.speed.bench_quantize | tail -1 > benchmarks/results/quantize.json
python -m benchmarks.update_readme
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def demo_table() -> list[str]:
    """The embedded model: sizes, closeness to the original, and whether it still draws its captions."""
    original = next(row for row in read("captions")["rows"] if row["model"] == "original")
    captions = {row["bits"]: row for row in read("quality")["rows"] if row["preset"] == "lrqdit"}
    lines = [
        "Embedded model, pictures of eight captions that calibration did not see (PSNR, SSIM, latent error against the",
        "original's pictures), and 64 captions whose nearest neighbour among all 1,911 Noto emoji must be the",
        "captioned one or one of its subcategory (`bench_captions.py` for the original, `bench_quality.py` for the",
        "others; none is a calibration prompt):",
        "",
        "| preset | true bits | file | PSNR | SSIM | latent error | caption or subcategory (caption itself) |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = read("demo")["rows"]
    lines.append(
        f"| original | float16 | {rows[0]['bytes_before'] / 1e6:.1f} MB | - | - | - "
        f"| {original['subcategory']:.0%} ({original['exact']:.0%}) |"
    )
    for row in rows:
        caption = captions.get(row["preset"])
        shares = f"{caption['subcategory']:.0%} ({caption['caption']:.0%})" if caption else "-"
        lines.append(
            f"| {row['preset']} | {row['true_bits']:.2f} | {row['bytes_after'] / 1e6:.1f} MB | {row['psnr']:.1f} dB "
            f"| {row['ssim']:.3f} | {row['latent_error']:.3f} | {shares} |"
        )
    return lines


def level_table() -> list[str]:
    """Relative squared error of the levels."""
    levels = read("levels")
    lines = [
        "Relative squared error of the deployed levels (int8 table times row scale) on Gaussian rows of 1152, the",
        "worst of Twin-Log over weight scales from 1e-6 to 1e3 (`benchmarks/bench_levels.py`):",
        "",
        "| bits | Twin-Log, one table per layer | the same on a trellis | Lloyd-Max, one table per layer "
        "| min-max uniform |",
        "|---|---|---|---|---|",
    ]
    for bits in ("4", "3", "2"):
        errors = (levels[kind][bits] for kind in ("gaussian", "trellis", "lloyd_max", "minmax"))
        lines.append(f"| {bits} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")
    return lines


def quality_table() -> list[str]:
    """Every method at every setting that was measured, by error."""
    results = read("quality")
    setup = results["setup"]
    lines = [
        f"Every method on the embedded model: {setup['pictures']} captions unseen in calibration, one seed each,",
        f"{setup['steps']} steps, the same {setup['calibration_prompts']} calibration captions for all. Mean squared "
        "error of the pictures x 1000 with its",
        "95 % bootstrap interval, over the published method's error on the same pictures; true bits with layers kept",
        "in float at 16 bits (`benchmarks/bench_quality.py`; `lrqdit` and `lrq-dit-paper` run packed, `package:` rows",
        "by that package, all others as simulated recipes). `lrqdit-uniform` gives every layer the same bits,",
        "`lrqdit-equal-bits` as many true bits as `lrq-dit-paper` in all, chosen by running the model:",
        "",
        "| setting | method | true bits | error x 1000 | over lrq-dit-paper | PSNR | SSIM | latent error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = ["w4a8", "w3a8", "w4a4", "w3a4"]
    rows = [row for row in results["rows"] if row["bits"] in order]
    for row in sorted(rows, key=lambda row: (order.index(row["bits"]), row["image_mse"])):
        low, high = (1000 * v for v in row["image_mse_interval"])
        over = "-"
        if "over_paper" in row:
            a, b = row["over_paper_interval"]
            over = f"{row['over_paper']:.2f} ({a:.2f} to {b:.2f})"
        name = f"**{row['preset']}**" if row["preset"].startswith("lrqdit") else row["preset"]
        error = f"{1000 * row['image_mse']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            f"| {row['bits']} | {name} | {row['true_bits']:.2f} | {error} | {over} | {row['psnr']:.1f} "
            f"| {row['ssim']:.3f} | {row['latent_error']:.3f} |"
        )
    return lines


def speed_table() -> list[str]:
    """Layers, a step and the quantizer on the machine that measured them."""
    linear, step, quantize, attention = read("linear"), read("step"), read("quantize"), read("attention")
    presets = list(dict.fromkeys(layer["preset"] for layer in linear["layers"]))
    shapes = list(dict.fromkeys(tuple(layer["shape"]) for layer in linear["layers"]))
    found = {(tuple(layer["shape"]), layer["preset"]): layer for layer in linear["layers"]}
    peers = list(dict.fromkeys(name for layer in linear["layers"] for name in layer["ratio_to_peers"]))
    lines = [
        f"Whole layers (rotation and quantization of the input included) on {linear['threads']} cores of "
        f"{quantize['machine']['processor']}, {linear['isa'].removeprefix('CPU kernels: native, ')},",
        "as multiples of the speed of a bfloat16 `F.linear`, measured in turns in one process; then float32, and our",
        f"speed at {presets[0]} over a bare `torch._int_mm`{' and over whole layers of others' if peers else ''}:",
        "",
        "| tokens, in, out | " + " | ".join([*presets, "float32", "over `_int_mm`", *peers]) + " |",
        "|---" * (3 + len(presets) + len(peers)) + "|",
    ]
    for shape in shapes:
        first = found[shape, presets[0]]
        values = [f"**{found[shape, preset]['ratio_to_bf16']:.2f}**" for preset in presets]
        values += [f"{first['ratio_to_bf16'] / first['ratio_to_fp32']:.2f}", f"{1 / first['time_over_int_mm']:.2f}"]
        values += [f"{first['ratio_to_peers'][name]:.2f}" if name in first["ratio_to_peers"] else "-" for name in peers]
        lines.append(f"| {', '.join(map(str, shape))} | " + " | ".join(values) + " |")
    rotations = {
        preset: {layer["rotation"] for layer in linear["layers"] if layer["preset"] == preset} for preset in presets
    }
    chosen = "; ".join(f"{preset}: {', '.join(sorted(kinds))}" for preset, kinds in rotations.items())
    return [
        *lines,
        "",
        f"Rotations chosen for these inputs: {chosen}. Each timed call follows one of the same layer; a single token",
        "whose weights are not in the caches is bound by memory.",
        "",
        f"One step of PixArt-Sigma XL/2 at {step['pixels']} pixels with guidance, {step['preset']}: "
        f"**{step['ratio_to_bf16']:.2f} x** the speed of bfloat16 at {step['memory_ratio']:.2f} x its peak memory",
        f"({step['ratio_to_bf16_with_our_attention']:.2f} x bfloat16 on the attention that comes with us). Attention: "
        f"{attention['geometric_mean']:.2f} x torch's in the geometric mean of {len(attention['shapes'])} shapes,",
        f"at least {attention['smallest']:.2f} (`bench_attention.py`).",
        f"Quantizing (rotation, levels, packing): {quantize['weights_per_second'] / 1e6:.0f} million weights per "
        f"second with scalar levels, {quantize['trellis_weights_per_second'] / 1e6:.0f} with a trellis.",
    ]


def caption_sentence() -> str:
    """For the demo model's card: how often it draws what it was asked for."""
    row = next(row for row in read("captions")["rows"] if row["model"] == "original")
    return (
        f"it is the captioned one for {row['exact']:.0%}, and it or one of its subcategory for {row['subcategory']:.0%}"
    )


def fill(path: Path, marker: str, content: str) -> None:
    """Replace what stands between <!-- marker --> and <!-- /marker -->."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    text = re.sub(f"{start}.*?{end}", lambda _: start + content + end, path.read_text(), flags=re.DOTALL)
    path.write_text(text)


def main() -> None:
    tables = [*demo_table(), "", *quality_table(), "", *level_table()]
    fill(ROOT / "README.md", "results", "\n" + "\n".join(tables) + "\n")
    fill(ROOT / "README.md", "speed", "\n" + "\n".join(speed_table()) + "\n")
    fill(ROOT / "demo/README.md", "share", caption_sentence())


if __name__ == "__main__":
    main()
