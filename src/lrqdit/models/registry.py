"""Which linear layers of a model are quantized and how, from its class: the plan that everything else follows.

One file of :mod:`lrqdit.models.families` per family of architectures; a class without an entry gets :data:`GENERIC`,
whose rule is: linear layers inside repeated blocks are quantized, those of them that modulate are weight-only, and
everything that embeds, routes, gates by few numbers, or projects in and out is kept. What modulates is told by its name
here; calibration sees it (:meth:`lrqdit.fitting.job.Job.run`).
"""

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrqdit.config import WEIGHT_BITS, QuantizationConfig
from lrqdit.errors import ModelError
from lrqdit.models import families, is_denoiser
from lrqdit.models.spec import ModelSpec

SMALLEST_PACKED_WEIGHTS = 4096  # a layer outside the low-bit set that has fewer weights stays as it is
SMALLEST_WEIGHT_ONLY_BITS = 4  # a large modulation layer loses too much below

_MODULATION = r"\w*norm\w*|ada(?!p)\w*|\w*modulation\w*|(\w+_)?mod|(?i:film\w*)"  # one component of a layer's name
_EMBEDDING = r"\w*emb\w*|time\w*|t_block|caption_proj\w*|\w*projector"
GENERIC = ModelSpec(
    quantized=r".*",
    weight_only=rf"(?!(.*\.)?({_EMBEDDING})(\.|$))(.*\.)?\d+\.(.*\.)?({_MODULATION})(\..*)?",
    kept=rf"(^|\.)({_MODULATION}|{_EMBEDDING}|router|moe\.gate)(\.|$)|^proj_out",
)
IP_ADAPTER = re.compile(r"(^|\.)processor\.|^(encoder_hid_proj|image_proj)\.")  # where diffusers puts its layers
FEW_OUTPUTS = 16  # inputs for an output: a layer of so few outputs inside a block routes, or gates whole heads
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

    def as_weight_only(self) -> "Treatment":
        """The same layer with float inputs, and at least the bits that modulation needs."""
        widths = tuple(width for width in self.widths if width >= SMALLEST_WEIGHT_ONLY_BITS)
        return Treatment(max(SMALLEST_WEIGHT_ONLY_BITS, self.weight_bits), 16, widths)

    @property
    def is_fitted(self) -> bool:
        """Whether calibration observes the layer and its input transform is chosen."""
        return bool(self.widths)


KEPT = Treatment(16)
Plan = Mapping[str, Treatment]


class Pointwise:
    """A 1 x 1 convolution as the linear layer that it is over the channels of each pixel."""

    channel_axis = -3

    def __init__(self, convolution: nn.Conv2d) -> None:
        self.in_features, self.out_features = convolution.in_channels, convolution.out_channels
        self.weight: Any = convolution.weight.detach()[:, :, 0, 0]
        self.bias: Any = convolution.bias
        self.training = convolution.training


Linear = nn.Linear | Pointwise


def as_linear(layer: nn.Module) -> Any:
    """A layer as the fitting sees it: a :class:`Pointwise` for a 1 x 1 convolution, else the layer itself."""
    if not isinstance(layer, nn.Conv2d) or type(layer) is not nn.Conv2d:
        return layer
    is_pointwise = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    return Pointwise(layer) if is_pointwise else layer


def linear_layers(module: nn.Module) -> dict[str, Linear]:
    """The linear layers that can be quantized, by name; 1 x 1 convolutions where the entry of a class names them.

    Subclasses of nn.Linear may read ``.weight`` themselves (nn.MultiheadAttention's does), so only exact ones count.
    The layers of an IP-Adapter are not the model's: what is saved must load into a model without it. A weight that
    another module has, too, such as a head tied to the embedding, stays what both have.
    """
    spec, found = find_spec(module), {}
    owners = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    tied: set[str] = set(getattr(module, "all_tied_weights_keys", None) or ())  # transformers: loading ties them
    for name, layer in module.named_modules():
        linear = as_linear(layer)
        is_named = isinstance(linear, Pointwise) and spec is not GENERIC and re.fullmatch(spec.quantized, name)
        if not name or not (type(layer) is nn.Linear or is_named) or IP_ADAPTER.search(name):
            continue
        if owners[id(layer.weight)] == 1 and f"{name}.weight" not in tied:
            found[name] = linear
    return found


def find_spec(module: nn.Module) -> ModelSpec:
    """The entry of a module's class, or :data:`GENERIC`."""
    return MODELS.get(type(module).__name__, GENERIC)


def plan(module: nn.Module, config: QuantizationConfig) -> dict[str, Treatment]:
    """What becomes of each linear layer of a module: those that are fitted first, then those kept, in their order.

    Args:
        module: any module with ``nn.Linear`` layers.
        config: its bits, ``keep_bits`` and ``exclude`` (searched in the name): what it matches stays as it is.

    Raises:
        ModelError: if an ``exclude`` pattern matches no layer, or nothing is left to quantize.
    """
    layers = linear_layers(module)
    for pattern in config.exclude:
        if not any(re.search(pattern, name) for name in layers):
            raise ModelError(
                f"exclude={pattern!r} matches no linear layer of {type(module).__name__}; its layers are named like "
                f"{', '.join(list(layers)[:3]) or '(it has none)'}"
            )
    # with a budget, errors are compared at 4 bits or fewer
    bits = config.weight_bits if config.average_bits is None else min(4, config.weight_bits)
    quantized = Treatment(bits, config.activation_bits, WEIGHT_BITS)
    treatments = {
        "quantized": quantized,
        "weight-only": quantized.as_weight_only(),
        "kept": KEPT if config.keep_bits == 16 else Treatment(8),
        "untouched": KEPT,
    }
    found: dict[str, list[str]] = {role: [] for role in treatments}
    for name, role in roles(module).items():
        is_excluded = any(re.search(pattern, name) for pattern in config.exclude)
        found["untouched" if is_excluded else role].append(name)
    if not found["quantized"]:
        raise ModelError(
            f"{type(module).__name__} has no linear layer to quantize ({len(layers)} found); pass a diffusion "
            "transformer, or loosen exclude"
        )
    return {name: treatments[role] for role, names in found.items() for name in names}


def roles(module: nn.Module) -> dict[str, str]:
    """By name of each linear layer, what it is in the model: quantized, weight-only, kept or untouched.

    Layers that diffusers keeps in float32, such as time embedders, are untouched where they would be kept: a model may
    ask them for the dtype of a parameter.
    """
    layers, spec = linear_layers(module), find_spec(module)
    # where a model has repeated blocks, the generic rule takes layers inside them alone
    has_blocks = spec is GENERIC and any(_is_in_block(name) for name in layers)
    in_float32 = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    found = {}
    for name, layer in layers.items():
        is_small = layer.weight.numel() < SMALLEST_PACKED_WEIGHTS
        has_few_outputs = (
            spec is GENERIC and _is_in_block(name) and layer.out_features * FEW_OUTPUTS <= layer.in_features
        )
        if spec.weight_only and re.fullmatch(spec.weight_only, name) and not is_small:
            found[name] = "weight-only"
        elif (
            re.fullmatch(spec.quantized, name)
            and not (spec.kept and re.search(spec.kept, name))
            and (_is_in_block(name) or not has_blocks)
            and not has_few_outputs
        ):
            found[name] = "quantized"
        elif is_small or in_float32 & set(name.split(".")) or (spec.dense and re.fullmatch(spec.dense, name)):
            found[name] = "untouched"
        else:
            found[name] = "kept"
    return found


def _is_in_block(name: str) -> bool:
    return re.search(r"(^|\.)\d+\.", name) is not None


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline that denoise, by name."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        name: module
        for name, module in modules.items()
        if is_denoiser(name, type(module).__module__.partition(".")[0], type(module).__name__)
    }


def call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a pipeline's call by name; of the class above, too, where one passes keywords on."""
    found: dict[str, inspect.Parameter] = {}
    for kind in type(pipeline).__mro__:
        if "__call__" in vars(kind):
            parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
            found |= {p.name: p for p in parameters if p.name not in found}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def call_arguments(pipeline: Any) -> dict[str, Any]:
    """Arguments a pipeline's call needs beyond the prompt, among those its signature has.

    PixArt's resolution binning knows three sizes; a model of another size must switch it off.
    """
    arguments: dict[str, Any] = {}
    accepted = call_parameters(pipeline)
    for module in denoisers(pipeline).values():
        arguments.update(find_spec(module).call_arguments)
    size = getattr(getattr(getattr(pipeline, "transformer", None), "config", None), "sample_size", None)
    if "use_resolution_binning" in accepted and size not in (32, 64, 128):
        arguments["use_resolution_binning"] = False
    if "clean_caption" in accepted:
        arguments["clean_caption"] = False
    return {name: value for name, value in arguments.items() if name in accepted}
