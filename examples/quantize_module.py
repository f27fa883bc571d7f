"""Quantize a plain torch module, save it, and load it into a freshly built one. Takes seconds.

Run: python examples/quantize_module.py
"""

from pathlib import Path

import torch
from torch import nn

import lrqdit


class Denoiser(nn.Module):
    """Stands for a model of yours: linear layers in repeated blocks, inputs and outputs of shape (tokens, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


torch.manual_seed(0)
model = Denoiser().eval()
batches = torch.randn(32, 128, 64)  # what calibration shall see: data of the kind that the model will run on
unseen = torch.randn(128, 64)
with torch.no_grad():
    expected = model(unseen)


def run(module: nn.Module) -> None:
    for batch in batches:
        module(batch)


report = lrqdit.quantize(model, "w4a8", forward_loop=run)
size = report.size
print(f"{report.bytes_before:,} bytes became {size.size_bytes:,}: {size.true_bits:.2f} bits per parameter")
for group in report.groups[:2]:
    print(f"  {', '.join(group.names)}: {group.weight_bits} bits, rotation {group.rotation}, error {group.error:.4f}")

folder = Path("examples-out/module")
lrqdit.save_checkpoint(model, folder)
loaded = lrqdit.load_checkpoint(Denoiser().eval(), folder)
with torch.no_grad():
    output = loaded(unseen)
    assert torch.equal(output, model(unseen))
print(f"loaded from {folder}: relative error {float((output - expected).norm() / expected.norm()):.4f}")
