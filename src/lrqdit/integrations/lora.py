"""LoRA and its kin (PEFT's adapters): merged for good into quantized layers, or found merged before quantization."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from lrqdit.config import QuantizationConfig
from lrqdit.errors import ModelError
from lrqdit.fitting.layer import FittedInput, quantize_linear
from lrqdit.packed.linear import QuantLinear


def fuse_lora(
    target: DiffusionPipeline | nn.Module, adapter_names: Sequence[str] | None = None, lora_scale: float = 1.0
) -> dict[str, float]:
    """Merge adapters into the weights for good, and round the weights of the quantized layers they touch again.

    A layer keeps its bits and its input transform; it is rounded without calibration, so that fusing costs a little
    quality where leaving the adapter beside the layer costs a little time. The adapters are removed: they cannot be
    taken out of rounded weights. Layers that are not quantized are merged as always.

    Args:
        target: a pipeline or a model with adapters of PEFT's (LoRA, DoRA, LoHa, LoKr, ...).
        adapter_names: those to merge; the active ones if None.
        lora_scale: multiplies the adapters, beside the weights given by ``set_adapters``.

    Returns:
        By name of the quantized layer the relative error of rounding, ``|W' - W_q'| / |W'|`` with W' the merged weight.

    Raises:
        ModelError: if there is no adapter, or the model is offloaded.
    """
    is_pipeline = isinstance(target, DiffusionPipeline)
    parts = dict(target.components) if is_pipeline else {"": target}
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and any(_adapted(part))}
    names = list(adapter_names) if adapter_names is not None else None
    found = {name for model in models.values() for _, layer in _adapted(model) for name in layer.active_adapters}
    if not found or (names is not None and not names):
        raise ModelError(f"fuse_lora: {type(target).__name__} has no active adapter; load one with load_lora_weights")
    for model in models.values():
        for name, layer in _adapted(model):
            if next(layer.get_base_layer().parameters()).is_meta:
                raise ModelError(f"fuse_lora: {name} is offloaded; call remove_all_hooks() of the pipeline first")
    errors: dict[str, float] = {}
    for part, model in models.items():
        config = _config(model)
        for name, layer in list(_adapted(model)):
            layer.scale_layer(lora_scale)
            base = layer.get_base_layer()
            if not isinstance(base, QuantLinear):
                layer.merge(adapter_names=names)
            elif set(names or layer.active_adapters) & set(layer.active_adapters):
                label = f"{part}.{name}" if part and len(models) > 1 else name
                errors[label] = _merge(label, layer, base, names, config)
            layer.merged_adapters.clear()
        for adapter in names or sorted(found):
            _delete(model, adapter)
    return errors


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


def _merge(
    name: str, layer: Any, base: QuantLinear, names: list[str] | None, config: QuantizationConfig | None
) -> float:
    """Merge the adapters of one layer into its dequantized weight, and round that into the layer."""
    dense = base.to_linear().float()
    layer.base_layer = dense
    try:
        layer.merge(adapter_names=names)
    finally:
        layer.base_layer = base
    form, on_cpu = base.format, base if base.packed.device.type == "cpu" else copy.deepcopy(base).cpu()
    config = config or QuantizationConfig.from_name(f"w{form.weight_bits}a{form.input.activation_bits}")
    shared = FittedInput(on_cpu.input_transform, form.input.activation_bits, owner=form.input_from or name)
    rounded = quantize_linear(name, dense, shared, form.weight_bits, config)
    stored = rounded.tensors()
    for key, tensor in base.tensors().items():
        tensor.copy_(stored[key])
    merged = dense.weight.detach()
    return float(torch.linalg.vector_norm(base.dequantize() - merged) / torch.linalg.vector_norm(merged))


def _delete(model: Any, adapter: str) -> None:
    remove = getattr(model, "delete_adapters", None) or getattr(model, "delete_adapter", None)
    if remove is None or adapter not in getattr(model, "peft_config", {}):
        return
    remove(adapter)
    if not getattr(model, "peft_config", None) and hasattr(model, "unload_lora"):
        model.unload_lora()


def remove_fused(name: str, model: Any) -> None:
    """Take away the wrappers that ``fuse_lora`` left around a float model's merged layers.

    Raises:
        ModelError: if an adapter is attached and not merged.
    """
    adapted = list(_adapted(model))
    for layer_name, layer in adapted:
        if not layer.merged:
            raise ModelError(
                f"{name} has an adapter at {layer_name} that is not fused; call pipe.fuse_lora() to quantize it with "
                "the weights, or pipe.unload_lora_weights() and load it again onto the quantized model"
            )
    if adapted and hasattr(model, "unload_lora"):
        model.unload_lora()
