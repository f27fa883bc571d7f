"""How far quantized pictures are from the original's: every method, every setting, one model, the same calibration.

Same prompts, same noise and same steps in every row; nothing was tuned on these prompts. The results file is updated
after every row, so a killed run continues where it stopped.

    python -m benchmarks.quality.bench_quality                # everything that is missing in the results
      --presets lrqdit rtn --bits w3a8                        # these methods at this setting
      --check                                                 # recompute a few rows, or those that are named, and
                                                              # compare them with the results
      --layers                                                # error of single layers of realistic inputs
      --pictures FILE.png --presets lrqdit rtn --bits w3a4    # pictures of several methods side by side
      --model FOLDER --prompts FILE --out my.json             # another model

`lrqdit` is this package's default and `lrq-dit-paper` the published method, both as packed layers. `lrqdit-uniform` is
the default with the same weight bits in every layer, `lrqdit-measured` with layers' bits chosen by running the model,
in no more true bits than `lrqdit` takes at the same setting, and `lrqdit-equal-bits` the same, given those of
`lrq-dit-paper`. Every other preset is a recipe of `benchmarks.methods.recipes`, simulated. True bits count everything,
layers kept in float at 16 bits. `--presets package:NAME` runs another package itself (`benchmarks.methods.packages`),
where it is installed and has the setting.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lrqdit
from benchmarks.methods import packages
from benchmarks.methods.recipes import RECIPES
from benchmarks.methods.simulate import simulate
from benchmarks.quality import bench_captions
from lrqdit.app import demo
from lrqdit.calibration.runs import RunFolder, describe_run
from lrqdit.calibration.statistics import ActivationStats, InputGroup
from lrqdit.calibration.steps import Calibration
from lrqdit.config import QuantizationConfig
from lrqdit.evaluation import metrics as evaluate
from lrqdit.evaluation.pages import picture_grid
from lrqdit.fitting.compensate import measure_curvature
from lrqdit.fitting.layer import FittedInput, quantize_linear
from lrqdit.fitting.transform import choose_transform
from lrqdit.integrations import generation, pipelines
from lrqdit.models import prompts
from lrqdit.packed.files import write_atomically
from lrqdit.packed.size import measure_size

RESULTS = Path(__file__).parents[1] / "results" / "quality.json"
SETTINGS = ("w4a8", "w4a4", "w3a8", "w3a6", "w3a4", "w2a4")
OURS = {
    "lrqdit": {},
    "lrqdit-uniform": {"sensitivity": "none"},
    "lrqdit-measured": {"sensitivity": "measured"},
    "lrqdit-equal-bits": {"sensitivity": "measured"},
    "lrq-dit-paper": {"mode": "paper"},
}
BUDGETS = {"lrqdit-measured": "lrqdit", "lrqdit-equal-bits": "lrq-dit-paper"}  # whose true bits they are given
PRESETS = (*OURS, *RECIPES)
LAYER_PRESETS = ("lrqdit", "lrq-dit-paper", *RECIPES)
PACKAGES = {f"package:{name}": name for name in packages.PACKAGES}
CHECKED = (("lrqdit", "w3a8"), ("rtn", "w4a4"))
CHECKED_PICTURES, CHECK_TOLERANCE = 16, 0.15
BATCH, SEED = 16, 1000
BOOTSTRAPS = 10_000
SHOWN_PRESETS, SHOWN_PICTURES, CELL_PIXELS = ("lrqdit", "lrq-dit-paper", "quarot+gptq", "q-dit", "rtn"), 6, 128


def load(folder: Path) -> Any:
    """The pipeline in float32; its float16 weights lose nothing."""
    return pipelines.load_pipeline(folder, torch.float32, "cpu")


def generate(
    pipeline: Any, prompts: list[str], steps: int | None, guidance: float | None, places: Sequence[int] = ()
) -> list[generation.Sample]:
    """A picture for each prompt with a seed of its own, in batches; places: where some prompts stand among all."""
    samples, places = [], places or range(len(prompts))
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        seeds = [SEED + place for place in places[start : start + BATCH]]
        output, latents = generation.call_pipeline(pipeline, batch, seeds, given)
        samples += [
            generation.Sample(prompt, seeds[i], (output.images[i],), latents[i : i + 1])
            for i, prompt in enumerate(batch)
        ]
    return samples


def pixels(samples: list[generation.Sample]) -> Tensor:
    """float32 (count, 3, height, width) in [0, 1]."""
    arrays = [np.array(sample.picture.convert("RGB"), dtype=np.float32) / 255 for sample in samples]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def features(pipeline: Any, samples: list[generation.Sample]) -> Tensor:
    """What the kernel distance compares: the VAE's latents of the pictures, scaled, float64 (count, features)."""
    with torch.no_grad():
        parts = [pipeline.vae.encode(part * 2 - 1).latent_dist.mean for part in pixels(samples).split(BATCH)]
    return torch.cat(parts).flatten(1).double() * pipeline.vae.config.scaling_factor


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared MMD with KID's kernel (x y / d + 1)^3 (arXiv 1801.01401), the U-statistic of pairs: 0 for equal sets."""
    kernel = [((x @ y.T / x.shape[1] + 1) ** 3) for x, y in ((a, a), (b, b), (a, b))]
    means = [float(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in kernel]
    return means[0] + means[1] - 2 * means[2]


def interval(values: list[float], reference: list[float] | None = None) -> list[float]:
    """95 % bootstrap interval over pictures of the mean, or of the ratio of two means of the same pictures."""
    index = np.random.RandomState(0).randint(0, len(values), (BOOTSTRAPS, len(values)))
    means = np.asarray(values)[index].mean(1)
    if reference is not None:
        means = means / np.asarray(reference)[index].mean(1)
    return [float(v) for v in np.quantile(means, (0.025, 0.975))]


def quantize(
    pipeline: Any, preset: str, bits: str, calibration: dict[str, Calibration], average_bits: float | None = None
) -> float:
    """Quantize in place; returns the true bits."""
    config = QuantizationConfig.from_name(bits)
    if preset in OURS:
        lrqdit.quantize(
            pipeline, bits, calibration=calibration, average_bits=average_bits, show_progress=False,
            stored_dtypes=dict.fromkeys(calibration, torch.float16), **OURS[preset],
        )  # fmt: skip
        found = measure_size(pipelines.denoisers(pipeline).half()).true_bits
        pipelines.denoisers(pipeline).float()
        return found
    both = config.weight_bits, config.activation_bits
    reports = [
        packages.quantize(PACKAGES[preset], getattr(pipeline, name), found.groups, *both)
        if preset in PACKAGES
        else simulate(getattr(pipeline, name), RECIPES[preset], found.groups, *both)
        for name, found in calibration.items()
    ]
    return sum(report.bits for report in reports) / sum(report.parameters for report in reports)


class Bench:
    """One model, its prompts, its original pictures and its calibration."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder, self.steps, self.guidance = args.model or demo.find_model(), args.steps, args.guidance_scale
        self.work = args.work
        self.is_demo = args.model is None
        if args.prompts:
            self.prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
        elif self.is_demo:
            self.entries, self.sheet = bench_captions.load_reference()
            self.chosen = bench_captions.choose_captions(self.entries)
            self.prompts = [self.entries[i]["name"] for i in self.chosen]
        else:
            self.prompts = list(prompts.EVALUATION_PROMPTS)
        self.calibration_prompts = list(demo.captions("calibration") if self.is_demo else prompts.CALIBRATION_PROMPTS)
        if args.calibration_prompts:
            lines = args.calibration_prompts.read_text().splitlines()
            self.calibration_prompts = [line.strip() for line in lines if line.strip()]
        if set(self.prompts) & set(self.calibration_prompts):
            raise SystemExit("some prompts are also calibration prompts")
        self._calibration: dict[str, Calibration] | None = None
        self.original = load(self.folder)
        self.references: list[generation.Sample] = []

    def setup(self) -> dict[str, Any]:
        """What a row depends on beside its preset and bits."""
        return {
            "model": "embedded" if self.is_demo else str(self.folder), "pictures": len(self.prompts),
            "steps": self.steps, "guidance_scale": self.guidance, "seed": SEED,
            "calibration_prompts": len(self.calibration_prompts), "calibration_steps": demo.CALIBRATION_STEPS,
            "kid_features": "latents of the model's own VAE", "lpips": evaluate.missing_for_lpips() or "AlexNet",
        }  # fmt: skip

    @property
    def calibration(self) -> dict[str, Calibration]:
        if self._calibration is None:
            modules = pipelines.denoisers(self.original)
            values = {**self.setup(), "prompts": self.calibration_prompts}
            folders = {
                name: RunFolder(self.work / name, describe_run(module, setup=values))
                for name, module in modules.items()
            }
            kept = {name: folder.load_calibration() for name, folder in folders.items()}
            if all(found is not None for found in kept.values()):
                self._calibration = {name: found for name, found in kept.items() if found is not None}
                return self._calibration
            start = time.monotonic()
            self._calibration = lrqdit.observe(
                self.original, prompts=self.calibration_prompts, steps=demo.CALIBRATION_STEPS,
                guidance_scale=self.guidance, batch_size=8 if self.is_demo else 1, show_progress=False,
            )  # fmt: skip
            for name, folder in folders.items():
                folder.save_calibration(self._calibration[name])
            print(f"calibration: {time.monotonic() - start:.0f} s", flush=True)
        return self._calibration

    def budget(self, preset: str, bits: str, rows: list[dict[str, Any]]) -> float | None:
        """The true bits that mixed precision is given: those of another preset's row, or counted."""
        if preset not in BUDGETS:
            return None
        for row in rows:
            if (row["preset"], row["bits"]) == (BUDGETS[preset], bits):
                return row["true_bits"]
        return quantize(load(self.folder), BUDGETS[preset], bits, self.calibration)

    def run(
        self, preset: str, bits: str, count: int | None = None, rows: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """One row; ``rows`` are those that are there already."""
        prompts = self.prompts[:count]
        if len(self.references) < len(prompts):
            self.references = generate(self.original, self.prompts[: max(count or 0, len(prompts))], self.steps,
                                       self.guidance)  # fmt: skip
        references = self.references[: len(prompts)]
        calibration = self.calibration
        average_bits = self.budget(preset, bits, rows or [])
        pipeline = load(self.folder)
        start = time.monotonic()
        true_bits = quantize(pipeline, preset, bits, calibration, average_bits)
        seconds = time.monotonic() - start
        samples = generate(pipeline, prompts, self.steps, self.guidance)
        squared = (pixels(samples) - pixels(references)).square().mean((1, 2, 3)).double().tolist()
        row: dict[str, Any] = {
            "preset": preset, "bits": bits, "true_bits": true_bits, "image_mse": float(np.mean(squared)),
            "image_mse_interval": interval(squared),
        }  # fmt: skip
        row |= evaluate.compare(references, samples)["metrics"]
        if hasattr(pipeline, "vae"):
            row["kid"] = kernel_distance(features(pipeline, references), features(pipeline, samples))
        if self.is_demo and len(prompts) == len(self.prompts):
            accuracy = bench_captions.measure_accuracy(pixels(samples) * 255, self.chosen, self.entries, self.sheet)
            row |= {"caption": accuracy["exact"], "subcategory": accuracy["subcategory"]}
        return row | {"seconds": seconds, "squared_errors": squared}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each row's error over that of the paper's method at the same setting, on the same pictures."""
    paper = {row["bits"]: row for row in rows if row["preset"] == "lrq-dit-paper"}
    for row in rows:
        if (reference := paper.get(row["bits"])) is not None:
            row["over_paper"] = row["image_mse"] / reference["image_mse"]
            row["over_paper_interval"] = interval(row["squared_errors"], reference["squared_errors"])


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['preset']:>18} {row['bits']}  {row['true_bits']:5.2f} bits  mse x 1000 {1000 * row['image_mse']:8.3f}  "
        f"psnr {row['psnr']:5.2f}  ssim {row['ssim']:.3f}  latent {row['latent_error']:.3f}  "
        f"kid {row.get('kid', float('nan')):.4f}  caption {row.get('caption', float('nan')):.2f}  "
        f"/ paper {row.get('over_paper', float('nan')):.2f}  {row['seconds']:.0f} s",
        flush=True,
    )


def measurable(presets: list[str], bits: str) -> list[str]:
    """The presets but for packages that are not installed or lack the setting, which are said to be left out."""
    config, kept = QuantizationConfig.from_name(bits), []
    for preset in presets:
        reason = ""
        if preset in PACKAGES:
            reason = packages.why_missing(PACKAGES[preset], config.weight_bits, config.activation_bits)
        if reason:
            print(f"{preset:>18} {bits}: left out, {reason}", flush=True)
        else:
            kept.append(preset)
    return kept


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(args)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() and not args.fresh else {}
    if results.get("setup") != bench.setup():
        results = {"setup": bench.setup(), "rows": []} | {k: v for k, v in results.items() if k == "layers"}
    for bits in args.bits:
        for preset in measurable(args.presets, bits):
            if any((row["preset"], row["bits"]) == (preset, bits) for row in results["rows"]):
                continue
            results["rows"].append(bench.run(preset, bits, rows=results["rows"]))
            add_ratios(results["rows"])
            print_row(results["rows"][-1])
            write(args.out, results)
    return results


def check(args: argparse.Namespace) -> None:
    """Recompute the first pictures of a few rows, or of those asked for; exit with an error where one differs."""
    bench, committed, failed = Bench(args), json.loads(args.out.read_text()), []
    if committed["setup"] != bench.setup():
        raise SystemExit(f"the results have another setup: {committed['setup']}")
    rows = {(row["preset"], row["bits"]): row for row in committed["rows"]}
    asked = [(preset, bits) for bits in args.bits or SETTINGS for preset in args.presets or ()]
    for preset, bits in asked or CHECKED:
        if (expected := rows.get((preset, bits))) is None:
            raise SystemExit(f"the results have no {preset} {bits}")
        found = bench.run(preset, bits, CHECKED_PICTURES)
        wanted = float(np.mean(expected["squared_errors"][:CHECKED_PICTURES]))
        difference = found["image_mse"] / wanted - 1
        same_bits = abs(found["true_bits"] - expected["true_bits"]) < 0.005
        print(f"{preset} {bits}: error {difference:+.1%}, true bits {found['true_bits']:.3f}", flush=True)
        if abs(difference) > CHECK_TOLERANCE or not same_bits:
            failed.append(f"{preset} {bits}")
    if failed:
        raise SystemExit(f"not as committed: {', '.join(failed)}")


def synthetic_inputs(width: int) -> dict[str, Callable[[int], Tensor]]:
    """Inputs of full-size layers as real ones have them, float32 (count, width) from a seed."""
    fixed = torch.Generator().manual_seed(11)
    basis = torch.linalg.qr(torch.randn(width, width, generator=fixed)).Q
    spectrum = torch.arange(1, width + 1).float() ** -0.8
    places = torch.randperm(width, generator=fixed)

    def gaussian(seed: int) -> Tensor:
        x = torch.randn(2048, width, generator=torch.Generator().manual_seed(seed))
        return x * spectrum / spectrum.square().mean().sqrt() @ basis

    def salient(seed: int) -> Tensor:
        x = gaussian(seed)
        # loud enough to take up a token's steps, and not so loud that the others do not count: a third of the output
        x[:, places[:6]] *= 20
        return x

    def offset(seed: int) -> Tensor:
        x = gaussian(seed)
        x[:, places[:3]] += 200
        return x

    def heavy(seed: int) -> Tensor:
        x, generator = gaussian(seed), torch.Generator().manual_seed(seed + 1)
        tail = torch.randn(len(x), 40, generator=generator) / torch.randn(
            len(x), 40, generator=generator
        ).abs().clamp_min(0.05)
        x[:, places[:40]] = tail
        return x

    return {"heavy spectrum": gaussian, "salient": salient, "offset": offset, "heavy tails": heavy}


def run_layers(bits: tuple[str, ...], width: int = 1152, height: int = 384) -> list[dict[str, Any]]:
    """Relative squared error of the varying part of a layer's output on fresh tokens, and the layer's bits a weight."""
    weight = torch.randn(height, width, generator=torch.Generator().manual_seed(5)) / width**0.5
    rows = []
    for name, draw in synthetic_inputs(width).items():
        stats = ActivationStats(width, 1024, 0, has_moment=True)
        for seed in range(4):
            stats.update(draw(seed))
        stats.update(draw(4), is_held_out=True)
        x = draw(5)
        target = nn.functional.linear(x, weight)
        varying = float((target - target.mean(0)).square().sum())
        for setting in bits:
            config = QuantizationConfig.from_name(setting)
            for preset in LAYER_PRESETS:
                if preset in OURS:
                    config = QuantizationConfig.from_name(setting, **OURS[preset])
                    both = config.weight_bits, config.activation_bits
                    transform, report = choose_transform({"layer": weight}, stats, config, *both)
                    curvature = None
                    if config.rounding == "compensated":
                        curvature = measure_curvature(transform, stats, both[1], config.damping)
                    shared = FittedInput(transform, both[1], curvature)
                    dense = SimpleNamespace(weight=weight, bias=None)
                    layer: nn.Module = quantize_linear("layer", dense, shared, both[0], config, report)
                    true_bits = packages.stored_bits(layer) / weight.numel()
                else:
                    model = nn.Sequential(nn.Linear(width, height, bias=False))
                    model[0].weight.data.copy_(weight)
                    groups = [InputGroup(["0"], stats)]
                    true_bits = simulate(
                        model, RECIPES[preset], groups, config.weight_bits, config.activation_bits
                    ).true_bits
                    layer = model[0]
                with torch.no_grad():
                    error = float((layer(x) - target).square().sum()) / varying
                row = {"input": name, "preset": preset, "bits": setting, "true_bits": true_bits, "error": error}
                rows.append(row)
                print(f"{name:>15} {preset:>18} {setting}: {error:.4f}", flush=True)
    return rows


def print_layers(rows: list[dict[str, Any]]) -> None:
    """One line for each preset: bits, the geometric mean of its errors, and the error of each input and setting."""
    cells = list(dict.fromkeys((row["input"], row["bits"]) for row in rows))
    errors: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        errors.setdefault(row["preset"], {})[row["input"], row["bits"]] = row["error"]
    means = {preset: float(np.exp(np.mean(np.log(list(found.values()))))) for preset, found in errors.items()}
    print(f"{'':>18} {'':>5} {'':>7} " + " ".join(f"{name:>14}" for name, _ in cells))
    print(f"{'':>18} {'bits':>5} {'mean':>7} " + " ".join(f"{bits:>14}" for _, bits in cells))
    for preset in sorted(means, key=lambda preset: means[preset]):
        true_bits = np.mean([row["true_bits"] for row in rows if row["preset"] == preset])
        values = " ".join(f"{errors[preset][cell]:14.4f}" for cell in cells)
        print(f"{preset:>18} {true_bits:5.2f} {means[preset]:7.4f} {values}")


def draw_pictures(args: argparse.Namespace) -> None:
    """A labelled grid of some of the rows' prompts with the same seeds: the originals, then each preset."""
    bench = Bench(args)
    places = range(0, len(bench.prompts), -(-len(bench.prompts) // SHOWN_PICTURES))
    prompts = [bench.prompts[place] for place in places]

    def draw(pipeline: Any) -> list[generation.Sample]:
        return generate(pipeline, prompts, args.steps, args.guidance_scale, places)

    references = draw(bench.original)
    rows = [("original", references)]
    for bits in args.bits:
        for preset in measurable(args.presets, bits):
            pipeline = load(bench.folder)
            true_bits = quantize(pipeline, preset, bits, bench.calibration, bench.budget(preset, bits, []))
            samples = draw(pipeline)
            psnr = evaluate.compare(references, samples)["metrics"]["psnr"]
            rows.append((f"{preset} {bits}: {true_bits:.2f} bits, {psnr:.1f} dB", samples))
            print(rows[-1][0], flush=True)
    cells = [(label, [sample.picture for sample in samples]) for label, samples in rows]
    picture_grid(cells, prompts, CELL_PIXELS).save(args.pictures)


def write(path: Path, results: dict[str, Any]) -> None:
    write_atomically(path, lambda partial: partial.write_text(json.dumps(results, indent=1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a diffusers pipeline; the demo model if not given")
    parser.add_argument("--prompts", type=Path, help="one prompt in each line")
    parser.add_argument("--calibration-prompts", type=Path, help="one prompt in each line")
    parser.add_argument("--presets", nargs="+", choices=(*PRESETS, *PACKAGES))
    parser.add_argument("--bits", nargs="+")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=demo.GUIDANCE_SCALE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="where the calibration is kept")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--pictures", type=Path, help="PNG file of a few pictures of each preset beside the originals")
    args = parser.parse_args()
    if not args.check:
        args.presets = args.presets or list(SHOWN_PRESETS if args.pictures else PRESETS)
        args.bits = args.bits or list(("w3a4",) if args.pictures else SETTINGS)
    torch.set_grad_enabled(False)
    if args.check:
        check(args)
    elif args.layers:
        results = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
        results["layers"] = run_layers(("w4a8", "w4a4"))
        write(args.out, results)
        print_layers(results["layers"])
    elif args.pictures:
        draw_pictures(args)
    else:
        results = run_all(args)
        print(json.dumps({"rows": [{k: v for k, v in r.items() if k != "squared_errors"} for r in results["rows"]]}))


if __name__ == "__main__":
    main()
