"""The demo: quantize a small text-to-emoji pipeline to three presets and show what became of its pictures.

The demo model is a real PixArt pipeline, made by ``training/train_demo.py``; it comes in a package of its own,
``lrqdit-demo`` (24 MB, the folder ``demo/``). Each quantized pipeline is saved, loaded back by diffusers'
from_pretrained, and the pictures come from the loaded one.
"""

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrqdit.api import observe, quantize
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ModelError
from lrqdit.evaluation.metrics import compare
from lrqdit.evaluation.pages import picture_grid
from lrqdit.integrations.generation import generate_images
from lrqdit.integrations.pipelines import check_output_folder, denoiser_file_bytes, load_pipeline, save_quantized

PRESETS = ("w4a8", "w3a8", "w4a4")
STEPS, CALIBRATION_STEPS, GUIDANCE_SCALE, SEED = 20, 10, 3.0, 0
COLUMNS = ("preset", "true_bits", "before", "after", "psnr", "ssim", "latent_error", "seconds")


def find_model() -> Path:
    """The folder of the demo model.

    Raises:
        ModelError: if the package ``lrqdit-demo`` is not installed.
    """
    spec = importlib.util.find_spec("lrqdit_demo")
    if spec is None or spec.origin is None:
        raise ModelError(
            "the demo model is a package of its own and is not installed: pip install ./demo in a checkout of lrqdit"
        )
    return Path(spec.origin).with_name("model")


def captions(name: str) -> list[str]:
    """The demo model's captions for ``calibration`` (64, of no other use, here or in benchmarks) or to be ``shown``."""
    return json.loads(find_model().with_name("captions.json").read_text(encoding="utf-8"))[name]


def run_demo(
    out: str | Path = "demo-out",
    presets: Sequence[str] = PRESETS,
    *,
    model_folder: str | Path | None = None,
    steps: int = STEPS,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Quantize, save, load and compare; write ``comparison.png``, ``results.json`` and a folder per preset.

    Args:
        out: where to write; what an earlier demo wrote there is replaced.
        presets: what to quantize to.
        model_folder: the pipeline to start from; the demo model if not given.
        steps: denoising steps of the shown pictures, and at most of calibration, which every preset shares.
        show_progress: progress bars on stderr.

    Returns:
        What ``results.json`` holds: ``rows``, one dictionary per preset. ``bytes_before`` and ``bytes_after`` are the
        transformer's files, ``true_bits`` their tensors over all of its parameters, ``psnr``, ``ssim`` and
        ``latent_error`` means over the shown prompts against the original's pictures, ``seconds`` the time from loading
        the original to the last picture, without the shared calibration.

    Raises:
        ModelError: if the demo model is not installed.
        ConfigError: for an unknown preset.
    """
    out = Path(out)
    for preset in presets:
        QuantizationConfig.from_name(preset)
        check_output_folder(out / preset, is_overwritten=True)
    model_folder = find_model() if model_folder is None else Path(model_folder)
    shown = captions("shown")
    out.mkdir(parents=True, exist_ok=True)
    generation: dict[str, Any] = {"steps": steps, "guidance_scale": GUIDANCE_SCALE, "show_progress": show_progress}
    original = load_pipeline(model_folder, device="cpu")
    references = generate_images(original, shown, SEED, description="original", **generation)
    pictures = [("original", [sample.picture for sample in references])]
    rows = []
    calibration = observe(
        original, prompts=captions("calibration"), steps=min(steps, CALIBRATION_STEPS), guidance_scale=GUIDANCE_SCALE,
        show_progress=show_progress, batch_size=8,
    )  # fmt: skip
    for preset in presets:
        start = time.monotonic()
        pipeline = load_pipeline(model_folder, device="cpu")
        report = quantize(pipeline, preset, calibration=calibration, show_progress=show_progress)
        save_quantized(pipeline, report, model_folder, out / preset)
        loaded = load_pipeline(out / preset, device="cpu")
        samples = generate_images(loaded, shown, SEED, description=preset, **generation)
        pictures.append((preset, [sample.picture for sample in samples]))
        means = compare(references, samples)["metrics"]
        rows.append({
            "preset": preset,
            "true_bits": report.size.true_bits,
            "bytes_before": report.bytes_before,
            "bytes_after": denoiser_file_bytes(out / preset),
            "psnr": means["psnr"],
            "ssim": means["ssim"],
            "latent_error": means["latent_error"],
            "seconds": time.monotonic() - start,
        })  # fmt: skip
    results = {"rows": rows}
    picture_grid(pictures, shown).save(out / "comparison.png")
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results
