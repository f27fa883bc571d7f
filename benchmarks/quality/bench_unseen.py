"""A diffusion model that the package knows nothing of: plain torch, trained here in minutes, the generic call.

It denoises emoji of 16 x 16 pixels by rectified flow, with names of layers, conditioning and pictures of its own. Every
method gets the same calibration; pictures are compared from noise and emoji that calibration did not see.

    python -m benchmarks.quality.bench_unseen [--train-steps 3000] [--work FOLDER]
"""

import argparse
import copy
import json
import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import lrqdit
from benchmarks.methods.recipes import RECIPES
from benchmarks.methods.simulate import simulate
from benchmarks.quality.bench_captions import load_reference
from benchmarks.quality.bench_quality import interval
from lrqdit.config import QuantizationConfig

WIDTH, BLOCKS, HEADS, PATCH, SIDE = 128, 5, 4, 2, 16
TOKENS = (SIDE // PATCH) ** 2
SETTINGS = ("w4a8", "w3a8", "w4a4", "w3a4")
OURS = {"lrqdit": {}, "lrq-dit-paper": {"mode": "paper"}}
PRESETS = (*OURS, "rtn", "quarot", "q-dit", "quarot+gptq", "svdquant+gptq")
SAMPLING_STEPS, PICTURES, CALIBRATED = 16, 64, 64


class Mixer(nn.Module):
    """One block: attention and a gated feed-forward layer, both scaled by the time and the emoji."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 3 * WIDTH)
        self.back = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 4 * WIDTH)
        self.value = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.tune = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, d, e = self.tune(F.silu(c))[:, None].chunk(4, dim=-1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + a)
        q, k, v = self.wide(h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + b * self.back(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, (WIDTH,)) * (1 + d)
        return x + e * self.down(F.gelu(self.gate(h)) * self.value(h))


class Painter(nn.Module):
    """Velocity of pixels (batch, 3, 16, 16) at times (batch,) for emoji (batch,) by number."""

    def __init__(self, emoji: int) -> None:
        super().__init__()
        self.enter = nn.Linear(3 * PATCH**2, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.which = nn.Embedding(emoji, WIDTH)
        self.when = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.body = nn.ModuleList(Mixer() for _ in range(BLOCKS))
        self.leave = nn.Linear(WIDTH, 3 * PATCH**2)

    def forward(self, pixels: Tensor, time: Tensor, emoji: Tensor) -> Tensor:
        waves = time[:, None] * torch.exp(torch.linspace(0, 6, 32))
        c = self.when(torch.cat([waves.sin(), waves.cos()], dim=1)) + self.which(emoji)
        x = self.enter(F.pixel_unshuffle(pixels, PATCH).flatten(2).transpose(1, 2)) + self.place
        for block in self.body:
            x = block(x, c)
        x = self.leave(F.layer_norm(x, (WIDTH,))).transpose(1, 2).unflatten(2, (SIDE // PATCH, SIDE // PATCH))
        return F.pixel_shuffle(x, PATCH)


def load_pictures() -> Tensor:
    """The trained emoji of the embedded model, float32 (count, 3, 16, 16) in [-1, 1]."""
    entries, tiles = load_reference()
    chosen = [i for i, entry in enumerate(entries) if entry["is_trained"]]
    return F.avg_pool2d(tiles[chosen], 2) / 127.5 - 1


def train(model: Painter, pictures: Tensor, steps: int) -> float:
    """Rectified flow (arXiv 2209.03003); returns the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(steps):
        emoji = torch.randint(0, len(pictures), (64,), generator=generator)
        noise, time = torch.randn(64, 3, SIDE, SIDE, generator=generator), torch.rand(64, generator=generator)
        t = time[:, None, None, None]
        loss = (model(t * pictures[emoji] + (1 - t) * noise, time, emoji) - (pictures[emoji] - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 500 == 499:
            print(f"step {step + 1}: loss {np.mean(losses[-500:]):.4f}", flush=True)
    return float(np.mean(losses[-max(1, steps // 10) :]))


@torch.no_grad()
def paint(model: nn.Module, emoji: Tensor, seed: int) -> Tensor:
    """Pictures from noise, in [0, 1]."""
    x = torch.randn(len(emoji), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    for step in range(SAMPLING_STEPS):
        x = x + model(x, torch.full((len(emoji),), step / SAMPLING_STEPS), emoji) / SAMPLING_STEPS
    return (x.clamp(-1, 1) + 1) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--bits", nargs="+", default=SETTINGS)
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="where the trained model is kept")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    pictures = load_pictures()
    torch.manual_seed(0)
    model, kept = Painter(len(pictures)), arguments.work / f"unseen-{arguments.train_steps}.safetensors"
    if kept.exists():
        load_model(model, kept)
    else:
        train(model, pictures, arguments.train_steps)
        arguments.work.mkdir(parents=True, exist_ok=True)
        save_model(model, kept)
    model.eval()
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(1))
    seen, unseen = order[:CALIBRATED], order[CALIBRATED : CALIBRATED + PICTURES]

    def calibrate(module: nn.Module) -> None:
        for part in seen.split(8):
            paint(module, part, seed=int(part[0]))

    exact = paint(model, unseen, seed=12345)
    off = float((exact - (pictures[unseen] + 1) / 2).square().mean())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; squared error to the emoji itself {off:.4f}")
    calibration = lrqdit.observe(model, forward_loop=calibrate)
    rows = []
    for bits in arguments.bits:
        config, errors = QuantizationConfig.from_name(bits), {}
        for preset in PRESETS:
            changed = copy.deepcopy(model)
            if preset in OURS:
                lrqdit.quantize(changed, bits, calibration=calibration, show_progress=False, **OURS[preset])
                true_bits = lrqdit.measure_size(changed.half()).true_bits
                changed.float()
            else:
                groups = next(iter(calibration.values())).groups
                report = simulate(changed, RECIPES[preset], groups, config.weight_bits, config.activation_bits)
                true_bits = report.true_bits
            errors[preset] = (paint(changed, unseen, seed=12345) - exact).square().mean((1, 2, 3)).double().tolist()
            ratio = np.mean(errors["lrqdit"]) / np.mean(errors[preset])
            low, high = interval(errors["lrqdit"], errors[preset])
            print(
                f"{bits} {preset:>16}  {true_bits:5.2f} bits  mse x 1000 {1000 * np.mean(errors[preset]):8.3f}  "
                f"lrqdit over it {ratio:.2f} ({low:.2f} to {high:.2f})",
                flush=True,
            )
            rows.append(
                {"preset": preset, "bits": bits, "true_bits": true_bits, "image_mse": float(np.mean(errors[preset])),
                 "lrqdit_over_it": float(ratio), "lrqdit_over_it_interval": [low, high]}
            )  # fmt: skip
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
