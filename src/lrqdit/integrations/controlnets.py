"""ControlNets that start from a quantized transformer (``from_transformer``): they copy its weights, dequantized."""

import functools
from types import ModuleType
from typing import Any

MODULES = "diffusers.models.controlnets.controlnet_"  # and a family's name


def take_quantized(module: ModuleType) -> None:
    """Let the ``from_transformer`` of a diffusers module's classes take quantized transformers."""
    for kind in vars(module).values():
        method = vars(kind).get("from_transformer") if isinstance(kind, type) else None
        if isinstance(method, classmethod) and kind.__module__ == module.__name__:
            kind: Any = kind
            kind.from_transformer = _wrapped(method.__func__)


def _wrapped(method: Any) -> classmethod:
    @functools.wraps(method)
    def from_transformer(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        from lrqdit.packed.linear import QuantLinear

        def dense(value: Any) -> Any:
            is_quantized = any(isinstance(layer, QuantLinear) for layer in getattr(value, "modules", tuple)())
            return _Dequantized(value) if is_quantized else value

        arguments = tuple(dense(value) for value in arguments)
        return method(cls, *arguments, **{name: dense(value) for name, value in keywords.items()})

    return classmethod(from_transformer)


class _Config(dict[str, Any]):
    """A configuration whose values are attributes, too."""

    __getattr__ = dict.__getitem__


class _Dequantized:
    """A quantized module to copy from: its state dict has a dense one's weights, dequantized when they are read."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        from torch import nn

        found = getattr(self._module, name)
        if name == "config":
            return _Config({key: value for key, value in found.items() if "quantization" not in key})
        return _Dequantized(found) if isinstance(found, nn.Module) else found

    def state_dict(self) -> dict[str, Any]:
        from lrqdit.packed.linear import QuantLinear

        layers = {name: m for name, m in self._module.named_modules() if isinstance(m, QuantLinear)}
        plain = self._module.state_dict()
        found = {name: tensor for name, tensor in plain.items() if name.rpartition(".")[0] not in layers}
        for name, layer in layers.items():
            found |= {f"{name}.weight": layer.weight}
            if layer.bias is not None and layer.format.has_original_bias:
                found |= {f"{name}.bias": layer.bias}
        return found
