"""The main job of one module: every group of layers fitted, bits chosen, nothing replaced."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lrqdit.calibration.runs import RunFolder
from lrqdit.calibration.statistics import ActivationStats
from lrqdit.calibration.steps import Calibration
from lrqdit.config import QuantizationConfig
from lrqdit.errors import LrqditError, ModelError, first_line
from lrqdit.fitting.bits import Probe, Rest, at_every_width, choose_bits, estimate
from lrqdit.fitting.compensate import measure_curvature
from lrqdit.fitting.layer import FittedInput, LinearLike, quantize_linear, quantize_without_data
from lrqdit.fitting.reports import GroupReport
from lrqdit.fitting.transform import choose_transform, data_free_transform
from lrqdit.models.registry import SMALLEST_PACKED_WEIGHTS, Plan, Treatment
from lrqdit.numerics.tokens import InputTransform
from lrqdit.packed.format import LinearFormat
from lrqdit.packed.linear import QuantLinear
from lrqdit.packed.pointwise import empty_layer

_LOG = logging.getLogger("lrqdit")
Fitted = tuple[dict[str, QuantLinear], GroupReport]


@dataclasses.dataclass(frozen=True)
class Part:
    """Layers that share an input and are treated alike; ``stats`` of that input, None without calibration."""

    names: list[str]
    stats: ActivationStats | None
    treatment: Treatment


@dataclasses.dataclass(frozen=True)
class Job:
    """One module to quantize. Its layers are only read; :meth:`run` returns what shall replace them.

    Args:
        name: of the module, for messages and progress.
        layers: its linear layers by name.
        plan: what becomes of each.
        config: how.
        rest: parameters and bytes of the module outside of the layers that are quantized.
        calibration: what was observed; None quantizes without data.
        probe: for ``sensitivity="measured"``, made of the module and the recorded steps.
        folder: where finished groups are kept, so that a killed run continues.
        show_progress: progress bars on stderr.
    """

    name: str
    layers: Mapping[str, LinearLike]
    plan: Plan
    config: QuantizationConfig
    rest: Rest
    calibration: Calibration | None = None
    probe: Probe | None = None
    folder: RunFolder | None = None
    show_progress: bool = True

    def run(self) -> tuple[dict[str, QuantLinear], list[GroupReport]]:
        """The quantized form of every layer that the plan does not leave as it is, and a report of each group."""
        config, replacements, reports = self.config, {}, []
        parts = self._parts()
        with self.probe or contextlib.nullcontext():
            for number, part in enumerate(tqdm(parts, f"quantizing {self.name}", disable=not self.show_progress)):
                layers, report = self._keep(f"group-{number}", part, lambda part=part: self._quantize(part))
                replacements.update(layers)
                reports.append(report)
        stored = {
            name: quantize_without_data(name, self.layers[name], treatment, config)
            for name, treatment in self.plan.items()
            if treatment.weight_bits < 16 and not treatment.is_fitted
        }
        if self.calibration is None or not config.is_mixed:
            return replacements | stored, reports
        predicted = {name: errors for report in reports for name, errors in report.predicted.items()}
        if not predicted and config.average_bits is not None:
            if not self.calibration.groups:
                raise ModelError(
                    f"average_bits: {self.name} never ran in the calibration, so what its layers' bits do is unknown; "
                    "run more steps, or quantize it by weight_bits alone"
                )
            raise ModelError(
                f"average_bits: calibration saw no gradients of {self.name} to estimate what its layers' bits do; set "
                "sensitivity='measured'"
            )
        changes = {name: {int(bits): error for bits, error in errors.items()} for name, errors in predicted.items()}
        formats = {name: layer.format for name, layer in (replacements | stored).items()}
        chosen = choose_bits(formats, changes, self.rest, config)
        for number, part in enumerate(tqdm(parts, f"choosing bits of {self.name}", disable=not self.show_progress)):
            layers, reports[number] = self._keep(
                f"chosen-{number}", part,
                lambda part=part, number=number: self._change_bits(
                    part, {name: replacements[name] for name in part.names}, reports[number], chosen
                ),
            )  # fmt: skip
            replacements.update(layers)
        return replacements | stored, reports

    def _parts(self) -> list[Part]:
        """Groups of layers as observed, split where layers of one input are treated differently, and layers that never
        ran, each by itself."""
        fitted = [name for name, treatment in self.plan.items() if treatment.is_fitted]
        pairs: list[tuple[list[str], ActivationStats | None]] = [([name], None) for name in fitted]
        if self.calibration is not None:
            seen = {name for group in self.calibration.groups for name in group.names}
            pairs = [(group.names, group.stats) for group in self.calibration.groups]
            pairs += [([name], None) for name in fitted if name not in seen]
        has_tokens = any(stats is not None and stats.tokens_a_picture > 1 for _, stats in pairs)
        parts = []
        for names, stats in pairs:
            is_modulation = has_tokens and stats is not None and stats.tokens_a_picture == 1
            treatments = {name: self._treatment(name, is_modulation) for name in names}
            for treatment in dict.fromkeys(treatments.values()):
                parts.append(Part([name for name in names if treatments[name] == treatment], stats, treatment))
        return parts

    def _treatment(self, name: str, is_modulation: bool) -> Treatment:
        """That of the plan; weight-only for a large layer that was seen to read one token of each picture."""
        is_large = self.layers[name].weight.numel() >= SMALLEST_PACKED_WEIGHTS
        return self.plan[name].as_weight_only() if is_modulation and is_large else self.plan[name]

    def _keep(self, key: str, part: Part, compute: Callable[[], Fitted]) -> Fitted:
        """What ``compute`` returns, or what an earlier run kept under ``key``."""
        kept = self.folder.load(key) if self.folder else None
        try:
            if kept:
                return _restore(part.names, *kept)
        except (LrqditError, KeyError, TypeError, RuntimeError) as error:
            _LOG.warning("%s is damaged and computed again: %s", key, first_line(error))
        layers, report = compute()
        if self.folder:
            tensors = {f"{n}:{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}
            formats = {n: layer.format.to_dict() for n, layer in layers.items()}
            self.folder.save(key, tensors, {"formats": formats, "report": dataclasses.asdict(report)})
        return layers, report

    def _quantize(self, part: Part) -> Fitted:
        """Choose the input transform of a part and quantize its layers; find out what that does to the output."""
        treatment, names = part.treatment, part.names
        bits = treatment.weight_bits, treatment.activation_bits
        transform: InputTransform
        if part.stats is None:
            transform = data_free_transform(self.layers[names[0]].weight.shape[1], self.config, bits[1])
            report = GroupReport(names, *bits, transform.rotation.kind, False, transform.clip)
        else:
            weights = {name: self.layers[name].weight.detach().cpu().float() for name in names}
            transform, report = choose_transform(weights, part.stats, self.config, *bits)
        layers = self._round(part, transform, dict.fromkeys(names, bits[0]), report)
        changes: dict[str, float] = {}
        if self.probe is not None and part.stats is not None:
            changes = {name: self.probe.measure(name, layer) for name, layer in layers.items()}
        elif part.stats is not None and self.config.is_mixed:
            changes = self._estimate_changes(part.stats, transform, layers)
        for name, change in changes.items():
            errors = at_every_width(change, bits[0], treatment.widths)
            report.predicted[name] = {str(width): error for width, error in errors.items()}
        return layers, report

    def _estimate_changes(
        self, stats: ActivationStats, transform: InputTransform, layers: dict[str, QuantLinear]
    ) -> dict[str, float]:
        """By layer, its estimated change of the output; only of layers whose gradients calibration saw."""
        zeros = torch.zeros(transform.in_features, dtype=torch.float32)
        moment = stats.output_moment(zeros if transform.input_offset is None else transform.input_offset)
        energies = {name: stats.gradient_energy(name) for name in layers}
        if moment is None or not float(moment.trace()) > 0:
            return {}
        return {
            name: estimate(layers[name], self.layers[name].weight, moment, energy)
            for name, energy in energies.items()
            if energy is not None
        }

    def _change_bits(
        self, part: Part, layers: dict[str, QuantLinear], report: GroupReport, chosen: dict[str, int]
    ) -> Fitted:
        """The layers of a part at the chosen weight bits, their input transform as it is."""
        transform = layers[part.names[0]].input_transform
        bits = {name: chosen.get(name, layers[name].format.weight_bits) for name in part.names}
        report = dataclasses.replace(report, chosen_bits=bits)
        changed = {name: width for name, width in bits.items() if width != layers[name].format.weight_bits}
        return layers | self._round(part, transform, changed, report), report

    def _round(
        self, part: Part, transform: InputTransform, bits: dict[str, int], report: GroupReport
    ) -> dict[str, QuantLinear]:
        """The layers of a part that ``bits`` names, at these weight bits."""
        curvature = None
        if part.stats is not None and self.config.rounding == "compensated" and min(bits.values(), default=8) < 8:
            activation_bits = part.treatment.activation_bits
            curvature = measure_curvature(transform, part.stats, activation_bits, self.config.damping)
        shared = FittedInput(transform, part.treatment.activation_bits, curvature, part.names[0])
        return {
            name: quantize_linear(name, self.layers[name], shared, width, self.config, report)
            for name, width in bits.items()
        }


def _restore(names: list[str], tensors: dict[str, Tensor], values: dict[str, Any]) -> Fitted:
    """Layers and report of a group that an earlier run finished."""
    layers: dict[str, QuantLinear] = {}
    for name in names:
        layer = empty_layer(LinearFormat.from_dict(values["formats"][name]))
        layer.load_state_dict({k.split(":", 1)[1]: t for k, t in tensors.items() if k.split(":", 1)[0] == name})
        if layer.format.input_from is not None:
            layer.share_input(layers[layer.format.input_from])
        layers[name] = layer
    return layers, GroupReport(**values["report"])
