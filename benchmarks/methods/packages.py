"""Other people's packages on the same layers, prompts and seeds: what a recipe that stands for one is checked with.

Each function makes one linear layer into the package's own, which then computes by the package's own code; the layers
are those that the calibration groups name. A package that is not installed, or has no such setting, is left out with
its reason (:func:`why_missing`). Bits are read off the tensors that the package stores for a float16 layer
(:func:`stored_bits`), never asserted: a package that keeps 3-bit codes in bytes has 8-bit ones.
"""

import copy
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods.simulate import SimulatedReport, group_size
from lrqdit.calibration.statistics import ActivationStats, InputGroup

# before the packages are imported: no download of kernels, no compilation for a speed that is not measured here
os.environ.setdefault("ORBITQUANT_KERNELS_AUTOFETCH", "0")
os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")

Convert = Callable[[nn.Linear, ActivationStats, int, int], nn.Module]


def quanto(layer: nn.Linear, stats: ActivationStats, weight_bits: int, activation_bits: int) -> nn.Module:
    """optimum-quanto: qint4 or qint2 with its automatic groups (128 or less), weight-only.

    Its 8-bit activations are static scales of inputs and outputs, found while the whole model runs; left out.
    """
    from optimum.quanto import QLinear, qint2, qint4

    quantized = QLinear.from_module(layer, weights={2: qint2, 4: qint4}[weight_bits])
    quantized.freeze()
    return quantized


def torchao(layer: nn.Linear, stats: ActivationStats, weight_bits: int, activation_bits: int) -> nn.Module:
    """torchao: groups of 32, its default; 8-bit asymmetric tokens, or 4-bit weights alone in the CPU's packed layout.

    Int8DynamicActivationIntxWeightConfig keeps its codes in bytes: the packed layouts of 8-bit tokens need kernels that
    the published wheels for x86 do not hold.
    """
    import torchao.quantization as ao
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    size = group_size(layer.in_features, 32)
    dtype, granularity = getattr(torch, f"int{weight_bits}"), ao.PerGroup(size)
    if activation_bits == 8:
        config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    elif weight_bits == 4:
        config = PrototypeInt4WeightOnlyConfig(group_size=size, set_inductor_config=False)
    else:
        config = ao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    holder = nn.Sequential(layer)
    ao.quantize_(holder, config)
    return holder[0]


def _sdnq(**options: bool) -> Convert:
    """sdnq: unsigned codes with its automatic group sizes; int8 products for 8-bit tokens, else weight-only.

    Its int8 product has symmetric tokens and rounds the weights a second time, to int8 with one scale a row; inputs of
    fewer than 32 tokens stay in float.
    """

    def convert(layer: nn.Linear, stats: ActivationStats, weight_bits: int, activation_bits: int) -> nn.Module:
        from sdnq.quantizer import SDNQConfig, sdnq_quantize_layer

        logging.getLogger("sdnq").setLevel(logging.ERROR)  # for each layer: that Triton would be faster
        config = SDNQConfig(weights_dtype=f"uint{weight_bits}", use_quantized_matmul=activation_bits == 8, **options)
        return sdnq_quantize_layer(layer, config)[0]

    return convert


def orbitquant(layer: nn.Linear, stats: ActivationStats, weight_bits: int, activation_bits: int) -> nn.Module:
    """orbitquant: permuted block Hadamard, Lloyd-Max levels for weights and tokens, no calibration.

    Its policies would choose other layers (and wider 2-bit ones); here it gets the layers that everyone gets. With
    8-bit tokens the levels are those of its first version: the search for the second's exact ones is too slow there.
    """
    from orbitquant.layers import OrbitQuantLinear

    config = _orbitquant_config(weight_bits, activation_bits)
    return OrbitQuantLinear.from_linear(layer, config=config, module_name="layer")


def orbitquant_gptq(layer: nn.Linear, stats: ActivationStats, weight_bits: int, activation_bits: int) -> nn.Module:
    """orbitquant with its GPTQ rounding, on the second moment that every method gets, not its own collector's."""
    from orbitquant.gptq import load_rounded_codes, round_groups
    from orbitquant.rotations import get_rpbh_rotation

    config = _orbitquant_config(weight_bits, activation_bits)
    moment = stats.second_moment(torch.zeros(layer.in_features))
    assert moment is not None
    rotation = get_rpbh_rotation(layer.in_features, config.rotation_seed, config.block_size)
    hessian = rotation.apply_to_weight(rotation.apply_to_weight(moment.float()).T.contiguous())
    holder = nn.Sequential(layer)
    codes = round_groups(holder, [["0"]], {"0": hessian}, config, release=False)
    holder[0] = orbitquant(layer, stats, weight_bits, activation_bits)
    load_rounded_codes(holder, codes)
    return holder[0]


def _orbitquant_config(weight_bits: int, activation_bits: int) -> Any:
    from orbitquant import OrbitQuantConfig

    version = 1 if activation_bits == 8 else 2
    return OrbitQuantConfig(weight_bits=weight_bits, activation_bits=activation_bits, codebook_version=version)


@dataclass(frozen=True)
class Package:
    """A package's setting: the module it needs, and the weight and activation bits that it has."""

    convert: Convert
    module: str
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]


PACKAGES: dict[str, Package] = {
    "optimum-quanto": Package(quanto, "optimum.quanto", (2, 4), (16,)),
    "torchao": Package(torchao, "torchao", (2, 3, 4), (8, 16)),
    "sdnq": Package(_sdnq(), "sdnq", (2, 3, 4), (8, 16)),
    "sdnq+svd": Package(_sdnq(use_svd=True), "sdnq", (2, 3, 4), (8, 16)),
    "orbitquant": Package(orbitquant, "orbitquant", (2, 3, 4), (4, 6, 8)),
    "orbitquant+gptq": Package(orbitquant_gptq, "orbitquant", (2, 3, 4), (4, 6, 8)),
}


def why_missing(name: str, weight_bits: int, activation_bits: int) -> str:
    """Why a package cannot be measured at these bits; empty where it can."""
    package = PACKAGES[name]
    outer = package.module.partition(".")[0]
    if importlib.util.find_spec(outer) is None or importlib.util.find_spec(package.module) is None:
        return f"{package.module} is not installed"
    if weight_bits not in package.weight_bits or activation_bits not in package.activation_bits:
        return f"it has no w{weight_bits}a{activation_bits}"
    return ""


def quantize(
    name: str, module: nn.Module, groups: list[InputGroup], weight_bits: int, activation_bits: int
) -> SimulatedReport:
    """Replace the layers of the groups by a package's, in place; everything else counts as 16 bits."""
    convert = PACKAGES[name].convert
    parameters = sum(p.numel() for p in module.parameters())
    bits = 16 * parameters
    for group in groups:
        for layer_name in group.names:
            layer = module.get_submodule(layer_name)
            bits -= 16 * sum(p.numel() for p in layer.parameters())
            half = copy.deepcopy(layer).half()
            bits += stored_bits(convert(half, group.stats, weight_bits, activation_bits))
            module.set_submodule(layer_name, convert(layer, group.stats, weight_bits, activation_bits))
    return SimulatedReport(parameters, bits)


def stored_bits(module: nn.Module) -> int:
    """Bits of all tensors that a module saves, those inside tensor subclasses instead of what they look like."""
    return sum(8 * _count_bytes(tensor) for tensor in module.state_dict(keep_vars=True).values())


def _count_bytes(tensor: Tensor) -> int:
    # a parameter of a subclass keeps the class, and with it the names of what is inside
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_count_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
