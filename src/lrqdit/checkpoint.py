"""Files: the version that is written, the checks before anything is read, and the folder that lets a run resume.

A quantized diffusers model is an ordinary diffusers folder whose ``config.json`` has a ``quantization_config``; any
other torch module is one ``model.safetensors`` beside a ``config.json`` of the same content. docs/FORMAT.md has every
byte.
Only safetensors and JSON are ever read.
"""

import hashlib
import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrqdit import attention
from lrqdit.calibrate import ActivationStats, InputGroup
from lrqdit.errors import CheckpointError
from lrqdit.linear import LinearFormat, QuantLinear
from lrqdit.recording import Calibration, Call, Step

FORMAT_NAME = "lrqdit"
FORMAT_VERSION = 1
CALIBRATION_VERSION = 1  # of what a run keeps for itself
WEIGHT_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_DTYPE_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}


def format_config(module: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a quantized module: name, version, settings, and each layer's format."""
    layers = {name: m.format.to_dict() for name, m in module.named_modules() if isinstance(m, QuantLinear)}
    return {
        "quant_method": FORMAT_NAME, "format_version": FORMAT_VERSION, "settings": dict(settings), "layers": layers,
    }  # fmt: skip


def check_version(version: object) -> None:
    """Raise unless this package reads the given format version."""
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint has format version {version!r}, this lrqdit reads version {FORMAT_VERSION}; "
            f"{'upgrade lrqdit' if isinstance(version, int) and version > FORMAT_VERSION else 'quantize it again'}"
        )


def allocate_layers(module: nn.Module, layers: dict[str, dict[str, Any]], dtype: torch.dtype, device: Any) -> None:
    """Replace the named linear layers by empty quantized ones, ready for ``load_state_dict``.

    Raises:
        CheckpointError: if a name or a shape does not fit the module: a checkpoint of another model.
    """
    formats = {name: LinearFormat.from_dict(values) for name, values in layers.items()}
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    for name, layout in formats.items():
        layer = linear.get(name)
        found = None if layer is None else (layer.out_features, layer.in_features)
        if found != (layout.out_features, layout.in_features):
            raise CheckpointError(
                f"the checkpoint quantizes {name} as {layout.out_features} x {layout.in_features}, but this "
                f"{type(module).__name__} has {'no such layer' if found is None else f'{found[0]} x {found[1]} there'}"
                "; it belongs to another model"
            )
        if layout.input_from is not None and not _is_same_input(layout, formats.get(layout.input_from)):
            raise CheckpointError(
                f"{name} shares the input of {layout.input_from}, which is not quantized or has another input transform"
            )
        module.set_submodule(name, QuantLinear(layout, dtype, device))


def _is_same_input(layout: LinearFormat, owner: LinearFormat | None) -> bool:
    names = "in_features", "activation_bits", "rotation", "factors", "clip", "token_levels", "has_offset", "has_scale"
    return (
        owner is not None and owner.input_from is None and all(getattr(owner, n) == getattr(layout, n) for n in names)
    )


def finish_layers(module: nn.Module) -> None:
    """Make a module whose quantized layers are filled ready to run: layers that share an input get the owner's
    transform, and attention on the CPU becomes ours."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantLinear)}
    for layer in layers.values():
        if layer.format.input_from is not None:
            layer.share_input(layers[layer.format.input_from])
    attention.start()


def save_checkpoint(module: nn.Module, folder: str | Path, settings: dict[str, Any] | None = None) -> None:
    """Write a quantized module that is not a diffusers model: ``model.safetensors`` and ``config.json``.

    Args:
        module: it must have quantized layers.
        folder: created if missing; files appear in it only when complete.
        settings: recorded beside the layers; by default those that :func:`lrqdit.quantize` left on the module.
    """
    folder = Path(folder)
    settings = settings if settings is not None else getattr(module, "lrqdit_settings", {})
    config = format_config(module, settings)
    if not config["layers"]:
        raise CheckpointError(f"{type(module).__name__} has no quantized layer to save; call lrqdit.quantize first")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, seen = {}, set()
    for name, tensor in module.state_dict().items():
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, such as tied weights
        tensors[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
    _write(folder / WEIGHT_FILE, lambda path: save_file(tensors, path, {"format": "pt"}))
    _write(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=1, sort_keys=True)))


def load_checkpoint(module: nn.Module, folder: str | Path) -> nn.Module:
    """Turn a freshly built original module into the quantized one saved by :func:`save_checkpoint`; returns it.

    Raises:
        CheckpointError: if a file is missing, damaged, of another version or of another model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    if config.get("quant_method") != FORMAT_NAME:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not a configuration written by lrqdit.save_checkpoint")
    check_version(config.get("format_version"))
    header = check_safetensors(folder / WEIGHT_FILE)
    if not isinstance(config.get("layers"), dict):
        raise CheckpointError(f"{folder / CONFIG_FILE} lists no layers; copy it again")
    parameter = next(module.parameters(), torch.empty(0))
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    allocate_layers(module, config["layers"], dtype, parameter.device)
    check_dtypes(module, header)
    try:
        module.load_state_dict(load_file(folder / WEIGHT_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHT_FILE} does not fit {type(module).__name__}: {error}") from error
    finish_layers(module)
    module.lrqdit_settings = config.get("settings", {})
    return module


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
                if start != end or stop - start != math.prod(entry["shape"]) * _DTYPE_BYTES[entry["dtype"]]:
                    raise ValueError(entry)
                end = stop
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header; copy it again") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes but its header describes {8 + length + end}; copy it again")
    return header


def check_dtypes(module: nn.Module, header: dict[str, dict[str, Any]]) -> None:
    """Raise if a tensor of a file would be cast on its way into the module: packed data must arrive bit for bit."""
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor) and name in header:
            stored = _DTYPES.get(header[name]["dtype"])
            both_float = stored is not None and stored.is_floating_point and tensor.is_floating_point()
            if stored != tensor.dtype and not both_float:
                raise CheckpointError(
                    f"{name} is stored as {header[name]['dtype']}, not as {tensor.dtype}; copy it again"
                )


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
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} has no model_index.json, so it is not a diffusers pipeline folder")
    index = read_json(folder / "model_index.json")
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
        _write(marker, lambda path: path.write_text(fingerprint))

    def save(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        metadata = {"values": json.dumps(values)}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        _write(self.folder / f"{name}.safetensors", lambda path: save_file(tensors, path, metadata))

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


def _write(path: Path, write: Any) -> None:
    """Write beside the final name, then rename: the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
