"""Checkpoints: the version that is written, empty layers for what is read, a plain module saved and loaded.

A quantized diffusers model is an ordinary diffusers folder whose ``config.json`` has a ``quantization_config``; any
other torch module is one ``model.safetensors`` beside a ``config.json`` of the same content. docs/FORMAT.md has every
byte. Only safetensors and JSON are ever read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrqdit.errors import CheckpointError
from lrqdit.packed.files import CONFIG_FILE, WEIGHT_FILE, check_safetensors, read_json, write_atomically
from lrqdit.packed.format import FORMAT_NAME, FORMAT_VERSION, LinearFormat, check_version
from lrqdit.packed.linear import DTYPES, MARKER, QuantLinear
from lrqdit.packed.pointwise import empty_layer

_BASE_LAYER = ".base_layer."  # what PEFT calls a layer that has an adapter


def format_config(module: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a quantized module: name, version, settings, and each layer's format."""
    layers = {
        f"{name}.".replace(_BASE_LAYER, ".")[:-1]: m.format.to_dict()
        for name, m in module.named_modules()
        if isinstance(m, QuantLinear)
    }
    return {
        "quant_method": FORMAT_NAME, "format_version": FORMAT_VERSION, "settings": dict(settings), "layers": layers,
    }  # fmt: skip


def allocate_layers(module: nn.Module, layers: dict[str, dict[str, Any]], dtype: torch.dtype, device: Any) -> None:
    """Replace the named linear layers by empty quantized ones, ready for ``load_state_dict``.

    Raises:
        CheckpointError: if a name or a shape does not fit the module: a checkpoint of another model.
    """
    formats = {name: LinearFormat.from_dict(values) for name, values in layers.items()}
    shapes = {name: shape for name, layer in module.named_modules() if (shape := _shape(layer)) is not None}
    for name, layout in formats.items():
        found = shapes.get(name)
        if found != (layout.out_features, layout.in_features):
            raise CheckpointError(
                f"the checkpoint quantizes {name} as {layout.out_features} x {layout.in_features}, but this "
                f"{type(module).__name__} has {'no such layer' if found is None else f'{found[0]} x {found[1]} there'}"
                "; it belongs to another model"
            )
        owner = layout if layout.input_from is None else formats.get(layout.input_from)
        if owner is None or owner.input_from is not None or owner.input != layout.input:
            raise CheckpointError(
                f"{name} shares the input of {layout.input_from}, which is not quantized or has another input transform"
            )
        module.set_submodule(name, empty_layer(layout, dtype, device))


def _shape(layer: nn.Module) -> tuple[int, ...] | None:
    """Rows and columns of a layer that may be replaced by a quantized one."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return (layer.out_channels, layer.in_channels) if isinstance(layer, nn.Conv2d) else None


def finish_layers(module: nn.Module) -> None:
    """Make a module whose quantized layers are filled ready to run: layers that share an input get the owner's
    transform."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantLinear)}
    for layer in layers.values():
        if layer.format.input_from is not None:
            layer.share_input(layers[layer.format.input_from])


def stored_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict, what a file holds: the model's own tensors under their plain names.

    Left out are the markers of quantized layers and the tensors of adapters (PEFT's); below one, a layer is named
    ``base_layer``.
    """
    names = {name for name in state_dict if name.rpartition(".")[2] != MARKER}
    adapted = {name[: name.index(_BASE_LAYER)] for name in names if _BASE_LAYER in name}
    return {
        name.replace(_BASE_LAYER, "."): tensor
        for name, tensor in state_dict.items()
        if name in names and (_BASE_LAYER in name or not any(name.startswith(f"{layer}.") for layer in adapted))
    }


def save_checkpoint(module: nn.Module, folder: str | Path, settings: dict[str, Any] | None = None) -> None:
    """Write a quantized module that is not a diffusers model: ``model.safetensors`` and ``config.json``.

    Args:
        module: it must have quantized layers.
        folder: created if missing; files appear in it only when complete.
        settings: recorded beside the layers; by default those that :func:`lrqdit.quantize` left on the module.
    """
    folder = Path(folder)
    config = format_config(module, getattr(module, "lrqdit_settings", {}) if settings is None else settings)
    if not config["layers"]:
        raise CheckpointError(f"{type(module).__name__} has no quantized layer to save; call lrqdit.quantize first")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, seen = {}, set()
    for name, tensor in stored_tensors(module.state_dict()).items():
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, such as tied weights
        tensors[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
    write_atomically(folder / WEIGHT_FILE, lambda path: save_file(tensors, path, {"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=1, sort_keys=True)))


def load_checkpoint(module: nn.Module, folder: str | Path) -> nn.Module:
    """Turn a freshly built original module into the quantized one saved by :func:`save_checkpoint`; returns it.

    Attention stays as it is; ``lrqdit.attention.switch("native")`` makes that of bfloat16 tokens on the CPU ours, too.

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
    parameter = next(module.parameters(), torch.empty(0, dtype=torch.float32))
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    allocate_layers(module, config["layers"], dtype, parameter.device)
    check_dtypes(module, header)
    try:
        module.load_state_dict(load_file(folder / WEIGHT_FILE))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHT_FILE} does not fit {type(module).__name__}: {error}") from error
    finish_layers(module)
    vars(module)["lrqdit_settings"] = config.get("settings", {})
    return module


def check_dtypes(module: nn.Module, header: dict[str, dict[str, Any]]) -> None:
    """Raise if a tensor of a file would be cast on its way into the module: packed data must arrive bit for bit."""
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor) and name in header:
            stored = DTYPES.get(header[name]["dtype"])
            both_float = stored is not None and stored.is_floating_point and tensor.is_floating_point()
            if stored != tensor.dtype and not both_float:
                raise CheckpointError(
                    f"{name} is stored as {header[name]['dtype']}, not as {tensor.dtype}; copy it again"
                )
