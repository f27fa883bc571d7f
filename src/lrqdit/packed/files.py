"""Files: checked before anything of them is read (JSON, the headers of safetensors), and written whole or not at all.

Nothing here imports torch.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lrqdit.errors import CheckpointError
from lrqdit.packed.format import DTYPE_BYTES

WEIGHT_FILE = "model.safetensors"
INDEX_FILE = "model_index.json"  # of a pipeline
CONFIG_FILE = "config.json"
REPORT_FILE = "lrqdit_report.json"  # of a pipeline's quantization
_MAX_HEADER_BYTES = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object, or raise :class:`CheckpointError` naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is the folder complete?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values


def check_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """Check a safetensors file's header, without reading tensors; returns dtype, shape and offsets by tensor name."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the whole folder again")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is not a safetensors file or is truncated ({size} bytes); copy it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 0
            for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
                start, stop = entry["data_offsets"]
                if start != end or stop - start != math.prod(entry["shape"]) * DTYPE_BYTES[entry["dtype"]]:
                    raise ValueError(entry)
                end = stop
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header; copy it again") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes but its header describes {8 + length + end}; copy it again")
    return header


def check_model_folder(folder: Path) -> list[str]:
    """Check every weight file of a model folder; returns the tensor names (none if the folder has no safetensors)."""
    names: list[str] = []
    index_files = sorted(folder.glob("*.safetensors.index.json"))
    for index_file in index_files:
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index_file} has no weight_map from tensors to files; copy it again")
        for file_name in sorted(set(weight_map.values())):
            if Path(file_name).name != file_name:
                raise CheckpointError(
                    f"{index_file} names {file_name!r}, which lies outside its folder; do not load it"
                )
            names += check_safetensors(folder / file_name)
        missing = sorted(set(weight_map) - set(names))
        if missing:
            raise CheckpointError(f"{folder} lacks the tensor {missing[0]} that {index_file.name} lists; copy it again")
    for path in [] if index_files else sorted(folder.glob("*.safetensors")):
        names += check_safetensors(path)
    return names


def check_pipeline_folder(folder: str | Path) -> dict[str, Any]:
    """Check that a folder is a complete diffusers pipeline; returns its ``model_index.json``.

    Raises:
        CheckpointError: if it is not a pipeline, a component is missing, or a weight file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass a diffusers pipeline folder or a hub id")
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"{folder} has no {INDEX_FILE}, so it is not a diffusers pipeline folder")
    index = read_json(folder / INDEX_FILE)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[:1] in ([], [None]):
            continue
        part = folder / name
        if Path(name).name != name or not part.is_dir():
            raise CheckpointError(f"{folder} lists the component {name!r}, but has no such folder; copy it again")
        check_model_folder(part)
        if (part / CONFIG_FILE).exists():
            read_json(part / CONFIG_FILE)
    return index


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the final name, then rename: the file appears whole or not at all, even if the power fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_folder_atomically(folder: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a sibling folder, then put that in place of ``folder``: readers see the old or the new one."""
    folder = Path(folder).absolute()
    partial, replaced = folder.with_name(f"{folder.name}.writing"), folder.with_name(f"{folder.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(partial, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def variant_of(path: Path) -> str | None:
    """The variant in a weight file's name: ``fp16`` of ``model.fp16-00001-of-00002.safetensors``, None without one."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
    return stem.partition(".")[2] or None


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files directly in a model folder, of one variant if there is one of that name."""
    found = sorted(Path(folder).glob("*.safetensors"))
    return [path for path in found if variant_of(path) == variant] or found


def tensor_headers(folder: Path, variant: str | None = None) -> Iterator[tuple[str, str, list[int]]]:
    """Name, safetensors dtype and shape of every tensor in a model folder, read from the files' headers only."""
    for path in weight_files(folder, variant):
        for name, entry in check_safetensors(path).items():
            yield name, entry["dtype"], entry["shape"]


def weight_file_bytes(folder: Path, variant: str | None = None) -> int:
    """Bytes of the safetensors files directly in a model folder."""
    return sum(path.stat().st_size for path in weight_files(folder, variant))
