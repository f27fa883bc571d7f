"""What a device gains: a measurement of a few layers, and the memory of a model at any preset."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lrqdit import checkpoint, models, trellis
from lrqdit.accounting import measure_size
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ConfigError
from lrqdit.hadamard import kronecker_factors
from lrqdit.linear import LinearFormat, QuantLinear

# (tokens, in_features, out_features): PixArt at 512 pixels, FLUX at 1024 and 512 pixels, FLUX's modulation
SHAPES = ((1024, 1152, 1152), (1024, 1152, 4608), (4096, 3072, 3072), (1536, 3072, 12288), (1, 3072, 18432))
KNOWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "pixart": ("PixArtTransformer2DModel", {"sample_size": 128, "num_layers": 28, "caption_channels": 4096}),
    "wan": ("WanTransformer3DModel", {}),
}
SHARED_INPUTS = (("to_q", "to_k", "to_v", "proj_mlp"), ("add_q_proj", "add_k_proj", "add_v_proj"))
ROW_SCALE = 2.0**-11  # keeps the outputs of random layers of a few thousand inputs near their inputs' size
MIN_RUNS, MAX_RUNS = 2, 100


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> list[float]:
    """Median milliseconds of each call, measured in turns after one untimed round.

    Args:
        calls: what to run; each is warmed up first.
        device: of their tensors; CUDA events are used where there are any.
        seconds: stop after about this time (at least MIN_RUNS rounds).
    """
    for call in calls:
        call()
    _synchronize(device)
    times: list[list[float]] = [[] for _ in calls]
    end = time.monotonic() + seconds
    for number in range(MAX_RUNS):
        if number >= MIN_RUNS and time.monotonic() > end:
            break
        for call, found in zip(calls, times, strict=True):
            found.append(_time_once(call, device))
    return [statistics.median(found) for found in times]


def _time_once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    _synchronize(device)
    return 1000 * (time.perf_counter() - begin)


def _synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def random_layer(
    in_features: int, out_features: int, weight_bits: int, activation_bits: int, device: Any = None, **options: Any
) -> QuantLinear:
    """A packed layer of random codes with offset, scale and Hadamard rotation; options: other fields of its format."""
    transform = {
        "rotation": "hadamard", "factors": kronecker_factors(in_features), "has_offset": True, "has_scale": True,
        "table_rows": 0 if weight_bits == 8 else 1, "is_trellis": weight_bits in trellis.BITS,
    }  # fmt: skip
    layout = LinearFormat(in_features, out_features, weight_bits, activation_bits, **{**transform, **options})
    return fill_randomly(QuantLinear(layout, torch.bfloat16, device))


def fill_randomly(layer: QuantLinear) -> QuantLinear:
    """Random codes, evenly spaced levels, one row scale, no offset, no smoothing; on the meta device nothing."""
    layer.packed.random_(0, 256)
    for name, values in (("row_scale_bits", ROW_SCALE), ("input_scale_bits", 1.0)):
        if (buffer := layer._buffers.get(name)) is not None:
            buffer.view(torch.float16 if buffer.dtype == torch.int16 else torch.float32).fill_(values)
    if (table := layer._buffers.get("table")) is not None:
        table.copy_(torch.linspace(-127, 127, table.shape[1]).round())
    return layer


def measure_layers(device: torch.device, seconds: float = 60.0, preset: str = "w4a8") -> list[dict[str, Any]]:
    """Time a float linear layer against a packed one at SHAPES.

    Args:
        device: where to run; bfloat16 everywhere but on MPS (float16).
        seconds: for all shapes together, about.
        preset: of the packed layer; the modulation layer of one token is weight-only.

    Returns:
        One dictionary per shape: tokens, in_features, out_features, float_ms, packed_ms, speedup (above 1: faster).
    """
    config = QuantizationConfig.from_name(preset)
    dtype = torch.float16 if device.type == "mps" else torch.bfloat16
    rows = []
    for tokens, in_features, out_features in SHAPES:
        activation_bits = config.activation_bits if tokens > 1 else 16
        x = torch.randn(tokens, in_features, device=device, dtype=dtype)
        dense = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        packed = random_layer(in_features, out_features, config.weight_bits, activation_bits, device)
        with torch.no_grad():
            calls = [lambda layer=layer, x=x: layer(x) for layer in (dense, packed)]
            float_ms, packed_ms = time_calls(calls, device, seconds / len(SHAPES))
        rows.append({
            "tokens": tokens, "in_features": in_features, "out_features": out_features,
            "float_ms": float_ms, "packed_ms": packed_ms, "speedup": float_ms / packed_ms,
        })  # fmt: skip
    return rows


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
        parts = [folder, *(folder / name for name in models.PIPELINE_COMPONENTS)]
        found = next((part for part in parts if (part / checkpoint.CONFIG_FILE).exists()), None)
        if found is None:
            raise ConfigError(
                f"{model!r} is neither a folder of a model or pipeline nor one of {', '.join(KNOWN_MODELS)}"
            )
        arguments = checkpoint.read_json(found / checkpoint.CONFIG_FILE)
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
    selection = models.select_layers(module, config.exclude)
    at_8_bits = models.layers_stored_at_8_bits(module, selection, config)
    owners: dict[tuple[str, int], str] = {}
    for name in (*selection.quantized, *selection.weight_only, *at_8_bits):
        dense = module.get_submodule(name)
        weight_bits, activation_bits, options = config.weight_bits, config.activation_bits, {}
        if name in at_8_bits:
            weight_bits, activation_bits = 8, 16
            options = {"rotation": "none", "factors": (), "has_offset": False, "has_scale": False}
        elif name in selection.weight_only:
            weight_bits, activation_bits = max(4, config.weight_bits), 16
        owner = owners.setdefault(key, name) if (key := _shared_input(name)) else name
        if owner != name:
            options["input_from"] = owner
        layer = random_layer(dense.in_features, dense.out_features, weight_bits, activation_bits, "meta", **options)
        if owner != name:
            layer.share_input(module.get_submodule(owner))
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
