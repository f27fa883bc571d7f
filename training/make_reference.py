"""Write benchmarks/data/emoji.png and emoji.json: every Noto emoji at 32 px, the reference of bench_captions.py.

python training/make_reference.py --work training/work
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import emoji_data  # noqa: E402

COLUMNS = 48
FOLDER = Path(__file__).parents[1] / "benchmarks/data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    root = emoji_data.fetch(parser.parse_args().work / "data")
    emoji = emoji_data.load_emoji(root)
    small = F.avg_pool2d(emoji_data.load_pictures(root, emoji).float(), 2).round().to(torch.uint8)
    rows = -(-len(small) // COLUMNS)
    sheet = torch.full((rows * COLUMNS, 3, 32, 32), 255, dtype=torch.uint8)
    sheet[: len(small)] = small
    sheet = sheet.view(rows, COLUMNS, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(rows * 32, COLUMNS * 32, 3)
    FOLDER.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.numpy()).save(FOLDER / "emoji.png", optimize=True)
    entries = [{"name": e.name, "subcategory": e.subcategory, "is_trained": e.is_trained} for e in emoji]
    (FOLDER / "emoji.json").write_text(json.dumps(entries, indent=0))


if __name__ == "__main__":
    main()
