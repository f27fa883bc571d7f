"""Which linear layers of which architecture are quantized, and how its pipeline is run for calibration.

One entry per diffusers class in :data:`MODELS`; a class without an entry gets :data:`GENERIC`, whose rule is: linear
layers inside repeated blocks are quantized, everything that embeds, modulates or projects out is kept.
"""

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lrqdit.config import QuantizationConfig
from lrqdit.errors import ModelError
from lrqdit.models import PIPELINE_COMPONENTS

SMALLEST_KEPT_WEIGHTS = 4096


@dataclass(frozen=True)
class ModelSpec:
    """What to do with one architecture.

    Args:
        quantized: regular expression of the layers that run with low-bit weights and quantized activations.
        weight_only: regular expression of layers stored at low bits but run on float activations: large modulation
            layers that see one token per picture.
        kept: regular expression of layers never put into ``quantized``, for :data:`GENERIC`.
        call_arguments: arguments of the pipeline's call that calibration and generation add.
    """

    quantized: str
    weight_only: str = ""
    kept: str = ""
    call_arguments: dict[str, Any] = field(default_factory=dict)


_ATTENTION = r"attn\d?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)"

GENERIC = ModelSpec(
    quantized=r".*",
    kept=r"(^|\.)(\w*norm\w*|ada(?!p)\w*|\w*emb\w*|\w*modulation\w*|(\w+_)?mod|time\w*|t_block|router|gate)(\.|$)|^proj_out",
)
MODELS: dict[str, ModelSpec] = {
    "PixArtTransformer2DModel": ModelSpec(rf"transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})"),
    "FluxTransformer2DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})"
        rf"|single_transformer_blocks\.\d+\.({_ATTENTION}|proj_mlp|proj_out)",
        weight_only=r"transformer_blocks\.\d+\.norm1(_context)?\.linear|single_transformer_blocks\.\d+\.norm\.linear",
    ),
    "LatteTransformer3DModel": ModelSpec(rf"(temporal_)?transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})"),
    "SD3Transformer2DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})",
        weight_only=r"transformer_blocks\.\d+\.norm1(_context)?\.linear",
    ),
    "CogVideoXTransformer3DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})",
        weight_only=r"transformer_blocks\.\d+\.norm[12]\.linear",
    ),
    "HunyuanVideoTransformer3DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})"
        rf"|single_transformer_blocks\.\d+\.({_ATTENTION}|proj_mlp|proj_out)",
        weight_only=r"transformer_blocks\.\d+\.norm1(_context)?\.linear|single_transformer_blocks\.\d+\.norm\.linear",
    ),
}


@dataclass(frozen=True)
class Selection:
    """Names of linear layers by treatment: low-bit, low-bit weights on float activations, and kept."""

    quantized: tuple[str, ...]
    weight_only: tuple[str, ...]
    kept: tuple[str, ...]


def find_spec(module: nn.Module) -> ModelSpec:
    """The entry of a module's class, or :data:`GENERIC`."""
    return MODELS.get(type(module).__name__, GENERIC)


def select_layers(module: nn.Module, exclude: tuple[str, ...] = ()) -> Selection:
    """Sort a module's linear layers by treatment.

    Args:
        module: any module with ``nn.Linear`` layers.
        exclude: regular expressions (searched in the name) of further layers to keep.

    Raises:
        ModelError: if an ``exclude`` pattern matches no layer, nothing is left to quantize, or adapters are attached.
    """
    adapted = next((name for name, _ in module.named_modules() if name.endswith(".base_layer")), None)
    if adapted is not None:
        raise ModelError(
            f"{type(module).__name__} has an adapter at {adapted.removesuffix('.base_layer')}; fuse it into the "
            "weights or unload it, quantize, and load it again onto the quantized model"
        )
    # subclasses of nn.Linear may read .weight themselves (nn.MultiheadAttention does), so only exact ones are taken
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear and name]
    for pattern in exclude:
        if not any(re.search(pattern, name) for name in names):
            raise ModelError(
                f"exclude={pattern!r} matches no linear layer of {type(module).__name__}; its layers are named like "
                f"{', '.join(names[:3]) or '(it has none)'}"
            )
    spec = find_spec(module)
    in_blocks = [name for name in names if re.search(r"(^|\.)\d+\.", name)] if spec is GENERIC else names
    quantized, weight_only, kept = [], [], []
    for name in names:
        if any(re.search(pattern, name) for pattern in exclude):
            kept.append(name)
        elif spec.weight_only and re.fullmatch(spec.weight_only, name):
            weight_only.append(name)
        elif (
            re.fullmatch(spec.quantized, name)
            and not (spec.kept and re.search(spec.kept, name))
            and (name in in_blocks or not in_blocks)
        ):
            quantized.append(name)
        else:
            kept.append(name)
    if not quantized:
        raise ModelError(
            f"{type(module).__name__} has no linear layer to quantize ({len(names)} found, {len(kept)} kept); pass a "
            "diffusion transformer, or loosen exclude"
        )
    return Selection(tuple(quantized), tuple(weight_only), tuple(kept))


def layers_stored_at_8_bits(module: nn.Module, selection: Selection, config: QuantizationConfig) -> tuple[str, ...]:
    """The kept layers that are stored weight-only at 8 bits: all but the smallest, unless ``keep_bits`` is 16."""
    is_large = {name: module.get_submodule(name).weight.numel() >= SMALLEST_KEPT_WEIGHTS for name in selection.kept}
    return tuple(name for name in selection.kept if is_large[name] and config.keep_bits == 8)


def call_arguments(pipeline: Any) -> dict[str, Any]:
    """Arguments a pipeline's call needs beyond the prompt, among those its signature has.

    PixArt's resolution binning knows three sizes; a model of another size must switch it off.
    """
    arguments: dict[str, Any] = {}
    accepted = inspect.signature(pipeline.__call__).parameters
    for name in PIPELINE_COMPONENTS:
        if isinstance(component := getattr(pipeline, name, None), nn.Module):
            arguments.update(find_spec(component).call_arguments)
    size = getattr(getattr(getattr(pipeline, "transformer", None), "config", None), "sample_size", None)
    if "use_resolution_binning" in accepted and size not in (32, 64, 128):
        arguments["use_resolution_binning"] = False
    if "clean_caption" in accepted:
        arguments["clean_caption"] = False
    return {name: value for name, value in arguments.items() if name in accepted}
