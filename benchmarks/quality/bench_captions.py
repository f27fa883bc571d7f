"""Does the demo model draw what its caption says, and do its quantized forms still?

For 64 fixed captions (evenly spaced over the 613 emoji the model was trained on) the generated picture's nearest
neighbour among all 1,911 Noto emoji, by squared distance at 32 px, must be the captioned one, or one of its Unicode
subcategory. Prints the share for the original and for every preset named, then JSON.
None of the 64 is a calibration prompt.

    python -m benchmarks.quality.bench_captions w4a8 w3a8 w4a4
    python -m benchmarks.quality.bench_captions path/to/quantized-pipeline
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image

import lrqdit
from lrqdit.app import demo
from lrqdit.integrations.generation import call_pipeline

DATA = Path(__file__).parents[1] / "data"
CAPTIONS = 64


def load_reference() -> tuple[list[dict], torch.Tensor]:
    """Entries of all emoji and their pictures, float32 (count, 3, 32, 32) in [0, 255]."""
    entries = json.loads((DATA / "emoji.json").read_text())
    sheet = torch.from_numpy(np.asarray(Image.open(DATA / "emoji.png").convert("RGB")).copy())
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    tiles = sheet.view(rows, 32, columns, 32, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return entries, tiles[: len(entries)].float()


def choose_captions(entries: list[dict]) -> list[int]:
    """Indices of the 64 captions the model is tested on."""
    trained = [index for index, entry in enumerate(entries) if entry["is_trained"]]
    return [trained[i * len(trained) // CAPTIONS] for i in range(CAPTIONS)]


def generate(pipeline: DiffusionPipeline, captions: list[str], seed: int) -> torch.Tensor:
    """Pictures of the captions, float32 (count, 3, 64, 64) in [0, 255]; each caption has a seed of its own."""
    pictures, given = [], {"num_inference_steps": demo.STEPS, "guidance_scale": demo.GUIDANCE_SCALE}
    for start in range(0, len(captions), 16):
        batch = captions[start : start + 16]
        seeds = [seed + start + i for i in range(len(batch))]
        images = call_pipeline(pipeline, batch, seeds, given, "np")[0].images
        pictures.append(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() * 255)
    return torch.cat(pictures)


def measure_accuracy(pictures: torch.Tensor, chosen: list[int], entries: list[dict], reference: torch.Tensor) -> dict:
    """Shares of pictures whose nearest emoji is the captioned one, and the captioned one or its subcategory."""
    small = F.avg_pool2d(pictures, 2).flatten(1)
    nearest = torch.cdist(small, reference.flatten(1)).argmin(dim=1).tolist()
    exact = sum(found == wanted for found, wanted in zip(nearest, chosen, strict=True))
    related = sum(
        entries[found]["subcategory"] == entries[wanted]["subcategory"]
        for found, wanted in zip(nearest, chosen, strict=True)
    )
    return {"exact": exact / len(chosen), "subcategory": related / len(chosen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["w4a8"], help="presets, or folders of quantized pipelines")
    parser.add_argument("--mode", default="auto", choices=["auto", "paper"])
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--sheet", type=Path, help="write the original's 64 pictures here")
    args = parser.parse_args()
    entries, reference = load_reference()
    chosen = choose_captions(entries)
    captions = [entries[i]["name"] for i in chosen]
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows, calibration = [], None
    for name in ["original", *args.models]:
        folder = Path(name) if Path(name).is_dir() else demo.find_model()
        pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        if name != "original" and not Path(name).is_dir():
            if calibration is None:
                calibration = lrqdit.observe(
                    pipeline, prompts=demo.captions("calibration"), steps=demo.CALIBRATION_STEPS,
                    guidance_scale=demo.GUIDANCE_SCALE, batch_size=8,
                )  # fmt: skip
            lrqdit.quantize(pipeline, name, calibration=calibration, mode=args.mode)
        pictures = generate(pipeline, captions, args.seed)
        if args.sheet and name == "original":
            sheet = pictures.view(8, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(512, 512, 3)
            Image.fromarray(sheet.clamp(0, 255).byte().numpy()).save(args.sheet)
        row = {"model": name, **measure_accuracy(pictures, chosen, entries, reference)}
        row["true_bits"] = lrqdit.measure_size(pipeline.transformer).true_bits
        rows.append(row)
        print(f"{name:>10}: caption {row['exact']:6.1%}, caption or subcategory {row['subcategory']:6.1%}", flush=True)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
