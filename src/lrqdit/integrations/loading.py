"""What the backends of diffusers and transformers have in common: layers quantized as they are read, and made dense."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lrqdit.config import QuantizationConfig
from lrqdit.fitting.layer import quantize_without_data
from lrqdit.models.registry import Treatment, as_linear
from lrqdit.packed.linear import QuantLinear


def take_part(
    model: nn.Module, name: str, value: Tensor, plan: dict[str, Treatment], config: QuantizationConfig
) -> QuantLinear | None:
    """Hold a weight or bias in its layer, which is on the meta device, until both have come.

    Args:
        model: that is being loaded.
        name: of the tensor in it; the layer is one of ``plan``.
        value: as the file has it.
        plan: of layers that are still to come; the layer is taken out when it is complete.
        config: how it is quantized then.

    Returns:
        The quantized layer, which is not put into the model, or None as long as a part is missing.
    """
    owner, _, leaf = name.rpartition(".")
    layer: Any = model.get_submodule(owner)
    setattr(layer, leaf, nn.Parameter(value.detach(), requires_grad=False))
    if layer.weight.is_meta or (layer.bias is not None and layer.bias.is_meta):
        return None
    return quantize_without_data(owner, as_linear(layer), plan.pop(owner), config)


def make_dense(model: nn.Module, adapt: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
    """Replace the quantized layers of a model by dense ones, each as ``adapt`` returns it."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            model.set_submodule(name, adapt(layer.to_linear()))
