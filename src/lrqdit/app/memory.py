"""The memory of a model at any preset, from its architecture on the meta device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lrqdit.config import QuantizationConfig
from lrqdit.errors import ConfigError
from lrqdit.models import KNOWN_MODELS, denoiser_names
from lrqdit.models import registry as models
from lrqdit.packed.dummy import random_layer
from lrqdit.packed.files import CONFIG_FILE, INDEX_FILE, read_json
from lrqdit.packed.linear import QuantLinear
from lrqdit.packed.size import measure_size

SHARED_INPUTS = (("to_q", "to_k", "to_v", "proj_mlp"), ("add_q_proj", "add_k_proj", "add_v_proj"))


def build_model(model: str) -> nn.Module:
    """A transformer on the meta device: architecture without weights.

    Args:
        model: a key of KNOWN_MODELS, or the folder of a diffusers pipeline or model.

    Raises:
        ConfigError: if it is neither, or the folder's model class is unknown or its config does not fit.
    """
    if model in KNOWN_MODELS:
        class_name, arguments = KNOWN_MODELS[model]
    else:
        folder = Path(model)
        index = folder / INDEX_FILE
        parts = [folder, *(folder / name for name in (denoiser_names(read_json(index)) if index.exists() else ()))]
        found = next((part for part in parts if (part / CONFIG_FILE).exists()), None)
        if found is None:
            raise ConfigError(
                f"{model!r} is neither a folder of a model or pipeline nor one of {', '.join(KNOWN_MODELS)}"
            )
        arguments = read_json(found / CONFIG_FILE)
        class_name = arguments.get("_class_name", "")
    build = getattr(getattr(diffusers, class_name or "?", None), "from_config", None)
    if build is None:
        raise ConfigError(f"{model!r}: diffusers has no model class {class_name!r}")
    with torch.device("meta"):
        return build({key: value for key, value in arguments.items() if key != "quantization_config"})


def replace_layers(module: nn.Module, config: QuantizationConfig) -> nn.Module:
    """Replace the layers of a model on the meta device by packed ones, as :func:`lrqdit.quantize` would; returns it.

    Each layer gets a Hadamard rotation with offset and scale; siblings that read the same tensor share them.
    """
    layers, packed = models.linear_layers(module), dict[str, QuantLinear]()
    owners: dict[tuple[str, int], str] = {}
    for name, treatment in models.plan(module, config).items():
        if treatment == models.KEPT:
            continue
        dense = layers[name]
        options: dict[str, Any] = {"channel_axis": getattr(dense, "channel_axis", -1)}
        if not treatment.is_fitted:
            options |= {"rotation": "none", "factors": (), "has_offset": False, "has_scale": False}
        owner = owners.setdefault(key, name) if (key := _shared_input(name)) else name
        if owner != name:
            options["input_from"] = owner
        layer = packed[name] = random_layer(
            dense.in_features, dense.out_features, treatment.weight_bits, treatment.activation_bits, "meta", **options
        )
        if owner != name:
            layer.share_input(packed[owner])
        module.set_submodule(name, layer)
    return module


def _shared_input(name: str) -> tuple[str, int] | None:
    """What names of layers that read the same tensor have in common; None for all others."""
    parent, _, leaf = name.rpartition(".")
    if leaf in ("to_k", "to_v") and parent.endswith("attn2"):
        return parent, len(SHARED_INPUTS)  # cross attention: only the queries come from the picture
    parent = parent.removesuffix(".attn") if "single_" in parent else parent
    return next(((parent, number) for number, leaves in enumerate(SHARED_INPUTS) if leaf in leaves), None)


def expected_memory(model: str, presets: Sequence[str] = ("w4a8", "w3a8")) -> list[dict[str, Any]]:
    """Bytes of a model's weights in bfloat16 and at each preset.

    Args:
        model: as for :func:`build_model`.
        presets: such as w4a8.

    Returns:
        One dictionary per preset: preset, parameters, bfloat16_bytes, packed_bytes, true_bits.
    """
    rows = []
    for preset in presets:
        dense = build_model(model)
        parameters = sum(p.numel() for p in dense.parameters())
        size = measure_size(replace_layers(nn.Module.to(dense, torch.bfloat16), QuantizationConfig.from_name(preset)))
        rows.append({
            "preset": preset, "parameters": parameters, "bfloat16_bytes": 2 * parameters,
            "packed_bytes": size.size_bytes, "true_bits": size.true_bits,
        })  # fmt: skip
    return rows
