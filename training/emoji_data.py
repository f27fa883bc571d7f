"""The demo model's data: Noto emoji at 64 x 64 px with names and categories.

The pictures come from the npm package ``emoji-datasource-google`` (art by Google, Apache-2.0; metadata MIT). ``fetch``
downloads its tarball through the ``npm`` client once and verifies its digest; nothing else touches the network.
"""

import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
TRAINED_CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities")
TRAINED_SUBCATEGORIES = ("sky & weather", "transport-air", "transport-water")


@dataclass(frozen=True)
class Emoji:
    """One emoji: its Unicode name in lower case, category, subcategory, short aliases and picture file."""

    name: str
    category: str
    subcategory: str
    aliases: tuple[str, ...]
    file: str

    @property
    def is_trained(self) -> bool:
        """Whether the demo model is trained on it (its stated subset)."""
        return self.category in TRAINED_CATEGORIES or self.subcategory in TRAINED_SUBCATEGORIES

    def captions(self) -> list[str]:
        """Every wording the model sees for this emoji during training; the first is the one it is tested on."""
        group = self.category.split()[0].lower()
        words = [self.name, f"an emoji of {self.name}", f"{self.name}, {group}", f"{self.name} emoji"]
        return words + [alias for alias in self.aliases if alias != self.name]


def fetch(folder: Path) -> Path:
    """Download and unpack the package's 64 px pictures into ``folder``; return the package's folder."""
    root = folder / "package"
    if (root / "emoji.json").exists():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", f"{PACKAGE}@{VERSION}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    archive = folder / f"{PACKAGE}-{VERSION}.tgz"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{archive}: sha256 is {digest}, expected {SHA256}; delete it and run again")
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar if m.name == "package/emoji.json" or m.name.startswith("package/img/google/64/")]
        wanted = [m for m in wanted if m.isfile() and ".." not in m.name]
        # emoji.json marks a complete unpacking, so it is written last
        for member in sorted(wanted, key=lambda m: m.name == "package/emoji.json"):
            tar.extract(member, folder)
    return root


def load_emoji(root: Path) -> list[Emoji]:
    """Every emoji that has a Noto picture, without skin-tone variants, in the order of Unicode's chart."""
    entries = json.loads((root / "emoji.json").read_text())
    entries = sorted((e for e in entries if e["has_img_google"]), key=lambda e: (e["sort_order"], e["unified"]))
    return [
        Emoji(
            (e["name"] or e["short_name"]).lower(),
            e["category"],
            e["subcategory"],
            tuple(dict.fromkeys(a.replace("_", " ").replace("-", " ") for a in e["short_names"])),
            e["image"],
        )
        for e in entries
    ]


def load_pictures(root: Path, emoji: list[Emoji]) -> torch.Tensor:
    """The pictures on white as uint8 (count, 3, 64, 64)."""
    pictures = []
    for item in emoji:
        picture = Image.open(root / "img/google/64" / item.file).convert("RGBA")
        if picture.size != (64, 64):
            picture = picture.resize((64, 64), Image.LANCZOS)
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        pictures.append(np.asarray(Image.alpha_composite(white, picture).convert("RGB")))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
