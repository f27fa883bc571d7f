"""LoRA and its kin (PEFT's adapters): merged for good into quantized layers, or found merged before quantization."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lrqdit.config import QuantizationConfig
from lrqdit.errors import ModelError, NumericalError
from lrqdit.fitting.layer import FittedInput, quantize_linear
from lrqdit.packed.linear import QuantLinear


def fuse_lora(
    target: DiffusionPipeline | nn.Module, adapter_names: Sequence[str] | None = None, lora_scale: float = 1.0
) -> dict[str, float]:
    """Merge adapters into the weights for good, and round the weights of the quantized layers they touch again.

    A layer keeps its bits and its input transform; it is rounded without calibration, so that fusing costs a little
    quality where leaving the adapter beside the layer costs a little time. The adapters are removed: they cannot be
    taken out of rounded weights. Layers that are not quantized are merged as always. A call that fails changes nothing.

    Args:
        target: a pipeline or a model with adapters of PEFT's (LoRA, DoRA, LoHa, LoKr, ...).
        adapter_names: those to merge, active or not; the active ones if None.
        lora_scale: multiplies the adapters, beside the weights given by ``set_adapters``.

    Returns:
        By name of the quantized layer the relative error of rounding, ``|W' - W_q'| / |W'|`` with W' the merged weight.

    Raises:
        ModelError: if there is no such adapter, one has no scale to multiply, or the model is offloaded.
        NumericalError: if a merged weight is not finite.
    """
    is_pipeline = isinstance(target, DiffusionPipeline)
    parts = dict(target.components) if is_pipeline else {"": target}
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and any(_adapted(part))}
    layers = {(part, name): layer for part, model in models.items() for name, layer in _adapted(model)}
    chosen = _choose(target, models, layers, adapter_names, float(lora_scale))
    configs = {part: _config(model) for part, model in models.items()}
    errors: dict[str, float] = {}
    merged: list[tuple[QuantLinear, dict[str, Tensor]]] = []
    with contextlib.ExitStack() as stack:
        for key, names in chosen.items():
            stack.enter_context(_scaled(layers[key], names, float(lora_scale)))
        for (part, name), names in chosen.items():  # nothing is written before all are rounded
            layer, label = layers[part, name], f"{part}.{name}" if part and len(models) > 1 else name
            if isinstance(base := layer.get_base_layer(), QuantLinear):
                tensors, errors[label] = _round_merged(label, layer, base, names, configs[part])
                merged.append((base, tensors))
        for key, names in chosen.items():
            if not isinstance(layers[key].get_base_layer(), QuantLinear):
                layers[key].merge(adapter_names=names)
    for base, tensors in merged:
        for name, tensor in base.tensors().items():
            tensor.copy_(tensors[name])
    for (part, name), names in chosen.items():
        _remove(models[part], name, layers[part, name], names)
    for model in models.values():
        _forget(model)
    return errors


def _choose(
    target: Any, models: dict[str, nn.Module], layers: dict[tuple[str, str], Any], names: Sequence[str] | None,
    scale: float,
) -> dict[tuple[str, str], list[str]]:  # fmt: skip
    """By layer the adapters to merge, checked."""
    for part, model in models.items():
        if type(model).__name__.startswith("PeftModel"):
            raise ModelError(
                f"fuse_lora: {part or 'this'} is PEFT's wrapper of a model, useless once its adapters are gone; use "
                "model.get_base_model(), here and from then on"
            )
    wanted = [names] if isinstance(names, str) else None if names is None else list(names)
    loaded = {key: _adapters(layer) for key, layer in layers.items()}
    known = sorted(set().union(*loaded.values()))
    if not known or wanted == []:
        raise ModelError(f"fuse_lora: {type(target).__name__} has no active adapter; load one with load_lora_weights")
    if unknown := sorted(set(wanted or ()) - set(known)):
        raise ModelError(f"fuse_lora: there is no adapter {unknown[0]!r}; there is {', '.join(known)}")
    chosen = {
        key: [name for name in (layer.active_adapters if wanted is None else wanted) if name in loaded[key]]
        for key, layer in layers.items()
    }
    chosen = {key: found for key, found in chosen.items() if found}
    if not chosen:
        raise ModelError(f"fuse_lora: no adapter is active; name one of {', '.join(known)}")
    for key, found in chosen.items():
        layer, name = layers[key], ".".join(key).strip(".")
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ModelError(f"fuse_lora: {name} is offloaded; call remove_all_hooks() of the pipeline first")
        if scale != 1.0 and not hasattr(layer, "scaling"):
            raise ModelError(f"fuse_lora: the adapter at {name} has no scale for lora_scale={scale}; leave that out")
        for part in (p for n, p in layer.named_parameters() if any(f".{a}" in f".{n}." for a in found)):
            if not math.isfinite(scale) or (part.is_floating_point() and not bool(part.isfinite().all())):
                raise NumericalError(f"fuse_lora: an adapter at {name}, or lora_scale, is not finite")
    return chosen


def _adapters(layer: Any) -> set[str]:
    """The adapters that are loaded at a layer."""
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})}


@contextlib.contextmanager
def _scaled(layer: Any, names: Sequence[str], scale: float) -> Iterator[None]:
    before = dict(getattr(layer, "scaling", {}))
    for name in names if scale != 1.0 else ():
        layer.scaling[name] *= scale
    try:
        yield
    finally:
        if before:
            layer.scaling.update(before)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that have adapters, by name."""
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "base_layer", None), nn.Module) and hasattr(layer, "merged_adapters"):
            yield name, layer  # one of PEFT's, which need not be installed


def _config(model: Any) -> QuantizationConfig | None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        return getattr(quantizer, "config", None)
    settings = getattr(model, "lrqdit_settings", None)
    return None if settings is None else QuantizationConfig.from_dict(settings)


def _round_merged(
    name: str, layer: Any, base: QuantLinear, names: list[str], config: QuantizationConfig | None
) -> tuple[dict[str, Tensor], float]:
    """The tensors of a layer whose adapters are merged into its dequantized weight, and the error of rounding that."""
    dense = base.to_linear().float()
    layer.base_layer = dense
    try:
        layer.merge(adapter_names=names)
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()
    form, on_cpu = base.format, base if base.packed.device.type == "cpu" else copy.deepcopy(base).cpu()
    config = config or QuantizationConfig.from_name(f"w{form.weight_bits}a{form.input.activation_bits}")
    shared = FittedInput(on_cpu.input_transform, form.input.activation_bits, owner=form.input_from or name)
    rounded, merged = quantize_linear(name, dense, shared, form.weight_bits, config), dense.weight.detach().cpu()
    error = torch.linalg.vector_norm(rounded.dequantize() - merged) / torch.linalg.vector_norm(merged)
    return rounded.tensors(), float(error)


def _remove(model: nn.Module, name: str, layer: Any, names: Sequence[str]) -> None:
    """Take merged adapters away from a layer, and its wrapper where none is left."""
    layer.merged_adapters.clear()
    for adapter in names:
        layer.delete_adapter(adapter)
    if not _adapters(layer):
        model.set_submodule(name, layer.get_base_layer())


def _forget(model: Any) -> None:
    """Of a model's list of adapters those that no layer has any more."""
    left = set().union(*(_adapters(layer) for _, layer in _adapted(model)))
    for adapter in set(getattr(model, "peft_config", ())) - left:
        del model.peft_config[adapter]
    if not left and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False


def remove_fused(name: str, model: Any) -> None:
    """Take away the wrappers that ``fuse_lora`` left around a float model's merged layers.

    Raises:
        ModelError: if an adapter is attached and not merged.
    """
    if type(model).__name__.startswith("PeftModel"):
        raise ModelError(
            f"{name} is PEFT's wrapper of a model; quantize model.merge_and_unload(), or model.unload() and load the "
            "adapter again onto the quantized model"
        )
    adapted = list(_adapted(model))
    for layer_name, layer in adapted:
        if not layer.merged:
            raise ModelError(
                f"{name} has an adapter at {layer_name} that is not fused; call pipe.fuse_lora() to quantize it with "
                "the weights, or pipe.unload_lora_weights() and load it again onto the quantized model"
            )
    for layer_name, layer in adapted:
        model.set_submodule(layer_name, layer.get_base_layer())
    if adapted:
        _forget(model)
