"""Quantize a transformer while diffusers loads it: no data, no calibration, never the whole model in float.

Calibration gives better pictures (quantize_pipeline.py); this is quicker and needs less memory.

Run: python examples/quantize_while_loading.py [MODEL]
"""

import sys
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel

import lrqdit
from lrqdit.app.demo import find_model

source = Path(sys.argv[1] if len(sys.argv) > 1 else find_model()) / "transformer"  # of a PixArt pipeline
original = PixArtTransformer2DModel.from_pretrained(source)
inputs = {
    "hidden_states": torch.randn(1, original.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0)),
    "encoder_hidden_states": torch.randn(
        1, 6, original.config.caption_channels, generator=torch.Generator().manual_seed(1)
    ),
    "timestep": torch.tensor([500]),
    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
}
with torch.no_grad():
    expected = original(**inputs).sample
for preset in ("w4a8", "w3a8"):
    model = PixArtTransformer2DModel.from_pretrained(source, quantization_config=lrqdit.LRQDiTConfig(preset))
    folder = Path("examples-out") / f"transformer-{preset}"
    model.save_pretrained(folder)
    with torch.no_grad():
        output = PixArtTransformer2DModel.from_pretrained(folder)(**inputs).sample
    error = float((output - expected).norm() / expected.norm())
    print(f"{preset}: {lrqdit.measure_size(model).true_bits:.2f} bits per parameter, relative error {error:.3f}")
