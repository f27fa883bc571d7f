"""Quantize a diffusers pipeline on prompts of your own, save it, load it by diffusers, and compare a picture.

Runs on the demo model, whose captions are names of emoji; name another pipeline's folder or hub id to use that.

Run: python examples/quantize_pipeline.py [MODEL]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

import lrqdit
from lrqdit.app.demo import find_model

# a few dozen are better
PROMPTS = ["snowman", "trophy", "frog face", "red apple", "ferry", "dumpling", "panda face", "popcorn"]
STEPS = 6

source = sys.argv[1] if len(sys.argv) > 1 else find_model()
pipeline = DiffusionPipeline.from_pretrained(source)
pipeline.set_progress_bar_config(disable=True)


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    """A picture of a caption that calibration did not see: (height, width, 3), float in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": STEPS, "use_resolution_binning": False, "clean_caption": False}
    return pipeline("fox face", generator=generator, output_type="np", **call).images[0]


original = draw(pipeline)
report = lrqdit.quantize(pipeline, "w4a8", prompts=PROMPTS, steps=STEPS)
print(f"{report.size.true_bits:.2f} bits per parameter of the transformer, everything counted")

folder = Path("examples-out/pipeline")
pipeline.save_pretrained(folder)
loaded = DiffusionPipeline.from_pretrained(folder)  # lrqdit is imported, so diffusers knows the format
loaded.set_progress_bar_config(disable=True)
error = float(np.mean((draw(loaded) - original) ** 2))
print(f"{folder}: the picture is {10 * np.log10(1 / error):.1f} dB (PSNR) from the original's")
