"""Write the golden checkpoints that are missing in the current format version; old ones are never written again.

    python tests/golden/make.py

Each folder holds a checkpoint and ``expected.safetensors``: an input, and the output of the model that was saved.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import lrqdit
from lrqdit.packed.format import FORMAT_VERSION

FOLDER = Path(__file__).parent
VARIANTS = {
    "w3a8-trellis": {"coding": "trellis"},
    "w4a4-principal": {"rotation": "hadamard", "smoothing": "always"},
    "w4a8": {},
    "w5a8": {},
    "w6a8": {"table_scope": "row"},
    "w3a4": {"rotation": "hadamard", "smoothing": "always"},
    "w2a8": {"rotation": "outlier", "rounding": "nearest", "table_scope": "row", "keep_bits": 16},
}


class Block(nn.Module):
    """Three layers that share an input, one without a bias, and one of odd width; beside them a layer that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_proj = nn.Linear(52, 96)
        q, k, v, out = nn.Linear(96, 40), nn.Linear(96, 40), nn.Linear(96, 33, bias=False), nn.Linear(33, 96)
        self.blocks = nn.ModuleList([nn.ModuleDict({"q": q, "k": k, "v": v, "out": out})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding_proj(x)
        block = self.blocks[0]
        mixed = torch.softmax(block["q"](x) @ block["k"](x).transpose(-1, -2), dim=-1) @ block["v"](x)
        return x + block["out"](mixed)


def main() -> None:
    for name, settings in VARIANTS.items():
        folder = FOLDER / f"v{FORMAT_VERSION}" / name
        if folder.exists():
            print(f"{folder.name} exists; a golden checkpoint is never rewritten")
            continue
        torch.manual_seed(7)
        model, x = Block(), torch.randn(24, 52)
        if "principal" in name:
            x = 0.3 * x + 3 * torch.randn(24, 2) @ torch.randn(2, 52)
        lrqdit.quantize(model, name.split("-")[0], forward_loop=lambda m, x=x: m(x), show_progress=False, **settings)
        lrqdit.save_checkpoint(model, folder)
        with torch.no_grad():
            save_file({"x": x, "y": model(x)}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
