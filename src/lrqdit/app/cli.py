"""The command line: ``lrqdit quantize | generate | evaluate | inspect | demo | doctor | bench``.

Thin: the work is done elsewhere. A command imports what it needs, so that ``--help`` and ``inspect`` answer at once.
"""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lrqdit
from lrqdit.config import MODES, QuantizationConfig, choices
from lrqdit.errors import ConfigError, LrqditError
from lrqdit.models import KNOWN_MODELS
from lrqdit.models.prompts import EVALUATION_PROMPTS
from lrqdit.packed.format import describe_unpacked


class _Group(TyperGroup):
    """Turns errors that a user can mend into one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (LrqditError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Diffusion transformers at 2 to 4 bits.",
)  # fmt: skip

Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the pipeline's default if not given.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's default if not given.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]
PROMPTS = "One prompt per line, or one JSON object: a prompt, and paths of pictures where the pipeline takes some."
Prompts = Annotated[Path | None, typer.Option(help=PROMPTS)]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; that of the files if not given.")]
Variant = Annotated[str | None, typer.Option(help="Of the weight files, such as fp16.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; a CUDA device if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"lrqdit {lrqdit.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="A pipeline's folder or hub id owner/name; a transformer's folder; a file of weights.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    bits: Annotated[str, typer.Option(help="Preset w<bits>a<bits>, such as w4a8.")] = "w4a8",
    average_bits: Annotated[
        float | None, typer.Option(help="True bits per parameter in all, instead of what --bits in every layer takes.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", "--calibration", help=PROMPTS)] = None,
    mode: Annotated[str, typer.Option(help=f"One of {', '.join(MODES)}.")] = "auto",
    steps: Steps = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Regular expression of layers to leave as they are; repeatable.")
    ] = None,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Quantize without running the model.")
    ] = False,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Any setting, key=value; repeatable.")] = None,
    config: Annotated[
        str | None, typer.Option(help="Pipeline (folder or hub id) that a single file or a transformer belongs to.")
    ] = None,
    variant: Variant = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pipeline in the output folder.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a pipeline's transformer, or a transformer alone. A killed run continues: call it again."""
    from lrqdit.calibration.runs import locked
    from lrqdit.integrations import pipelines
    from lrqdit.integrations.records import read_records
    from lrqdit.integrations.sources import find_source

    given = {"mode": mode, "seed": seed, "exclude": tuple(exclude or ()), "average_bits": average_bits}
    settings = {**given, **_parse_settings(setting or [])}
    preset = QuantizationConfig.from_name(bits, **settings)
    records = None if prompts is None else read_records(prompts)
    pipelines.check_output_folder(out, overwrite)
    partial = out.with_name(f"{out.name}.partial")
    with _chatter_on_stderr(), locked(out.absolute()):
        source = find_source(model, config, variant)
        if out.exists() and out.resolve() in {path.resolve() for path in (source.folder, source.weights) if path}:
            raise ConfigError(f"{out} is the model itself; name another folder")
        if not source.is_pipeline and not no_calibration:
            raise ConfigError(
                f"{model} is a transformer without a pipeline, which cannot be run on prompts; name its pipeline by "
                "--config, or pass --no-calibration"
            )
        target, dtypes = source.load(dtype, device), source.stored_dtypes()
        result = lrqdit.quantize(
            target, preset, prompts=records, is_calibrated=not no_calibration, steps=steps,
            guidance_scale=guidance_scale, resume_folder=partial, stored_dtypes=dtypes,
        )  # fmt: skip
        pipelines.write_quantized(target, result, dtypes, source.file_bytes(), out)
        shutil.rmtree(partial, ignore_errors=True)
    exceeding = [name for g in result.groups if (g.rms or 0) >= preset.rotation_threshold for name in g.names]
    kinds = Counter(
        g.rotation + " + smoothing" * g.is_smoothed + " + principal part" * (g.principal_rank > 0)
        for g in result.groups
        for _ in g.names
    )
    widths = Counter(g.bits_of(name) for g in result.groups for name in g.names)
    summary = {
        "preset": preset.preset,
        "average_bits": preset.average_bits,
        "weight_bits": {str(width): count for width, count in sorted(widths.items())},
        "mode": preset.mode,
        "true_bits": result.size.true_bits,
        "unpacked_share": result.size.unpacked_share,
        "bytes_before": result.bytes_before,
        "bytes_after": pipelines.denoiser_file_bytes(out),
        "calibration_seconds": result.calibration_seconds,
        "quantization_seconds": result.quantization_seconds,
        "choices": dict(kinds.most_common()),
        "layers_above_threshold": exceeding,
        "folder": str(out),
    }
    if as_json:
        return typer.echo(json.dumps(summary))
    seconds = result.calibration_seconds + result.quantization_seconds
    typer.echo(f"{out}: {preset.preset} ({preset.mode}), {result.size.true_bits:.3f} bits per parameter, all included")
    if sentence := describe_unpacked(result.size.unpacked_share):
        typer.echo(sentence)
    typer.echo(f"transformer files: {summary['bytes_before']:,} -> {summary['bytes_after']:,} bytes")
    typer.echo(f"time: {seconds:.1f} s, of which calibration {result.calibration_seconds:.1f} s")
    typer.echo(f"chosen per layer: {', '.join(f'{kind} {count}' for kind, count in kinds.most_common())}")
    typer.echo(f"layers by weight bits: {_describe_widths(widths)}")
    typer.echo(f"J >= {preset.rotation_threshold:g} at {len(exceeding)} of {kinds.total()} layers")
    for name in exceeding[:5]:
        typer.echo(f"  {name}")
    if len(exceeding) > 5:
        typer.echo(f"  ... all of them: lrqdit inspect {out}")


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a pipeline, quantized or not.")],
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    out: Annotated[Path, typer.Option(help="File to write; a video becomes an animated .gif.")] = Path("picture.png"),
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture that the pipeline starts from; repeatable if it takes several.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Generate a picture (or a video) from a text, and from pictures if the pipeline takes some."""
    from diffusers.utils import export_to_gif

    from lrqdit.integrations import generation, pipelines

    with _chatter_on_stderr():
        pipeline = pipelines.load_pipeline(folder, dtype, device)
        record = {"prompt": prompt} | ({"image": image[0] if len(image) == 1 else image} if image else {})
        sample = generation.generate_images(
            pipeline, [record], seed, steps=steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt,
            height=height, width=width,
        )[0]  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        if len(sample.frames) > 1:
            out = out.with_suffix(".gif")
            export_to_gif(list(sample.frames), str(out))
        else:
            try:
                sample.picture.save(out)
            except ValueError as error:
                raise ConfigError(f"{out}: {error}; end the name with .png") from error
    typer.echo(str(out))


@app.command()
def evaluate(
    reference: Annotated[str, typer.Argument(metavar="REF", help="The original: folder or hub id.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The quantized pipeline.")],
    prompts: Prompts = None,
    images: Annotated[int | None, typer.Option(min=1, help="How many pictures; one per prompt if not given.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("evaluation"),
    steps: Steps = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare a quantized pipeline with its original, on the same prompts and the same noise."""
    from lrqdit.evaluation import metrics, pages, tables
    from lrqdit.integrations import generation, pipelines
    from lrqdit.integrations.records import read_records

    given = [{"prompt": text} for text in EVALUATION_PROMPTS] if prompts is None else read_records(prompts)
    records = [given[i % len(given)] for i in range(images or len(given))]
    texts = [record["prompt"] for record in records]
    sources, samples, true_bits, widths = {}, {}, {}, Counter[int]()
    with _chatter_on_stderr():
        for role, source in (("reference", reference), ("candidate", folder)):
            sources[role] = pipelines.find_folder(source)
        for role, source in sources.items():  # one after the other: two large models need not fit together
            pipeline = pipelines.load_pipeline(source, dtype, device)
            samples[role] = generation.generate_images(
                pipeline, records, seed, steps=steps, guidance_scale=guidance_scale, description=role
            )
            denoisers = pipelines.denoisers(pipeline)
            true_bits[role] = lrqdit.measure_size(denoisers).true_bits
            widths = Counter(m.format.weight_bits for m in denoisers.modules() if isinstance(m, lrqdit.QuantLinear))
            del pipeline
        results = {
            "reference": reference,
            "candidate": folder,
            "images": len(texts),
            "seed": seed,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "true_bits": true_bits,
            "file_bytes": {role: pipelines.denoiser_file_bytes(source) for role, source in sources.items()},
            **metrics.compare(samples["reference"], samples["candidate"]),
        }
        out.mkdir(parents=True, exist_ok=True)
        rows = tables.evaluation_rows(results)
        labels = (("original", samples["reference"]), ("quantized", samples["candidate"]))
        grid = pages.picture_grid([(label, [s.picture for s in row[:8]]) for label, row in labels], texts[:8])
        grid.save(out / "comparison.png")
        notes = [f"Layers by weight bits: {_describe_widths(widths)}"] if widths else []
        page = pages.html_page(f"{folder} against {reference}", rows, grid, notes)
        (out / "report.html").write_text(page, encoding="utf-8")
        (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    if as_json:
        return typer.echo(json.dumps(results))
    _print_table(rows, ("quantity", "original", "quantized"), title=f"{len(texts)} pictures")
    typer.echo(f"written to {out}: results.json, comparison.png, report.html")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized pipeline or a single quantized model.")],
    as_json: AsJson = False,
) -> None:
    """Show what a quantized folder holds, layer by layer, without loading its weights."""
    from lrqdit.app import inspection

    description = inspection.describe_folder(folder)
    if as_json:
        return typer.echo(json.dumps(description))
    rows = [
        {
            "name": layer["name"],
            "shape": f"{layer['out_features']} x {layer['in_features']}",
            "bits": f"w{layer['weight_bits']}a{layer['activation_bits']}",
            "J": layer["rms"],
            "shares input of": layer["input_from"],
            **{key: layer[key] for key in ("codebook", "table_rows", "rotation", "clip", "error", "gain")},
        }
        for layer in description["layers"]
    ]
    columns = (
        "name", "shape", "bits", "codebook", "table_rows", "rotation", "clip", "J", "error", "gain", "shares input of",
    )  # fmt: skip
    _print_table(rows, columns, width=None if sys.stdout.isatty() else 200)
    totals = description["totals"]
    widths = Counter(layer["weight_bits"] for layer in description["layers"])
    typer.echo(f"layers by weight bits: {_describe_widths(widths)}")
    if (budget := description["settings"].get("average_bits")) is not None:
        typer.echo(f"chosen for a budget of {budget:g} bits per parameter")
    typer.echo(f"{description['preset']}: {totals['true_bits']:.3f} bits per parameter over {totals['parameters']:,}")
    if sentence := describe_unpacked(totals["unpacked_share"]):
        typer.echo(sentence)
    typer.echo(f"files: {totals['file_bytes']:,} bytes, of which tensors {totals['tensor_bytes']:,}, the rest headers")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo-out"),
    bits: Annotated[list[str] | None, typer.Option(help="Preset; repeatable; three if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize the embedded text-to-emoji model and show the pictures side by side."""
    from lrqdit.app.demo import COLUMNS, PRESETS, run_demo

    with _chatter_on_stderr():
        results = run_demo(out, bits or PRESETS)
    if as_json:
        return typer.echo(json.dumps(results))
    rows = [
        {**row, "before": f"{row['bytes_before'] / 1e6:.1f} MB", "after": f"{row['bytes_after'] / 1e6:.1f} MB"}
        for row in results["rows"]
    ]
    _print_table(rows, COLUMNS)
    typer.echo(f"written to {out}: comparison.png, results.json, and a loadable pipeline per preset")


@app.command()
def doctor(
    measure: Annotated[bool, typer.Option(help="Time int8 products against bfloat16 ones.")] = False,
) -> None:
    """Tell which kernels this machine will use, and why."""
    from lrqdit.app.doctor import describe

    typer.echo("\n".join(describe(measure)))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help=f"Folder of a model, or {', '.join(KNOWN_MODELS)}.")] = "flux",
    bits: Annotated[list[str] | None, typer.Option(help="Preset; repeatable; w4a8 and w3a8 if not given.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="For the speed measurement, about; 0 leaves it out.")] = 60.0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Tell what packing gains here: the memory of a model, and a measurement of a few layers."""
    from lrqdit.app import memory, speed
    from lrqdit.integrations.pipelines import parse_device

    presets, target = bits or ["w4a8", "w3a8"], parse_device(device)
    with _chatter_on_stderr():
        found = memory.expected_memory(model, presets)
        speeds = speed.measure_layers(target, seconds, presets[0]) if seconds else []
    results = {"model": model, "device": str(target), "memory": found, "speed": speeds}
    if as_json:
        return typer.echo(json.dumps(results))
    for row in results["memory"]:
        sizes = (row["bfloat16_bytes"] / 1e9, row["packed_bytes"] / 1e9)
        typer.echo(f"{model} at {row['preset']}: {sizes[0]:.2f} GB in bfloat16, {sizes[1]:.2f} GB packed")
    if seconds:
        columns = ("tokens", "in_features", "out_features", "float_ms", "packed_ms", "speedup")
        _print_table(results["speed"], columns, title=f"{target}, {presets[0]}")


def _print_table(rows: list[dict[str, Any]], columns: Sequence[str], title: str = "", width: int | None = None) -> None:
    from rich.console import Console

    from lrqdit.evaluation.tables import build_table

    Console(width=width).print(build_table(rows, columns, title or None))


def _describe_widths(widths: Counter[int]) -> str:
    """Such as "2: 10, 4: 20", from how many layers have each width."""
    return ", ".join(f"{width}: {count}" for width, count in sorted(widths.items()))


def _parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Settings from key=value, as the types of :class:`QuantizationConfig`'s fields."""
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(QuantizationConfig)}
    del kinds["exclude"], kinds["average_bits"]  # options of their own
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or key not in kinds:
            raise ConfigError(f"--set {pair!r} is not key=value with a key among {', '.join(kinds)}")
        allowed = {"true": True, "false": False} if kinds[key] is bool else {str(c): c for c in choices(key)}
        try:
            parsed[key] = allowed[text.lower()] if allowed else kinds[key](text)
        except (KeyError, ValueError):
            wanted = " or ".join(allowed) or {int: "a whole number", float: "a number"}[kinds[key]]
            raise ConfigError(f"--set {pair!r}: {text!r} is not {wanted}") from None
    return parsed


@contextlib.contextmanager
def _chatter_on_stderr() -> Iterator[None]:
    """Keep stdout for results: what libraries print meanwhile goes to stderr, and diffusers reports errors alone."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    with contextlib.redirect_stdout(sys.stderr):
        yield
