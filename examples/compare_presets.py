"""Quantize one model to several presets from one calibration, and compare sizes and outputs.

Runs on the demo model, whose captions are names of emoji; name another pipeline's folder or hub id to use that.

Run: python examples/compare_presets.py [MODEL]
"""

import copy
import sys

import torch
from diffusers import DiffusionPipeline

import lrqdit
from lrqdit.app.demo import find_model

# a few dozen are better
PROMPTS = ["snowman", "trophy", "frog face", "red apple", "ferry", "dumpling", "panda face", "popcorn"]
PRESETS = ["w4a8", "w3a8"]
STEPS = 4

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else find_model())
pipeline.set_progress_bar_config(disable=True)
original = pipeline.transformer


def denoise() -> torch.Tensor:
    """Latents of a caption that calibration did not see."""
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": STEPS, "use_resolution_binning": False, "clean_caption": False}
    return pipeline("fox face", generator=generator, output_type="latent", **call).images


expected = denoise()
calibration = lrqdit.observe(pipeline, prompts=PROMPTS, steps=STEPS, batch_size=4)  # the model runs here, once
for preset in PRESETS:
    pipeline.transformer = copy.deepcopy(original)
    report = lrqdit.quantize(pipeline, preset, calibration=calibration, show_progress=False)
    error = float((denoise() - expected).norm() / expected.norm())
    print(
        f"{preset}: {report.size.true_bits:.2f} bits per parameter, {report.size.size_bytes:,} bytes, "
        f"latent error {error:.3f}, {report.quantization_seconds:.1f} s"
    )
