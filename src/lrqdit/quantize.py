"""The main job: calibrate a model on its denoising loop, quantize its linear layers group by group, replace them."""

import dataclasses
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from tqdm.auto import tqdm

from lrqdit import checkpoint, diffusers_plugin, models
from lrqdit.accounting import SizeReport, measure_size
from lrqdit.activation import InputTransform
from lrqdit.calibrate import InputGroup, Observer
from lrqdit.codebook import CODEBOOKS
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ConfigError, ModelError
from lrqdit.fit import GroupReport, check_finite, choose_transform, data_free_transform, keep_at_8_bits, quantize_linear
from lrqdit.linear import QuantLinear


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
    **settings: Any,
) -> CalibrationReport:
    """Quantize a pipeline's transformers, or any module with linear layers, in place.

    Args:
        target: a diffusers pipeline (its ``transformer`` and ``transformer_2``) or a module.
        preset: such as ``"w4a8"``, or a whole :class:`QuantizationConfig`.
        prompts: calibration prompts, for a pipeline; eight of our own if neither these nor ``forward_loop`` is given.
        forward_loop: called once with ``target``; runs whatever shall be observed. Required for a plain module.
        is_calibrated: False quantizes without data: Hadamard rotations, no smoothing, no centring.
        steps, guidance_scale: of the calibration's denoising loop; the pipeline's own defaults if None.
        arguments: further arguments of the pipeline's call.
        resume_folder: where finished parts are kept, so that a killed run continues; remove it when the result is
            saved. It is reused for the same model, settings, prompts and arguments; what ``forward_loop`` does cannot
            be seen, so give other data another folder.
        show_progress: progress bars on stderr.
        settings: single settings of :class:`QuantizationConfig`, such as ``mode="paper"`` or ``seed=1``.

    Returns:
        The calibration report.

    Raises:
        ConfigError: for a bad preset or setting.
        ModelError: if nothing can be quantized, something is quantized already, or a layer never ran.
        NumericalError: for NaN or Inf in weights or calibration activations.
    """
    config = _build_config(preset, settings)
    modules = _find_modules(target)
    for name, module in modules.items():
        diffusers_plugin.check_not_quantized(module, name)
    selections = {name: models.select_layers(module, config.exclude) for name, module in modules.items()}
    if forward_loop is None and is_calibrated:
        if not isinstance(target, DiffusionPipeline):
            raise ModelError(
                f"quantize: a {type(target).__name__} is not a pipeline, so lrqdit cannot run it; pass forward_loop, a "
                "function that runs it on your data, or is_calibrated=False"
            )
        prompts = list(models.CALIBRATION_PROMPTS if prompts is None else prompts)
        if not prompts:
            raise ConfigError("quantize: the list of calibration prompts is empty; pass at least one, better eight")
        forward_loop = pipeline_loop(prompts, steps, guidance_scale, arguments, config.seed, show_progress)
    run_folders: dict[str, checkpoint.RunFolder] = {}
    if resume_folder is not None:
        inputs = (config.to_dict(), list(prompts or []), steps, guidance_scale, arguments, is_calibrated)
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
    groups: dict[str, list[InputGroup]] = {}
    if is_calibrated and forward_loop is not None:
        groups = _calibrate(target, modules, selections, config, forward_loop, run_folders)
    calibrated = time.monotonic()
    reports: list[GroupReport] = []
    # nothing is replaced before everything is fitted: a failed run leaves the model as it was
    replacements: dict[str, dict[str, QuantLinear]] = {}
    for name, module in modules.items():
        replacements[name], module_reports = _quantize_module(
            name, module, selections[name], groups.get(name), config, run_folders.get(name), show_progress
        )
        reports += module_reports
    for name, module in modules.items():
        for layer_name, layer in replacements[name].items():
            original = module.get_submodule(layer_name)
            layer.train(original.training)
            module.set_submodule(layer_name, layer.to(device=original.weight.device, dtype=original.weight.dtype))
        checkpoint.tie_shared_inputs(module)
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
) -> Callable[[DiffusionPipeline], None]:
    """A forward loop that generates every prompt once, on noise of its own, and stops before the decoder."""

    def loop(pipeline: DiffusionPipeline) -> None:
        accepted = inspect.signature(pipeline.__call__).parameters
        call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"}
        call = {name: value for name, value in call.items() if value is not None and name in accepted}
        call |= models.call_arguments(pipeline) | (arguments or {})
        had_progress = dict(getattr(pipeline, "_progress_bar_config", {}))
        pipeline.set_progress_bar_config(disable=True)
        try:
            for index, prompt in enumerate(tqdm(prompts, "calibrating", disable=not show_progress, unit="prompt")):
                generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + index)
                pipeline(prompt=prompt, generator=generator, **call)
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


def _calibrate(
    target: Any,
    modules: dict[str, nn.Module],
    selections: dict[str, models.Selection],
    config: QuantizationConfig,
    forward_loop: Callable[[Any], object],
    run_folders: dict[str, checkpoint.RunFolder],
) -> dict[str, list[InputGroup]]:
    """Run the forward loop once with all modules observed, or read what an earlier run kept."""
    kept = {name: folder.load_groups() for name, folder in run_folders.items()}
    if kept and all(groups is not None for groups in kept.values()):
        return {name: groups for name, groups in kept.items() if groups is not None}
    observers = {
        name: Observer(module, selections[name].quantized + selections[name].weight_only,
                       config.calibration_tokens, config.seed)
        for name, module in modules.items()
    }  # fmt: skip
    for observer in observers.values():
        observer.__enter__()
    try:
        with torch.no_grad():
            forward_loop(target)
    finally:
        for observer in observers.values():
            observer.__exit__(None, None, None)
    groups = {name: observer.groups() for name, observer in observers.items()}
    for name, folder in run_folders.items():
        folder.save_groups(groups[name])
    return groups


def _quantize_module(
    component: str,
    module: nn.Module,
    selection: models.Selection,
    groups: list[InputGroup] | None,
    config: QuantizationConfig,
    run_folder: checkpoint.RunFolder | None,
    show_progress: bool,
) -> tuple[dict[str, QuantLinear], list[GroupReport]]:
    """The quantized form of every selected layer of a module, by name; the module itself is only read."""
    weight_only = set(selection.weight_only)
    names = [group.names for group in groups] if groups else [[n] for n in selection.quantized + selection.weight_only]
    # layers that share an input but are treated differently cannot share its codes
    parts = [(index, [n for n in group if (n in weight_only) == flag]) for index, group in enumerate(names)
             for flag in (False, True)]  # fmt: skip
    replacements: dict[str, QuantLinear] = {}
    reports = []
    for number, (index, members) in enumerate(tqdm(parts, f"quantizing {component}", disable=not show_progress)):
        if not members:
            continue
        kept = run_folder.load(f"group-{number}") if run_folder else None
        layers, report = _restore(members, kept) if kept else _quantize_group(
            module, members, groups[index] if groups else None, config, members[0] in weight_only
        )  # fmt: skip
        if run_folder and not kept:
            tensors = {f"{n}:{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}
            formats = {n: layer.format.to_dict() for n, layer in layers.items()}
            run_folder.save(f"group-{number}", tensors, {"formats": formats, "report": dataclasses.asdict(report)})
        replacements.update(layers)
        reports.append(report)
    for name in models.layers_stored_at_8_bits(module, selection, config):
        replacements[name] = keep_at_8_bits(name, module.get_submodule(name), config)
    return replacements, reports


def _quantize_group(
    module: nn.Module, members: list[str], group: InputGroup | None, config: QuantizationConfig, is_weight_only: bool
) -> tuple[dict[str, QuantLinear], GroupReport]:
    """Choose the group's input transform and quantize its layers with it."""
    weight_bits = max(4, config.weight_bits) if is_weight_only else config.weight_bits
    activation_bits = 16 if is_weight_only else config.activation_bits
    originals = {name: module.get_submodule(name) for name in members}
    transform: InputTransform
    if group is None:
        transform = data_free_transform(originals[members[0]].in_features, config, activation_bits)
        report = GroupReport(members, weight_bits, activation_bits, transform.rotation.kind, False, transform.clip)
    else:
        weights = {name: layer.weight.detach().cpu().float() for name, layer in originals.items()}
        transform, report = choose_transform(weights, group.stats, config, weight_bits, activation_bits)
    layers = {}
    for name, layer in originals.items():
        owner = None if name == members[0] else members[0]
        layers[name] = quantize_linear(
            name, layer.weight, layer.bias, transform, config, weight_bits, activation_bits, layer.weight.dtype, owner,
            None if group is None else group.stats.tokens, report,
        )  # fmt: skip
    return layers, report


def _restore(members: list[str], kept: tuple[dict, dict]) -> tuple[dict[str, QuantLinear], GroupReport]:
    """Layers and report of a group that an earlier run finished."""
    tensors, values = kept
    layers = {}
    for name in members:
        layer = QuantLinear(checkpoint.LinearFormat.from_dict(values["formats"][name]))
        layer.load_state_dict({k.split(":", 1)[1]: t for k, t in tensors.items() if k.split(":", 1)[0] == name})
        layers[name] = layer
    return layers, GroupReport(**values["report"])
