"""The main job: calibrate a model on its denoising loop, quantize its linear layers group by group, replace them."""

import contextlib
import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from tqdm.auto import tqdm

from lrqdit import attention, checkpoint, diffusers_plugin, models
from lrqdit.accounting import SizeReport, measure_size
from lrqdit.activation import InputTransform
from lrqdit.calibrate import ActivationStats, InputGroup, Observer
from lrqdit.codebook import CODEBOOKS
from lrqdit.compensate import Curvature, measure_curvature
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ConfigError, ModelError
from lrqdit.fit import GroupReport, check_finite, choose_transform, data_free_transform, keep_at_8_bits, quantize_linear
from lrqdit.linear import LinearFormat, QuantLinear
from lrqdit.recording import Calibration, StepRecorder, recorded_steps
from lrqdit.sensitivity import Probe, at_every_width, choose_bits, estimate, options

GRADIENT_EVERY = 2  # calls of a module that are not held out
HELD_OUT_EVERY = 8  # prompts, or calls of a module that a forward loop of the caller's runs


@dataclasses.dataclass
class CalibrationReport:
    """What :func:`quantize` did: one :class:`GroupReport` per layer input, sizes, and the time it took."""

    config: QuantizationConfig
    groups: list[GroupReport]
    size: SizeReport
    parameters_before: int
    bytes_before: int
    calibration_seconds: float
    quantization_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        return {
            "preset": self.config.preset,
            "config": self.config.to_dict(),
            "size": self.size.to_dict(),
            "bytes_before": self.bytes_before,
            "calibration_seconds": self.calibration_seconds,
            "quantization_seconds": self.quantization_seconds,
            "layers": [group.to_dict() for group in self.groups],
        }


def quantize(
    target: nn.Module | DiffusionPipeline,
    preset: str | QuantizationConfig = "w4a8",
    *,
    prompts: Sequence[str] | None = None,
    forward_loop: Callable[[Any], object] | None = None,
    is_calibrated: bool = True,
    steps: int | None = None,
    guidance_scale: float | None = None,
    arguments: dict[str, Any] | None = None,
    resume_folder: str | Path | None = None,
    show_progress: bool = True,
    calibration: dict[str, Calibration] | None = None,
    stored_dtypes: Mapping[str, torch.dtype] | None = None,
    **settings: Any,
) -> CalibrationReport:
    """Quantize a pipeline's transformers, or any module with linear layers, in place.

    Args:
        target: a diffusers pipeline (its ``transformer`` and ``transformer_2``) or a module.
        preset: such as ``"w4a8"``, or a whole :class:`QuantizationConfig`.
        prompts: calibration prompts, for a pipeline; 32 of our own if neither these nor ``forward_loop`` is given.
        forward_loop: called once with ``target``; runs whatever shall be observed. Required for a plain module.
        is_calibrated: False quantizes without data: Hadamard rotations, no smoothing, no centring.
        steps, guidance_scale: of the calibration's denoising loop; the pipeline's own defaults if None.
        arguments: further arguments of the pipeline's call.
        resume_folder: where finished parts are kept, so that a killed run continues; remove it when the result is
            saved. It is reused for the same model, settings, prompts and arguments; what ``forward_loop`` does cannot
            be seen, so give other data another folder.
        show_progress: progress bars on stderr.
        calibration: what :func:`observe` returned for the same model, to quantize it in several ways from one
            calibration; nothing is run then.
        stored_dtypes: by name of the module, the dtype its float tensors will be saved in, where that is narrower than
            theirs; ``average_bits`` counts them so.
        settings: single settings of :class:`QuantizationConfig`, such as ``mode="paper"``, ``seed=1`` or
            ``average_bits=3.5`` (3.5 true bits per parameter in all).

    Returns:
        The calibration report.

    Raises:
        ConfigError: for a bad preset or setting, or ``average_bits`` below what can be reached or without calibration.
        ModelError: if nothing can be quantized, something is quantized already, or a layer never ran.
        NumericalError: for NaN or Inf in weights or calibration activations.
    """
    config = _build_config(preset, settings)
    modules = _find_modules(target)
    for name, module in modules.items():
        diffusers_plugin.check_not_quantized(module, name)
    selections = {name: models.select_layers(module, config.exclude) for name, module in modules.items()}
    if config.average_bits is not None:
        if not is_calibrated:
            raise ConfigError("average_bits needs calibration: it must know what each layer's bits do to the output")
        for name, module in modules.items():
            _check_budget(module, selections[name], config, (stored_dtypes or {}).get(name))
    is_observed = is_calibrated and calibration is None
    if is_observed and forward_loop is None:
        prompts = _check_prompts(target, prompts)
    run_folders: dict[str, checkpoint.RunFolder] = {}
    if resume_folder is not None:
        inputs = (
            config.to_dict(), list(prompts or []), steps, guidance_scale, arguments, is_calibrated, stored_dtypes,
        )  # fmt: skip
        for name, module in modules.items():
            mark = checkpoint.fingerprint(checkpoint.FORMAT_VERSION, name, *inputs, module=module)
            run_folders[name] = checkpoint.RunFolder(Path(resume_folder) / name, mark)

    for name, module in modules.items():
        stored = selections[name].quantized + selections[name].weight_only
        stored += models.layers_stored_at_8_bits(module, selections[name], config)
        for layer_name in stored:
            layer = module.get_submodule(layer_name)
            check_finite(layer_name, layer.weight, layer.bias)
    start = time.monotonic()
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    bytes_before = sum(p.numel() * p.element_size() for module in modules.values() for p in module.parameters())
    observed: dict[str, Calibration] = calibration or {}
    kept = {name: folder.load_calibration() for name, folder in run_folders.items()}
    if is_observed and kept and all(found is not None for found in kept.values()):
        observed = {name: found for name, found in kept.items() if found is not None}
    elif is_observed:
        observed = observe(
            target, config, prompts=prompts, forward_loop=forward_loop, steps=steps, guidance_scale=guidance_scale,
            arguments=arguments, show_progress=show_progress,
        )  # fmt: skip
        for name, folder in run_folders.items():
            folder.save_calibration(observed[name])
    calibrated = time.monotonic()
    reports: list[GroupReport] = []
    # nothing is replaced before everything is fitted: a failed run leaves the model as it was
    replacements: dict[str, dict[str, QuantLinear]] = {}
    for name, module in modules.items():
        replacements[name], module_reports = _quantize_module(
            name, module, selections[name], observed.get(name), config, run_folders.get(name), show_progress,
            (stored_dtypes or {}).get(name),
        )  # fmt: skip
        reports += module_reports
    for name, module in modules.items():
        for layer_name, layer in replacements[name].items():
            original = module.get_submodule(layer_name)
            layer.train(original.training)
            module.set_submodule(layer_name, layer.to(device=original.weight.device, dtype=original.weight.dtype))
        checkpoint.finish_layers(module)
        if isinstance(module, ConfigMixin):
            diffusers_plugin.attach(module, config)
        else:
            module.lrqdit_settings = config.to_dict()
    size = measure_size(nn.ModuleDict({name.replace(".", "_"): module for name, module in modules.items()}))
    return CalibrationReport(
        config, reports, size, sum(parameters.values()), bytes_before, calibrated - start, time.monotonic() - calibrated
    )


def pipeline_loop(
    prompts: Sequence[str],
    steps: int | None = None,
    guidance_scale: float | None = None,
    arguments: dict[str, Any] | None = None,
    seed: int = 0,
    show_progress: bool = True,
    on_prompt: Callable[[int], object] = lambda index: None,
    batch_size: int = 1,
) -> Callable[[DiffusionPipeline], None]:
    """A forward loop that generates every prompt once, on noise of its own, and stops before the decoder.

    ``on_prompt`` is called with the index of each batch before it runs; ``batch_size`` prompts run together.
    """

    def loop(pipeline: DiffusionPipeline) -> None:
        accepted = inspect.signature(pipeline.__call__).parameters
        call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"}
        call = {name: value for name, value in call.items() if value is not None and name in accepted}
        call |= models.call_arguments(pipeline) | (arguments or {})
        had_progress = dict(getattr(pipeline, "_progress_bar_config", {}))
        pipeline.set_progress_bar_config(disable=True)
        try:
            for start in tqdm(range(0, len(prompts), batch_size), "calibrating", disable=not show_progress):
                on_prompt(start // batch_size)
                batch = list(prompts[start : start + batch_size])
                generators = [
                    torch.Generator("cpu").manual_seed(seed * 1_000_003 + start + i) for i in range(len(batch))
                ]
                if batch_size == 1:
                    pipeline(prompt=batch[0], generator=generators[0], **call)
                else:
                    pipeline(prompt=batch, generator=generators, **call)
        finally:
            pipeline.set_progress_bar_config(**{"disable": False, **had_progress})

    return loop


def _build_config(preset: str | QuantizationConfig, settings: dict[str, Any]) -> QuantizationConfig:
    if isinstance(preset, QuantizationConfig):
        config = QuantizationConfig.from_dict({**preset.to_dict(), **settings})
    else:
        config = QuantizationConfig.from_name(preset, **settings)
    if config.codebook not in CODEBOOKS:  # the configuration is free of torch and cannot know
        raise ConfigError(f"codebook={config.codebook!r} is not supported; use one of {', '.join(CODEBOOKS)}")
    return config


def _find_modules(target: Any) -> dict[str, nn.Module]:
    """The modules to quantize by name."""
    if isinstance(target, nn.Module):
        return {type(target).__name__: target}
    if not isinstance(target, DiffusionPipeline):
        raise ModelError(f"quantize: a {type(target).__name__} is neither a diffusers pipeline nor a torch module")
    found = {name: getattr(target, name, None) for name in models.PIPELINE_COMPONENTS}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise ModelError(
            f"quantize: {type(target).__name__} has no {' or '.join(models.PIPELINE_COMPONENTS)}; pass the module that "
            "denoises, with a forward_loop"
        )
    return modules


def observe(
    target: nn.Module | DiffusionPipeline,
    preset: str | QuantizationConfig = "w4a8",
    *,
    prompts: Sequence[str] | None = None,
    forward_loop: Callable[[Any], object] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    arguments: dict[str, Any] | None = None,
    show_progress: bool = True,
    batch_size: int = 1,
    **settings: Any,
) -> dict[str, Calibration]:
    """Run a model once and return what was seen, by name of the module; the model stays as it is.

    That is the statistics of its layers' inputs, and a few of its denoising steps, which ``average_bits`` measures on.

    Arguments and errors as for :func:`quantize`, whose ``calibration`` the result is. Of the preset only ``seed``,
    ``calibration_tokens``, ``moment_gib``, ``rounding``, ``hessian`` and ``exclude`` matter here. ``batch_size``
    prompts run together, which small models are faster with. Every eighth batch is held out (the last one of four to
    seven); without prompts, every eighth call of the module.
    """
    config = _build_config(preset, settings)
    modules = _find_modules(target)
    held_out_every = HELD_OUT_EVERY if forward_loop is not None else 0
    selections = {name: models.select_layers(module, config.exclude) for name, module in modules.items()}
    moment_bytes = int(config.moment_gib * 2**30) if config.rounding == "compensated" else 0
    has_gradients = config.rounding == "compensated" and config.hessian == "output"
    observers = {
        name: Observer(
            module, selections[name].quantized + selections[name].weight_only, config.calibration_tokens, config.seed,
            moment_bytes // len(modules), held_out_every, GRADIENT_EVERY if has_gradients else 0,
        )
        for name, module in modules.items()
    }  # fmt: skip
    if forward_loop is None:
        prompts = _check_prompts(target, prompts)
        every = min(math.ceil(len(prompts) / batch_size), HELD_OUT_EVERY)

        def hold_out(index: int) -> None:
            for observer in observers.values():
                observer.is_held_out = every >= HELD_OUT_EVERY // 2 and index % every == every - 1

        forward_loop = pipeline_loop(
            prompts, steps, guidance_scale, arguments, config.seed, show_progress, hold_out, batch_size
        )
    recorders = {
        name: StepRecorder(config.seed, lambda observer=observer: observer.is_held_out)
        for name, observer in observers.items()
    }
    attention.start()  # now, so that a process's first calibration sees what later ones see
    with contextlib.ExitStack() as stack:
        for observer in observers.values():
            stack.enter_context(observer)
        stack.enter_context(recorded_steps(modules, getattr(target, "scheduler", None), recorders))
        stack.enter_context(torch.no_grad())
        forward_loop(target)
    return {name: Calibration(observer.groups(), recorders[name].steps()) for name, observer in observers.items()}


def _check_prompts(target: Any, prompts: Sequence[str] | None) -> list[str]:
    """The calibration prompts: those given, or ours."""
    if not isinstance(target, DiffusionPipeline):
        raise ModelError(
            f"quantize: a {type(target).__name__} is not a pipeline, so lrqdit cannot run it; pass forward_loop, a "
            "function that runs it on your data, or is_calibrated=False"
        )
    prompts = list(models.CALIBRATION_PROMPTS if prompts is None else prompts)
    if not prompts:
        raise ConfigError("quantize: the list of calibration prompts is empty; pass at least one, better 32")
    return prompts


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

    def __init__(self, folder: checkpoint.RunFolder | None) -> None:
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


def _quantize_module(
    component: str,
    module: nn.Module,
    selection: models.Selection,
    calibration: Calibration | None,
    config: QuantizationConfig,
    run_folder: checkpoint.RunFolder | None,
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
    offset = torch.zeros(transform.in_features) if transform.input_offset is None else transform.input_offset
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


def _check_budget(
    module: nn.Module, selection: models.Selection, config: QuantizationConfig, dtype: torch.dtype | None
) -> None:
    """Raise before anything runs if ``average_bits`` cannot be reached even by layers without input transforms.

    What the error names then leaves room for them. The budget is checked exactly once they are known.
    """
    names = [(name, False) for name in selection.quantized] + [(name, True) for name in selection.weight_only]
    predicted = {name: dict.fromkeys(options(is_weight_only), 0.0) for name, is_weight_only in names}

    def choose(has_transform: bool) -> None:
        def layout(name: str, has_transform: bool) -> LinearFormat:
            layer = module.get_submodule(name)
            return LinearFormat(
                layer.in_features, layer.out_features, 8, 16, table_rows=0,
                has_bias=layer.bias is not None or has_transform, has_original_bias=layer.bias is not None,
                has_offset=has_transform, has_scale=has_transform,
            )  # fmt: skip

        kept = {name: layout(name, False) for name in models.layers_stored_at_8_bits(module, selection, config)}
        choose_bits(module, {name: layout(name, has_transform) for name in predicted}, predicted, kept, config, dtype)

    try:
        choose(has_transform=False)
    except ConfigError:
        choose(has_transform=True)
