"""The folder of an unfinished run: finished parts, under a fingerprint of everything that they depend on."""

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrqdit.calibration.statistics import ActivationStats, InputGroup
from lrqdit.calibration.steps import Calibration, Call, Step
from lrqdit.errors import CheckpointError
from lrqdit.packed.files import check_safetensors, write_atomically

CALIBRATION_VERSION = 1  # of what a run keeps for itself


class RunFolder:
    """Results of an unfinished run, one safetensors file each, under a fingerprint of everything they depend on.

    Files are written beside their final name and renamed, so a killed run leaves complete results only. A folder of
    another fingerprint is emptied.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        marker = self.folder / "fingerprint"
        if not marker.exists() and any(p.name != "fingerprint.partial" for p in self.folder.glob("*")):
            raise CheckpointError(
                f"{self.folder} holds files of something else, and a run's folder is emptied; pass another folder"
            )
        if marker.exists() and marker.read_text() != fingerprint:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, lambda path: path.write_text(fingerprint))

    def save(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        metadata = {"values": json.dumps(values)}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_atomically(self.folder / f"{name}.safetensors", lambda path: save_file(tensors, path, metadata))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        check_safetensors(path)
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        return load_file(path), json.loads(header["__metadata__"]["values"])

    def save_calibration(self, calibration: Calibration) -> None:
        """Keep the calibration of a model."""
        groups, names = enumerate(calibration.groups), [group.names for group in calibration.groups]
        tensors = {f"{i}.{k}": v for i, g in groups for k, v in g.stats.to_tensors().items()}
        inputs = [tensor for step in calibration.steps for call in step.calls for tensor in call.tensors]
        tensors |= {f"step.{i}": tensor for i, tensor in enumerate(inputs)}
        steps = [
            {
                "calls": [(call.structure, len(call.tensors)) for call in step.calls],
                "weights": step.weights,
                "shape": step.shape,
            }
            for step in calibration.steps
        ]
        values = {"version": CALIBRATION_VERSION, "names": names, "steps": steps, "inputs": len(inputs)}
        self.save("calibration", tensors, values)

    def load_calibration(self) -> Calibration | None:
        """The calibration kept by :meth:`save_calibration`, or None."""
        found = self.load("calibration")
        if found is None or found[1].get("version") != CALIBRATION_VERSION:
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
        groups = [
            InputGroup(names, ActivationStats.from_tensors(part))
            for names, part in zip(values["names"], parts, strict=True)
        ]
        return Calibration(groups, steps)


def fingerprint(*values: Any, module: nn.Module | None = None) -> str:
    """SHA-256 of JSON values and of every weight's shape and first kilobyte."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, parameter in [] if module is None else module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        head = parameter.detach().flatten()[:256].float().cpu().contiguous()
        digest.update(head.numpy().tobytes())
    return digest.hexdigest()
