"""Mixed precision: how much each layer's weight bits change the model's output, and which bits a budget allows.

The change is found at one width of each layer. At other widths it is that value times a fixed factor
(``RELATIVE_ERROR``); measuring at every width gave no better choice. The changes of different layers add up to the
change of all of them, within a few per cent. There are two ways to find the change at one width:

- ``gradient`` estimates it from calibration. Let D be the rounding error of a weight and M the matrix of gradients that
  :mod:`lrqdit.calibration.moments` defines. To first order the output changes by <M, D>. Its mean square is
  tr(D E[M^T M] D^T) / out_features, if all rows of M have the same distribution.
- ``measured`` replaces one layer at a time by its rounded form, with float activations, and runs the recorded denoising
  steps again. It chooses better, and needs a few runs of the model for each layer.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrqdit.calibration.steps import Step
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ConfigError, ModelError, NumericalError
from lrqdit.models.registry import KEPT, Linear, Plan
from lrqdit.numerics.rotation import single_thread
from lrqdit.packed.format import InputFormat, LinearFormat
from lrqdit.packed.linear import QuantLinear

# Squared error of a layer by weight bits, relative to 3 bits. One bit less multiplies it by 4. From 3 to 2 bits the
# last denoising steps show a factor of 4.8 (median over layers); 8 is used, because the queries and keys of cross-
# attention also lose at earlier steps, which are not recorded. The factors of 5 and 6 bits were measured on Gaussian
# weights: 3.6 or 3.7 for a bit on a trellis, 2.5 for the sixth bit, which has no trellis.
RELATIVE_ERROR = {2: 8.0, 3: 1.0, 4: 0.25, 5: 0.0625, 6: 0.025, 8: 0.003}


def estimate(layer: QuantLinear, weight: Tensor, moment: Tensor, energy: float) -> float:
    """Mean squared change of the model's output through the rounded weight of ``layer``, to first order.

    Args:
        layer: quantized.
        weight: that of the original, (out_features, in_features).
        moment: E[M^T M] of the layer's group, at any scale, (in_features, in_features).
        energy: E |M|^2 of the layer.
    """
    difference = layer.dequantize().cpu() - weight.detach().cpu().float()
    with single_thread():
        change = (difference @ moment.float()).double().mul_(difference.double()).sum()
    return float(change / moment.trace()) * energy / len(weight)


class Probe:
    """Context manager that measures how replaced layers change a module's output; the module is in eval mode inside.

    Args:
        module: the original model.
        steps: recorded of it.
    """

    def __init__(self, module: nn.Module, steps: list[Step]) -> None:
        self._module, self._steps = module, steps
        self._training = [part for part in module.modules() if part.training]
        self._exact: list[Tensor] = []

    @classmethod
    def of(cls, module: nn.Module, steps: list[Step]) -> "Probe":
        """A probe, or :class:`ModelError` if calibration could not keep any step."""
        if not steps:
            raise ModelError(
                f"sensitivity='measured': no call of {type(module).__name__} could be kept to measure on, its "
                "arguments are more than tensors, numbers and texts; set sensitivity='gradient'"
            )
        return cls(module, steps)

    def __enter__(self) -> "Probe":
        self._module.eval()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        for part in self._training:
            part.training = True

    @torch.no_grad()
    def measure(self, name: str, layer: QuantLinear) -> float:
        """Mean squared change of the steps' outputs when one layer has the rounded weight of ``layer``.

        Raises:
            NumericalError: if it is NaN or Inf.
        """
        if not self._exact:
            self._exact = [step.run(self._module) for step in self._steps]
        original: Any = self._module.get_submodule(name)
        self._module.set_submodule(name, layer.to_linear().to(original.weight.device, original.weight.dtype))
        try:
            changes = [
                float((step.run(self._module) - exact).double().square().mean())
                for step, exact in zip(self._steps, self._exact, strict=True)
            ]
        finally:
            self._module.set_submodule(name, original)
        change = sum(changes) / len(changes)
        if not math.isfinite(change):
            raise NumericalError(f"the model's output is NaN or Inf once {name} is rounded; run it in a wider dtype")
        return change


def at_every_width(change: float, bits: int, widths: Sequence[int]) -> dict[int, float]:
    """A change measured at some weight bits, at every width that the layer may get."""
    return {width: change * RELATIVE_ERROR[width] / RELATIVE_ERROR[bits] for width in widths}


@dataclasses.dataclass(frozen=True)
class Rest:
    """What a module holds beside the layers that are quantized.

    Args:
        model: its class, for messages.
        parameters: of the whole module.
        size_bytes: of everything outside of these layers, as it will be stored.
    """

    model: str
    parameters: int
    size_bytes: int

    @classmethod
    def of(cls, module: nn.Module, plan: Plan, dtype: torch.dtype | None = None) -> "Rest":
        """Count a module; ``dtype``: that float tensors will be stored in, where it is narrower than theirs."""
        parameters = size_bytes = 0
        for key, tensor in module.state_dict().items():
            parameters += tensor.numel()
            if plan.get(key.rpartition(".")[0], KEPT) == KEPT:
                is_cast = dtype is not None and tensor.is_floating_point()
                size = min(dtype.itemsize, tensor.element_size()) if is_cast and dtype else tensor.element_size()
                size_bytes += tensor.numel() * size
        return cls(type(module).__name__, parameters, size_bytes)


def choose_bits(
    formats: Mapping[str, LinearFormat], predicted: Mapping[str, Mapping[int, float]], rest: Rest,
    config: QuantizationConfig,
) -> dict[str, int]:  # fmt: skip
    """Weight bits by layer: the smallest sum of predicted changes within ``config.average_bits`` of the whole module,
    or, if that is None, within what the layers would take as they are without principal parts (or the least possible).

    Args:
        formats: of every quantized layer, as it is now.
        predicted: mean squared change of the module's output by layer and weight bits; layers that are not named keep
            their bits.
        rest: of the module.
        config: the budget and the kind of the levels.

    Raises:
        ConfigError: if the budget is below what the smallest widths take; it names that.
    """

    def at_bits(layout: LinearFormat, bits: int) -> LinearFormat:
        return layout.at_bits(bits, config.has_trellis, config.table_scope == "row")

    def without_principal(layout: LinearFormat) -> LinearFormat:
        return dataclasses.replace(layout, input=dataclasses.replace(layout.input, principal_rank=0))

    costs = {name: [at_bits(formats[name], bits).size_bytes for bits in changes] for name, changes in predicted.items()}
    smallest = sum(min(values) for values in costs.values())
    if config.average_bits is None:
        plain = sum(without_principal(formats[name]).size_bytes for name in predicted)
        return _pick(costs, predicted, max(plain, smallest))
    others = rest.size_bytes + sum(layout.size_bytes for name, layout in formats.items() if name not in predicted)
    budget = math.floor(config.average_bits * rest.parameters / 8) - others
    if budget < smallest:
        least = math.ceil(8 * (smallest + others) / rest.parameters * 1000) / 1000
        raise ConfigError(
            f"average_bits={config.average_bits:g} cannot be reached: {rest.model} takes at least {least} true bits "
            "per parameter, scales and kept layers included"
        )
    return _pick(costs, predicted, budget)


def _pick(costs: Mapping[str, list[int]], predicted: Mapping[str, Mapping[int, float]], budget: int) -> dict[str, int]:
    widths = [list(predicted[name]) for name in costs]
    picks = choose_options(list(costs.values()), [list(predicted[name].values()) for name in costs], budget)
    return {name: bits[pick] for name, bits, pick in zip(costs, widths, picks, strict=True)}


UNITS = 1 << 17


def choose_options(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One option for each item: the smallest sum of errors whose sum of costs does not exceed the budget.

    Exact by dynamic programming as long as the costs differ by at most 131072 in all; above that what an item costs
    beyond its cheapest option is rounded up to a whole unit, so the budget is still kept. The unit does not depend on
    the budget: a larger one never has a larger sum of errors.

    Args:
        costs: of every option of every item.
        errors: likewise; what they sum up to is what is minimized.
        budget: in the unit of the costs, at least the sum of the cheapest options.

    Returns:
        The index of each item's option; the cheaper one of equal sums.

    Raises:
        ValueError: if not even the cheapest options fit.
    """
    cheapest = [min(item) for item in costs]
    span = sum(max(item) for item in costs) - sum(cheapest)
    unit = max(1, -(-span // UNITS))
    room = min(budget - sum(cheapest), span + unit * len(costs)) // unit
    if room < 0:
        raise ValueError(f"the cheapest options cost {sum(cheapest)}, the budget is {budget}")
    smallest = np.zeros(room + 1)  # by what may be spent
    spent, picks = [], []
    for item, item_errors, low in zip(costs, errors, cheapest, strict=True):
        units = [-(-(cost - low) // unit) for cost in item]
        sums = np.full((len(item), room + 1), np.inf)
        for option, (steps, error) in enumerate(zip(units, item_errors, strict=True)):
            if steps <= room:
                sums[option, steps:] = smallest[: room + 1 - steps] + error
        pick = sums.argmin(axis=0).astype(np.uint8)
        smallest = np.take_along_axis(sums, pick[None].astype(np.intp), axis=0)[0]
        spent.append(units)
        picks.append(pick)
    place, chosen = room, []
    for units, pick in zip(reversed(spent), reversed(picks), strict=True):
        chosen.append(int(pick[place]))
        place -= units[chosen[-1]]
    return chosen[::-1]


def check_budget(layers: Mapping[str, Linear], plan: Plan, rest: Rest, config: QuantizationConfig) -> None:
    """Raise before anything runs if ``average_bits`` cannot be reached even by layers without input transforms.

    What the error names then leaves room for them. The budget is checked exactly once they are known.
    """
    predicted = {name: dict.fromkeys(t.widths, 0.0) for name, t in plan.items() if t.is_fitted}

    def choose(has_transform: bool) -> None:
        formats = {}
        for name, treatment in plan.items():
            if treatment != KEPT:
                layer, has = layers[name], has_transform and treatment.is_fitted
                shared = InputFormat(layer.in_features, 16, has_offset=has, has_scale=has)
                has_bias = layer.bias is not None
                formats[name] = LinearFormat(
                    shared, layer.out_features, 8, table_rows=0, has_bias=has_bias or has, has_original_bias=has_bias
                )
        choose_bits(formats, predicted, rest, config)

    try:
        choose(has_transform=False)
    except ConfigError:
        choose(has_transform=True)
