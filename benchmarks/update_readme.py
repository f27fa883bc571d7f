"""Rewrite what is generated in the documents: numbers from benchmarks/results/*.json, the models, the table of wings.

Generated text stands between <!-- name --> and <!-- /name -->; tests/test_docs.py fails where it is out of date.

make demo && cp demo-out/results.json benchmarks/results/demo.json && cp demo-out/comparison.png docs/
python -m benchmarks.quality.bench_captions w4a8 w3a8 w4a4 | tail -1 > benchmarks/results/captions.json
python -m benchmarks.quality.bench_levels | tail -1 > benchmarks/results/levels.json
python -m benchmarks.quality.bench_quality && python -m benchmarks.quality.bench_quality --layers
python -m benchmarks.quality.bench_unseen | tail -1 > benchmarks/results/unseen.json
python -m benchmarks.speed.bench_linear | tail -1 > benchmarks/results/linear.json
python -m benchmarks.speed.bench_step | tail -1 > benchmarks/results/step.json
python -m benchmarks.speed.bench_attention | tail -1 > benchmarks/results/attention.json
python -m benchmarks.speed.bench_quantize | tail -1 > benchmarks/results/quantize.json
python -m benchmarks.update_readme && python -m benchmarks.models_table
"""

import ast
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/lrqdit"
DEMO_CARD = ROOT / "demo/README.md"
SETTINGS = ("w4a8", "w3a8", "w3a6", "w4a4", "w3a4", "w2a4", "w4a16")
CHARTS = {"docs/error-a8.svg": ("w4a8", "w3a8"), "docs/error-a4.svg": ("w4a4", "w3a4")}
FIVE_METHODS = ("lrqdit", "svdquant+gptq", "orbitquant+gptq", "lrq-dit-paper", "rtn")
USES = {
    "w4a8": "start here",
    "w3a8": "where memory counts more",
    "w4a4": "to compare with the literature; no faster than `w4a8`",
}
MANY_TOKENS = 1024
AMX = "-amx"  # the end of the names of results on a CPU with AMX


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def machine(results: dict[str, Any]) -> str:
    """The machine that a result was measured on."""
    found = results["machine"]
    return f"{found['processor']}, {found['threads']} threads"


# quality


def quality_rows(bits: str) -> list[dict[str, Any]]:
    """Every method at one setting, the smallest error first."""
    return sorted((row for row in read("quality")["rows"] if row["bits"] == bits), key=lambda row: row["image_mse"])


def presets_table() -> str:
    """Which preset to use: sizes and closeness to the original on the embedded model."""
    quality = {row["bits"]: row for row in read("quality")["rows"] if row["preset"] == "lrqdit"}
    rows = read("demo")["rows"]
    lines = [("float16", "16", f"{rows[0]['bytes_before'] / 1e6:.1f} MB", "-", "the original")]
    for row in rows:
        size, psnr = f"{row['bytes_after'] / 1e6:.1f} MB", f"{quality[row['preset']]['psnr']:.1f} dB"
        lines.append((f"`{row['preset']}`", f"{row['true_bits']:.2f}", size, psnr, USES[row["preset"]]))
    return table(("preset", "true bits", "file", "PSNR", "use"), lines)


def embedded_table() -> str:
    """The embedded model: sizes, closeness to the original, and whether it still draws its captions."""
    original = next(row for row in read("captions")["rows"] if row["model"] == "original")
    captions = {row["bits"]: row for row in read("quality")["rows"] if row["preset"] == "lrqdit"}
    rows = read("demo")["rows"]
    shares = f"{original['subcategory']:.0%} ({original['exact']:.0%})"
    lines = [("original", "float16", f"{rows[0]['bytes_before'] / 1e6:.1f} MB", "-", "-", "-", shares)]
    for row in rows:
        caption = captions[row["preset"]]
        numbers = f"{row['psnr']:.1f} dB", f"{row['ssim']:.3f}", f"{row['latent_error']:.3f}"
        shares = f"{caption['subcategory']:.0%} ({caption['caption']:.0%})"
        size = f"{row['bytes_after'] / 1e6:.1f} MB"
        lines.append((row["preset"], f"{row['true_bits']:.2f}", size, *numbers, shares))
    return table(
        ("preset", "true bits", "file", "PSNR", "SSIM", "latent error", "caption or subcategory (caption itself)"),
        lines,
    )


def setup_sentence() -> str:
    setup = read("quality")["setup"]
    return (
        f"{setup['pictures']} captions that calibration did not see, one seed each, {setup['steps']} steps; "
        f"the same {setup['calibration_prompts']} calibration captions for every method."
    )


def five_methods_table() -> str:
    """The README's part of the tables of methods."""
    settings = ("w4a8", "w3a8")
    found = {bits: {row["preset"]: row for row in quality_rows(bits)} for bits in settings}
    lines = []
    for name in FIVE_METHODS:
        rows = [found[bits][name] for bits in settings]
        cells = [(f"{r['true_bits']:.2f}", f"{1000 * r['image_mse']:.2f}", f"{r['psnr']:.1f} dB") for r in rows]
        lines.append((f"**{name}**" if name == "lrqdit" else name, *cells[0], *cells[1]))
    header = [f"{bits}: {column}" for bits in settings for column in ("true bits", "error x 1000", "PSNR")]
    return table(("method", *header), lines)


def methods_tables() -> str:
    """Every method at every setting that was measured, by error."""
    sections = []
    for bits in SETTINGS:
        lines = []
        for row in quality_rows(bits):
            low, high = (1000 * value for value in row["image_mse_interval"])
            over = "-"
            if "over_paper" in row:
                a, b = row["over_paper_interval"]
                over = f"{row['over_paper']:.2f} ({a:.2f} to {b:.2f})"
            name = f"**{row['preset']}**" if row["preset"].startswith("lrqdit") else row["preset"]
            error = f"{1000 * row['image_mse']:.2f} ({low:.2f} to {high:.2f})"
            numbers = f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", f"{row['latent_error']:.3f}"
            lines.append((name, f"{row['true_bits']:.2f}", error, over, *numbers))
        header = "method", "true bits", "error x 1000", "over lrq-dit-paper", "PSNR", "SSIM", "latent error"
        sections.append(f"### {bits}\n\n{table(header, lines)}")
    return "\n\n".join(sections)


def unseen_table() -> str:
    """A model that the package has no entry for."""
    rows = read("unseen")["rows"]
    found = {(row["preset"], row["bits"]): row for row in rows}
    settings, presets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("bits", "preset"))
    lines = []
    for preset in presets:
        cells = [
            f"{1000 * row['image_mse']:.2f} ({row['true_bits']:.2f})" for row in (found[preset, b] for b in settings)
        ]
        lines.append((f"**{preset}**" if preset == "lrqdit" else preset, *cells))
    return table(("method: error x 1000 (true bits)", *settings), lines)


def single_layers_table() -> str:
    """Single layers of inputs made for it."""
    rows = read("quality")["layers"]
    found = {(row["preset"], row["bits"], row["input"]): row["error"] for row in rows}
    presets, settings, inputs = (list(dict.fromkeys(row[key] for row in rows)) for key in ("preset", "bits", "input"))
    lines = []
    for preset in presets:
        errors = [f"{found[preset, bits, kind]:.5f}" for bits in settings for kind in inputs]
        lines.append((f"**{preset}**" if preset == "lrqdit" else preset, *errors))
    return table(("method", *(f"{bits}: {kind}" for bits in settings for kind in inputs)), lines)


def levels_table() -> str:
    """Relative squared error of the levels."""
    levels = read("levels")
    kinds = {
        "gaussian": "Twin-Log, one table per layer",
        "trellis": "the same on a trellis",
        "lloyd_max": "Lloyd-Max, one table per layer",
        "minmax": "min-max uniform",
    }
    lines = [(bits, *(f"{levels[kind][bits]:.4f}" for kind in kinds)) for bits in ("5", "4", "3", "2")]
    return table(("bits", *kinds.values()), lines)


def caption_sentence() -> str:
    """For the demo model's card: how often it draws what it was asked for."""
    row = next(row for row in read("captions")["rows"] if row["model"] == "original")
    return (
        f"it is the captioned one for {row['exact']:.0%}, and it or one of its subcategory for {row['subcategory']:.0%}"
    )


# speed


def layer_speed(preset: str, suffix: str = "") -> float:
    """Speed of whole layers over bfloat16 ``F.linear``: geometric mean of the shapes of many tokens."""
    return statistics.geometric_mean(
        layer["ratio_to_bf16"]
        for layer in read(f"linear{suffix}")["layers"]
        if layer["preset"] == preset and layer["shape"][0] >= MANY_TOKENS
    )


def layer_sentence(suffix: str = "") -> str:
    large = {tuple(row["shape"]) for row in read(f"linear{suffix}")["layers"] if row["shape"][0] >= MANY_TOKENS}
    return (
        f"layers **{layer_speed('w4a8', suffix):.2f} x** bfloat16 `F.linear` (mean of {len(large)} shapes), "
        f"a PixArt step {read(f'step{suffix}')['ratio_to_bf16']:.2f} x"
    )


def three_speeds_table() -> str:
    """A layer, a step, the quantizer."""
    step, quantize, linear = read("step"), read("quantize"), read("linear")
    smallest = min(
        layer["ratio_to_bf16"]
        for layer in linear["layers"]
        if layer["preset"] == "w4a8" and layer["shape"][0] >= MANY_TOKENS
    )
    lines = [
        (
            f"a linear layer, w4a8, {MANY_TOKENS} tokens or more",
            f"**{layer_speed('w4a8'):.2f} x** bfloat16 `F.linear`, {smallest:.2f} x at least",
        ),
        (
            f"a step of PixArt-Sigma XL/2 at {step['pixels']} pixels with guidance, {step['preset']}",
            f"**{step['ratio_to_bf16']:.2f} x** bfloat16 at {step['memory_ratio']:.2f} x its peak memory",
        ),
        (
            "folding, levels and packing alone, a part of quantizing",
            f"{quantize['trellis_weights_per_second'] / 1e6:.0f} million weights a second on a trellis, the default; "
            f"{quantize['weights_per_second'] / 1e6:.0f} without",
        ),
    ]
    return table((f"on {machine(linear)}", "speed"), lines)


def layers_table(suffix: str = "") -> str:
    """Whole layers beside float and other libraries."""
    linear = read(f"linear{suffix}")
    presets, shapes = (
        list(dict.fromkeys(tuple(row[key]) if key == "shape" else row[key] for row in linear["layers"]))
        for key in ("preset", "shape")
    )
    found = {(tuple(layer["shape"]), layer["preset"]): layer for layer in linear["layers"]}
    peers = list(dict.fromkeys(name for layer in linear["layers"] for name in layer["ratio_to_peers"]))
    first, lines = presets[0], []
    for shape in shapes:
        row = found[shape, first]
        cold, ratios = row["cold_ratio_to_bf16"], row["ratio_to_peers"]
        lines.append(
            (
                ", ".join(map(str, shape)),
                *(f"**{found[shape, preset]['ratio_to_bf16']:.2f}**" for preset in presets),
                "-" if cold is None else f"{cold:.2f}",
                f"{row['ratio_to_bf16'] / row['ratio_to_fp32']:.2f}",
                f"{1 / row['time_over_int_mm']:.2f}",
                *(f"{ratios[name]:.2f}" if name in ratios else "-" for name in peers),
            )
        )
    rotations = {
        preset: sorted({layer["rotation"] for layer in linear["layers"] if layer["preset"] == preset})
        for preset in presets
    }
    chosen = "; ".join(f"{preset}: {', '.join(kinds)}" for preset, kinds in rotations.items())
    header = "tokens, in, out", *presets, f"{first}, cold", "float32", f"{first} over `_int_mm`"
    isa = linear["isa"].removeprefix("CPU kernels: native, ").split(",")[0]
    clock = ", CPU time" if linear.get("clock") == "cpu" else ""
    return (
        f"{machine(linear)}{clock}, {isa} kernels; rotations "
        f"chosen for these inputs: {chosen}.\n\n{table((*header, *(f'{first} over {name}' for name in peers)), lines)}"
    )


def step_table(suffix: str = "") -> str:
    """Where a denoising step spends its time."""
    step = read(f"step{suffix}")
    models = list(step["parts"])
    lines = [(part, *(f"{step['parts'][model][part]:.2f} s" for model in models)) for part in step["parts"][models[0]]]
    return (
        f"{machine(step)}; {step['preset']}, {step['pixels']} pixels, {step['layers']} blocks: "
        f"**{step['ratio_to_bf16']:.2f} x** the speed of bfloat16 ({step['ratio_to_bf16_with_our_attention']:.2f} x "
        f"bfloat16 with our attention) at {step['memory_ratio']:.2f} x its peak memory.\n\n"
        f"{table(('', *models), lines)}"
    )


def attention_table(suffix: str = "") -> str:
    attention = read(f"attention{suffix}")
    lines = [
        (
            row["name"], row["shape"].replace(",", ", "), f"{row['gflops']:.0f}", f"{row['torch_gflops']:.0f}",
            f"{row['ratio_to_torch']:.2f}",
        )
        for row in attention["shapes"]
    ]  # fmt: skip
    return (
        f"{machine(attention)}: {attention['geometric_mean']:.2f} x torch's speed in the geometric mean, "
        f"{attention['smallest']:.2f} at least.\n\n"
        + table(("", "batch, heads, queries, keys, channels", "Gflop/s", "torch", "over torch"), lines)
    )


def quantizer_table() -> str:
    quantize = read("quantize")
    contenders = [name for name, value in next(iter(quantize["shapes"].values())).items() if isinstance(value, dict)]
    lines = [
        (shape.replace("x", " x "), *(f"{rates[name]['all'] / 1e6:.{0 if name != contenders[-1] else 2}f}"
                                      for name in contenders))
        for shape, rates in quantize["shapes"].items()
    ]  # fmt: skip
    return f"{machine(quantize)}, millions of weights a second.\n\n{table(('out x in', *contenders), lines)}"


# the package


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring, as Markdown in a table."""
    line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    line = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line).replace("``", "`").replace("|", r"\|")
    return line.rstrip(".")


def wings_table() -> str:
    """Every module by wing, the highest first, in the order of the import contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    lines = []
    for level, siblings in zip(range(len(layers), 0, -1), layers, strict=True):
        for wing in siblings.split(" | "):
            folder = PACKAGE / wing
            if not folder.is_dir():
                lines.append((str(level), f"**`{wing}.py`**", first_sentence(folder.with_suffix(".py"))))
                continue
            lines.append((str(level), f"**`{wing}/`**", f"**{first_sentence(folder / '__init__.py')}**"))
            for path in sorted(folder.rglob("*.py"))[1:]:  # the first is the wing's own __init__.py
                name = str(path.relative_to(folder)).removesuffix("__init__.py")
                lines.append(("", f"`{name}`", first_sentence(path)))
    return table(("level", "module", "what is in it"), lines)


def fill(text: str, marker: str, content: str) -> str:
    """Replace what stands between <!-- marker --> and <!-- /marker -->, which must be there once.

    Raises:
        ValueError: if it is not.
    """
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    text, count = re.subn(f"{start}.*?{end}", lambda _: start + content + end, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{start} ... {end} stands {count} times in a document, not once")
    return text


def documents() -> dict[Path, str]:
    """Every document with generated parts, as it should be."""
    blocks = {
        "README.md": {
            "presets": presets_table(),
            "five-methods": five_methods_table(),
            "speeds": three_speeds_table(),
        },
        "docs/RESULTS.md": {
            "embedded": embedded_table(),
            "setup": setup_sentence(),
            "methods": methods_tables(),
            "unseen": unseen_table(),
            "single-layers": single_layers_table(),
            "levels": levels_table(),
            "layers": layers_table(),
            "layers-amx": layers_table(AMX),
            "step": step_table(),
            "step-amx": step_table(AMX),
            "attention": attention_table(),
            "attention-amx": attention_table(AMX),
            "quantizer": quantizer_table(),
        },
        "docs/ARCHITECTURE.md": {"wings": wings_table()},
    }
    inline = {
        "README.md": {"layer-speed": layer_sentence(), "amx-speed": layer_sentence(AMX)},
        str(DEMO_CARD.relative_to(ROOT)): {"share": caption_sentence()},
    }
    texts = {}
    for name in {**blocks, **inline}:
        text = (ROOT / name).read_text(encoding="utf-8")
        for marker, content in blocks.get(name, {}).items():
            text = fill(text, marker, f"\n{content}\n")
        for marker, content in inline.get(name, {}).items():
            text = fill(text, marker, content)
        texts[ROOT / name] = text
    return texts


def chart_rows(settings: Sequence[str]) -> list[dict[str, Any]]:
    """What a chart shows, one panel for each setting."""
    return [row for bits in settings for row in quality_rows(bits)]


def main() -> None:
    from benchmarks import chart  # matplotlib is needed only here

    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    for name, settings in CHARTS.items():
        chart.draw(chart_rows(settings), ROOT / name)


if __name__ == "__main__":
    main()
