"""What users do to a pipeline or a model before they quantize it: compiled, fused, offloaded, cast layer by layer."""

import logging
from typing import Any

from torch import nn

from lrqdit.errors import ModelError
from lrqdit.integrations.lora import remove_fused

_LOG = logging.getLogger("lrqdit")
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


def unwrap(module: Any) -> nn.Module:
    """The model inside ``torch.compile(model)``, ``DistributedDataParallel(model)`` or ``DataParallel(model)``."""
    while (inner := _WRAPPERS.get(type(module).__name__)) is not None:
        module = getattr(module, inner)
    return module


def check_in_memory(name: str, module: nn.Module) -> None:
    """Raise unless the weights of a model are in memory, in the dtype they are computed in.

    Raises:
        ModelError: naming what offloads or casts them, and how to stop it.
    """
    for layer_name, layer in module.named_modules():
        hooks = getattr(getattr(layer, "_diffusers_hook", None), "hooks", {})
        if "group_offloading" in hooks:
            raise ModelError(
                f"{name} is offloaded in groups; load it again without enable_group_offload, quantize it, and switch "
                "that on afterwards"
            )
        if "layerwise_casting" in hooks:
            raise ModelError(
                f"{name} stores its weights in a narrower dtype than it computes in (enable_layerwise_casting at "
                f"{layer_name or 'the top'}); load it again without, quantize it, and switch that on afterwards"
            )
        hook = getattr(layer, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(found, "offload", False) is True for found in hooks):
            raise ModelError(
                f"{name} is offloaded layer by layer; call pipe.remove_all_hooks() (or accelerate's "
                "remove_hook_from_module(model, recurse=True)), quantize, and switch offloading on again"
            )
    meta = next((key for key, tensor in module.named_parameters() if tensor.is_meta), None)
    if meta is not None:
        raise ModelError(f"{name}.{meta} is on the meta device, without values; load the model's weights first")


def separate_projections(name: str, module: Any) -> None:
    """Undo ``fuse_qkv_projections``: quantized layers that read one tensor quantize it once anyway, and a saved model
    is loaded into one that is not fused."""
    fused = [layer for layer in module.modules() if getattr(layer, "fused_projections", False)]
    if not fused:
        return
    if hasattr(module, "unfuse_qkv_projections"):
        module.unfuse_qkv_projections()
    for layer in fused:
        for leaf in ("to_qkv", "to_kv", "to_added_qkv"):
            if hasattr(layer, leaf):
                delattr(layer, leaf)
        layer.fused_projections = False
    _LOG.info("%s: fuse_qkv_projections is undone; quantized layers share their input as they are", name)


def prepare(name: str, module: nn.Module) -> None:
    """Check a model before it is quantized, and take away wrappers that do not change what it computes.

    Raises:
        ModelError: if its weights are elsewhere, or an adapter is attached that is not fused.
    """
    check_in_memory(name, module)
    remove_fused(name, module)
    separate_projections(name, module)
