"""The main job of one module: every group of layers fitted, bits chosen, nothing replaced."""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from tqdm.auto import tqdm

from lrqdit.calibration.runs import RunFolder
from lrqdit.calibration.statistics import ActivationStats, InputGroup
from lrqdit.calibration.steps import Calibration
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ModelError
from lrqdit.fitting.bits import Probe, at_every_width, choose_bits, estimate
from lrqdit.fitting.compensate import Curvature, measure_curvature
from lrqdit.fitting.layer import keep_at_8_bits, quantize_linear
from lrqdit.fitting.reports import GroupReport
from lrqdit.fitting.transform import choose_transform, data_free_transform
from lrqdit.models import registry as models
from lrqdit.numerics.tokens import InputTransform
from lrqdit.packed.format import LinearFormat
from lrqdit.packed.linear import QuantLinear


@dataclasses.dataclass(frozen=True)
class _Part:
    """Layers that share an input and are treated alike."""

    names: list[str]
    group: InputGroup | None
    is_weight_only: bool

    def bits(self, config: QuantizationConfig) -> tuple[int, int]:
        """Weight bits (with a budget: those that sensitivity is measured at) and activation bits."""
        weight_bits = config.weight_bits if config.average_bits is None else min(4, config.weight_bits)
        return (max(4, weight_bits), 16) if self.is_weight_only else (weight_bits, config.activation_bits)


class _Results:
    """Finished groups of layers by key: kept in a folder if there is one, so that a killed run continues."""

    def __init__(self, folder: RunFolder | None) -> None:
        self._folder = folder

    def get(
        self, key: str, names: list[str], compute: Callable[[], tuple[dict[str, QuantLinear], GroupReport]]
    ) -> tuple[dict[str, QuantLinear], GroupReport]:
        """The layers and report under ``key``, computed if they are not there."""
        kept = self._folder.load(key) if self._folder else None
        if kept:
            return _restore(names, kept)
        layers, report = compute()
        if self._folder:
            tensors = {f"{n}:{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}
            formats = {n: layer.format.to_dict() for n, layer in layers.items()}
            self._folder.save(key, tensors, {"formats": formats, "report": dataclasses.asdict(report)})
        return layers, report


def quantize_module(
    component: str,
    module: nn.Module,
    selection: models.Selection,
    calibration: Calibration | None,
    config: QuantizationConfig,
    run_folder: RunFolder | None,
    show_progress: bool,
    stored_dtype: torch.dtype | None,
) -> tuple[dict[str, QuantLinear], list[GroupReport]]:
    """The quantized form of every selected layer of a module, by name; the module itself is only read."""
    weight_only = set(selection.weight_only)
    if calibration:
        pairs: list[tuple[list[str], InputGroup | None]] = [(group.names, group) for group in calibration.groups]
    else:
        pairs = [([name], None) for name in selection.quantized + selection.weight_only]
    # layers that share an input but are treated differently cannot share its codes
    split = [_Part([n for n in names if (n in weight_only) == flag], group, flag) for names, group in pairs
             for flag in (False, True)]  # fmt: skip
    parts = [part for part in split if part.names]
    results, probe, stack = _Results(run_folder), None, contextlib.ExitStack()
    is_mixed = calibration is not None and config.is_mixed
    if calibration is not None and is_mixed and config.sensitivity == "measured":
        if not calibration.steps:
            raise ModelError(
                f"sensitivity='measured': no call of {type(module).__name__} could be kept to measure on, its "
                "arguments are more than tensors, numbers and texts; set sensitivity='gradient'"
            )
        probe = stack.enter_context(Probe(module, calibration.steps))
    replacements: dict[str, QuantLinear] = {}
    reports = []
    with stack:
        for number, part in enumerate(tqdm(parts, f"quantizing {component}", disable=not show_progress)):
            layers, report = results.get(
                f"group-{number}", part.names, lambda part=part: _quantize_group(module, part, config, probe)
            )
            replacements.update(layers)
            reports.append(report)
    kept = {
        name: keep_at_8_bits(name, module.get_submodule(name), config)
        for name in models.layers_stored_at_8_bits(module, selection, config)
    }
    if is_mixed:
        predicted = {
            name: {int(bits): error for bits, error in errors.items()}
            for report in reports
            for name, errors in report.predicted.items()
        }
        if not predicted and config.average_bits is not None:
            raise ModelError(
                f"average_bits: calibration saw no gradients of {type(module).__name__} to estimate what its layers' "
                "bits do; set sensitivity='measured'"
            )
        formats = {name: replacements[name].format for name in predicted}
        others = {name: layer.format for name, layer in (replacements | kept).items() if name not in predicted}
        chosen = choose_bits(module, formats, predicted, others, config, stored_dtype)
        for number, part in enumerate(tqdm(parts, f"choosing bits of {component}", disable=not show_progress)):
            layers, reports[number] = results.get(
                f"chosen-{number}", part.names,
                lambda part=part, number=number: _change_bits(
                    module, part, config, {n: replacements[n] for n in part.names}, reports[number], chosen
                ),
            )  # fmt: skip
            replacements.update(layers)
    return replacements | kept, reports


def _quantize_group(
    module: nn.Module, part: _Part, config: QuantizationConfig, probe: Probe | None
) -> tuple[dict[str, QuantLinear], GroupReport]:
    """Choose the group's input transform and quantize its layers with it; find out what that does to the output."""
    weight_bits, activation_bits = part.bits(config)
    originals = {name: module.get_submodule(name) for name in part.names}
    transform: InputTransform
    if part.group is None:
        transform = data_free_transform(originals[part.names[0]].in_features, config, activation_bits)
        report = GroupReport(part.names, weight_bits, activation_bits, transform.rotation.kind, False, transform.clip)
    else:
        weights = {name: layer.weight.detach().cpu().float() for name, layer in originals.items()}
        transform, report = choose_transform(weights, part.group.stats, config, weight_bits, activation_bits)
    curvature = _curvature(part, transform, config, weight_bits)
    layers = {
        name: _quantize_layer(module, part, name, transform, config, weight_bits, curvature, report)
        for name in part.names
    }
    changes: dict[str, float] = {}
    if probe is not None:
        changes = {name: probe.measure(name, layer) for name, layer in layers.items()}
    elif config.is_mixed and part.group is not None:
        changes = _estimate_changes(part.group.stats, transform, layers, originals)
    for name, change in changes.items():
        errors = at_every_width(change, weight_bits, part.is_weight_only)
        report.predicted[name] = {str(bits): error for bits, error in errors.items()}
    return layers, report


def _estimate_changes(
    stats: ActivationStats, transform: InputTransform, layers: dict[str, QuantLinear], originals: dict[str, nn.Linear]
) -> dict[str, float]:
    """By layer, its estimated change of the output; only of layers whose gradients calibration saw."""
    offset = transform.input_offset
    if offset is None:
        offset = torch.zeros(transform.in_features, dtype=torch.float16)
    moment = stats.output_moment(offset)
    energies = {name: stats.gradient_energy(name) for name in layers}
    if moment is None or not float(moment.trace()) > 0:
        return {}
    return {
        name: estimate(layers[name], originals[name].weight, moment, energy)
        for name, energy in energies.items()
        if energy is not None
    }


def _change_bits(
    module: nn.Module, part: _Part, config: QuantizationConfig, layers: dict[str, QuantLinear], report: GroupReport,
    chosen: dict[str, int],
) -> tuple[dict[str, QuantLinear], GroupReport]:  # fmt: skip
    """The layers of a group at the chosen weight bits, their input transform as it is."""
    transform = layers[part.names[0]].input_transform
    bits = {name: chosen.get(name, layers[name].format.weight_bits) for name in part.names}
    report = dataclasses.replace(report, chosen_bits=bits)
    changed = [name for name in part.names if bits[name] != layers[name].format.weight_bits]
    if changed:
        curvature = _curvature(part, transform, config, min(bits[name] for name in changed))
        layers |= {
            name: _quantize_layer(module, part, name, transform, config, bits[name], curvature, report)
            for name in changed
        }
    return layers, report


def _curvature(
    part: _Part, transform: InputTransform, config: QuantizationConfig, weight_bits: int
) -> Curvature | None:
    """What compensated rounding needs; None where a layer of so many bits is rounded plainly."""
    if part.group is None or config.rounding != "compensated" or weight_bits == 8:
        return None
    return measure_curvature(transform, part.group.stats, part.bits(config)[1], config.damping)


def _quantize_layer(
    module: nn.Module, part: _Part, name: str, transform: InputTransform, config: QuantizationConfig, weight_bits: int,
    curvature: Curvature | None, report: GroupReport,
) -> QuantLinear:  # fmt: skip
    layer, owner = module.get_submodule(name), None if name == part.names[0] else part.names[0]
    return quantize_linear(
        name, layer.weight, layer.bias, transform, config, weight_bits, part.bits(config)[1], layer.weight.dtype, owner,
        curvature, report,
    )  # fmt: skip


def _restore(names: list[str], kept: tuple[dict, dict]) -> tuple[dict[str, QuantLinear], GroupReport]:
    """Layers and report of a group that an earlier run finished."""
    tensors, values = kept
    layers: dict[str, QuantLinear] = {}
    for name in names:
        layer = QuantLinear(LinearFormat.from_dict(values["formats"][name]))
        layer.load_state_dict({k.split(":", 1)[1]: t for k, t in tensors.items() if k.split(":", 1)[0] == name})
        if layer.format.input_from is not None:
            layer.share_input(layers[layer.format.input_from])
        layers[name] = layer
    return layers, GroupReport(**values["report"])
