"""Which linear layers of a model are quantized and how, from its class: the plan that everything else follows.

One file of :mod:`lrqdit.models.families` per family of architectures; a class without an entry gets :data:`GENERIC`,
whose rule is: linear layers inside repeated blocks are quantized, everything that embeds, modulates or projects out is
kept.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrqdit.config import WEIGHT_BITS, QuantizationConfig
from lrqdit.errors import ModelError
from lrqdit.models import PIPELINE_COMPONENTS, families
from lrqdit.models.spec import ModelSpec

SMALLEST_KEPT_WEIGHTS = 4096  # a kept layer of fewer weights stays as it is
SMALLEST_WEIGHT_ONLY_BITS = 4  # a large modulation layer loses too much below

GENERIC = ModelSpec(
    quantized=r".*",
    kept=r"(^|\.)(\w*norm\w*|ada(?!p)\w*|\w*emb\w*|\w*modulation\w*|(\w+_)?mod|time\w*|t_block|router|gate)(\.|$)|^proj_out",
)
MODELS: dict[str, ModelSpec] = {
    class_name: spec
    for found in pkgutil.iter_modules(families.__path__)
    for class_name, spec in importlib.import_module(f"{families.__name__}.{found.name}").SPECS.items()
}


@dataclass(frozen=True)
class Treatment:
    """What becomes of one linear layer.

    Args:
        weight_bits: of its codes; 16 leaves it as it is.
        activation_bits: of its input; 16 for float activations.
        widths: the weight bits that mixed precision may choose among. None where the layer is stored as it is rounded,
            without an input transform: nothing is observed of it or fitted to it.
    """

    weight_bits: int
    activation_bits: int = 16
    widths: tuple[int, ...] = ()

    @property
    def is_fitted(self) -> bool:
        """Whether calibration observes the layer and its input transform is chosen."""
        return bool(self.widths)


KEPT = Treatment(16)
Plan = Mapping[str, Treatment]


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that can be quantized, by name.

    Subclasses of nn.Linear may read ``.weight`` themselves (nn.MultiheadAttention's does), so only exact ones count.
    """
    return {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear and name}


def find_spec(module: nn.Module) -> ModelSpec:
    """The entry of a module's class, or :data:`GENERIC`."""
    return MODELS.get(type(module).__name__, GENERIC)


def plan(module: nn.Module, config: QuantizationConfig) -> dict[str, Treatment]:
    """What becomes of each linear layer of a module: those that are fitted first, then those kept, in their order.

    Args:
        module: any module with ``nn.Linear`` layers.
        config: its bits, ``keep_bits`` and ``exclude`` (searched in the name).

    Raises:
        ModelError: if an ``exclude`` pattern matches no layer, nothing is left to quantize, or adapters are attached.
    """
    adapted = next((name for name, _ in module.named_modules() if name.endswith(".base_layer")), None)
    if adapted is not None:
        raise ModelError(
            f"{type(module).__name__} has an adapter at {adapted.removesuffix('.base_layer')}; fuse it into the "
            "weights or unload it, quantize, and load it again onto the quantized model"
        )
    layers = linear_layers(module)
    for pattern in config.exclude:
        if not any(re.search(pattern, name) for name in layers):
            raise ModelError(
                f"exclude={pattern!r} matches no linear layer of {type(module).__name__}; its layers are named like "
                f"{', '.join(list(layers)[:3]) or '(it has none)'}"
            )
    # with a budget, errors are compared at 4 bits or fewer
    bits = config.weight_bits if config.average_bits is None else min(4, config.weight_bits)
    weight_only_bits = max(SMALLEST_WEIGHT_ONLY_BITS, bits)
    weight_only_widths = tuple(width for width in WEIGHT_BITS if width >= SMALLEST_WEIGHT_ONLY_BITS)
    low_bit = Treatment(bits, config.activation_bits, WEIGHT_BITS)
    weight_only = Treatment(weight_only_bits, 16, weight_only_widths)
    spec = find_spec(module)
    # where a model has repeated blocks, the generic rule takes layers inside them alone
    has_blocks = spec is GENERIC and any(_is_in_block(name) for name in layers)
    found: dict[Treatment, list[str]] = {low_bit: [], weight_only: [], Treatment(8): [], KEPT: []}
    for name, layer in layers.items():
        if any(re.search(pattern, name) for pattern in config.exclude):
            treatment = KEPT
        elif spec.weight_only and re.fullmatch(spec.weight_only, name):
            treatment = weight_only
        elif re.fullmatch(spec.quantized, name) and not (spec.kept and re.search(spec.kept, name)):
            treatment = low_bit if _is_in_block(name) or not has_blocks else KEPT
        else:
            treatment = KEPT
        if treatment == KEPT and config.keep_bits == 8 and layer.weight.numel() >= SMALLEST_KEPT_WEIGHTS:
            treatment = Treatment(8)
        found[treatment].append(name)
    if not found[low_bit]:
        raise ModelError(
            f"{type(module).__name__} has no linear layer to quantize ({len(layers)} found); pass a diffusion "
            "transformer, or loosen exclude"
        )
    return {name: treatment for treatment, names in found.items() for name in names}


def _is_in_block(name: str) -> bool:
    return re.search(r"(^|\.)\d+\.", name) is not None


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline that denoise, by name."""
    found = {name: getattr(pipeline, name, None) for name in PIPELINE_COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def call_arguments(pipeline: Any) -> dict[str, Any]:
    """Arguments a pipeline's call needs beyond the prompt, among those its signature has.

    PixArt's resolution binning knows three sizes; a model of another size must switch it off.
    """
    arguments: dict[str, Any] = {}
    accepted = inspect.signature(pipeline.__call__).parameters
    for module in denoisers(pipeline).values():
        arguments.update(find_spec(module).call_arguments)
    size = getattr(getattr(getattr(pipeline, "transformer", None), "config", None), "sample_size", None)
    if "use_resolution_binning" in accepted and size not in (32, 64, 128):
        arguments["use_resolution_binning"] = False
    if "clean_caption" in accepted:
        arguments["clean_caption"] = False
    return {name: value for name, value in arguments.items() if name in accepted}
