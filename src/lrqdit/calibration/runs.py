"""The folder of an unfinished run: finished parts, with marks of everything that they depend on."""

import contextlib
import dataclasses
import enum
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrqdit.calibration.statistics import ActivationStats, InputGroup
from lrqdit.calibration.steps import Calibration, Call, Step
from lrqdit.errors import CheckpointError, ConfigError
from lrqdit.packed.files import check_safetensors, read_json, write_atomically
from lrqdit.packed.format import FORMAT_VERSION

MARKS_FILE = "marks.json"
_LOG = logging.getLogger("lrqdit")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, by a hidden file beside it; :class:`CheckpointError` if one is in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout:
        raise CheckpointError(
            f"{folder} is in use by another run; wait for it to end, or pass another folder"
        ) from None


class RunFolder:
    """Results of an unfinished run, one safetensors file each, with marks of everything they depend on.

    Files are written beside their final name and renamed, so a killed run leaves complete results only. A folder whose
    marks differ is emptied, and a warning says which do. While it is open no other process can open it.

    Args:
        folder: created if missing.
        marks: name and value of what the results depend on, see :func:`describe_run`.

    Raises:
        CheckpointError: if the folder holds files of something else, or another process has it open.
    """

    def __init__(self, folder: str | Path, marks: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            self._open(dict(marks))
            self.close = stack.pop_all().close  # lets others open the folder

    def _open(self, marks: dict[str, str]) -> None:
        marker = self.folder / MARKS_FILE
        if marker.exists():
            try:
                found = read_json(marker)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; remove {self.folder}, an unfinished run, and start again") from error
            differing = sorted(name for name in found.keys() | marks.keys() if found.get(name) != marks.get(name))
            if differing:
                what = ", ".join(f"{name} (was {found.get(name)}, now {marks.get(name)})" for name in differing)
                _LOG.warning("%s: starts again, because these differ: %s", self.folder, what)
                shutil.rmtree(self.folder)
        elif any(path.name != f"{MARKS_FILE}.partial" for path in self.folder.glob("*")):
            raise CheckpointError(
                f"{self.folder} holds files of something else, and a run's folder is emptied; pass another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, lambda path: path.write_text(json.dumps(marks, indent=1), encoding="utf-8"))

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        metadata = {"values": json.dumps(values)}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_atomically(self.folder / f"{name}.safetensors", lambda path: save_file(tensors, path, metadata))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What :meth:`save` kept; None if there is nothing, or if it is damaged, with a warning."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            check_safetensors(path)
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["values"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            _LOG.warning("%s is damaged and computed again: %s", path, error)
            return None

    def save_calibration(self, calibration: Calibration) -> None:
        """Keep the calibration of a model."""
        groups, names = enumerate(calibration.groups), [group.names for group in calibration.groups]
        tensors = {f"{i}.{k}": v for i, g in groups for k, v in g.stats.to_tensors().items()}
        inputs = [tensor for step in calibration.steps for call in step.calls for tensor in call.tensors]
        tensors |= {f"step.{i}": tensor for i, tensor in enumerate(inputs)}
        steps = [
            {"calls": [(c.structure, len(c.tensors)) for c in s.calls], "weights": s.weights, "shape": s.shape}
            for s in calibration.steps
        ]
        self.save("calibration", tensors, {"names": names, "steps": steps, "inputs": len(inputs)})

    def load_calibration(self) -> Calibration | None:
        """The calibration kept by :meth:`save_calibration`, or None."""
        if (found := self.load("calibration")) is None:
            return None
        tensors, values = found
        left = iter([tensors.pop(f"step.{i}") for i in range(values["inputs"])])
        steps = [
            Step(
                [Call(structure, [next(left) for _ in range(count)]) for structure, count in step["calls"]],
                tuple(step["weights"]),
                tuple(step["shape"]),
            )
            for step in values["steps"]
        ]
        parts: list[dict[str, Tensor]] = [{} for _ in values["names"]]
        for key, tensor in tensors.items():
            index, leaf = key.split(".", 1)
            parts[int(index)][leaf] = tensor
        stats = map(ActivationStats.from_tensors, parts)
        return Calibration([InputGroup(*pair) for pair in zip(values["names"], stats, strict=True)], steps)


def describe_run(module: nn.Module, **values: Any) -> dict[str, str]:
    """Marks of what a run's results depend on: this package's version, values, and a module's weights.

    Args:
        module: every byte of its state dict is hashed (SHA-256, about a second for each gigabyte).
        values: by name; JSON values, tensors, arrays, pictures, generators, data classes and paths of files, of which
            every byte is hashed.

    Raises:
        ConfigError: for a value that cannot be compared with that of another run, such as a function.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):  # a module's extra state
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    texts = {name: _describe(name, value) for name, value in values.items()}
    hashed = {
        name: text if len(text) < 80 else hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()
    }
    return {"lrqdit version": sys.modules["lrqdit"].__version__, "format version": str(FORMAT_VERSION), **hashed,
            "model's weights": digest.hexdigest()}  # fmt: skip


def _describe(name: str, value: Any) -> str:
    """JSON that is the same for equal values alone."""

    def identify(part: Any) -> Any:
        if isinstance(part, Path):
            return hashlib.sha256(part.read_bytes()).hexdigest()
        if isinstance(part, torch.Generator):
            part = part.get_state()
        if isinstance(part, Tensor):
            data = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            return ["tensor", str(part.dtype), list(part.shape), hashlib.sha256(data).hexdigest()]
        if hasattr(part, "tobytes"):  # arrays, and PIL's pictures
            kind = [str(getattr(part, key, "")) for key in ("dtype", "shape", "mode", "size")]
            return [*kind, hashlib.sha256(part.tobytes()).hexdigest()]
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return {type(part).__name__: {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}}
        if isinstance(part, torch.dtype | torch.device | enum.Enum):
            return str(part)
        raise ConfigError(
            f"resume_folder: {name} holds a {type(part).__name__}, which cannot be compared with that of another run; "
            "leave out one of the two"
        )

    return json.dumps(value, sort_keys=True, default=identify)
