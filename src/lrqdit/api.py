"""The public calls: observe a model on its denoising loop once; quantize it, in place."""

import contextlib
import dataclasses
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from lrqdit import native
from lrqdit.calibration.observer import Observer, Sampling, check_seen
from lrqdit.calibration.runs import RunFolder, describe_run
from lrqdit.calibration.steps import Calibration, StepRecorder, recorded_steps
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ConfigError, ModelError
from lrqdit.fitting.bits import Probe, Rest, check_budget
from lrqdit.fitting.job import Job
from lrqdit.fitting.layer import check_finite
from lrqdit.fitting.reports import CalibrationReport, GroupReport
from lrqdit.integrations import diffusers as diffusers_plugin
from lrqdit.integrations import has_transformers_5
from lrqdit.integrations.caches import renew_cache, without_caches
from lrqdit.integrations.generation import pipeline_loop
from lrqdit.integrations.preparation import prepare, unwrap
from lrqdit.integrations.records import Record, check_records
from lrqdit.kernels import cpu_attention as attention
from lrqdit.models import registry as models
from lrqdit.models.prompts import CALIBRATION_PROMPTS
from lrqdit.numerics.codebook import CODEBOOKS
from lrqdit.packed import checkpoint
from lrqdit.packed.linear import QuantLinear
from lrqdit.packed.size import measure_size

_LOG = logging.getLogger("lrqdit")
GRADIENT_EVERY = 2  # calls of a module that are not held out
Components = Mapping[str, str | QuantizationConfig | None]  # a preset or configuration by name of a transformer
HELD_OUT_EVERY = 8  # prompts, or calls of a module that a forward loop of the caller's runs


def quantize(
    target: nn.Module | DiffusionPipeline,
    preset: str | QuantizationConfig = "w4a8",
    *,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    forward_loop: Callable[[Any], object] | None = None,
    components: Components | None = None,
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
        target: a diffusers pipeline (all of its transformers that denoise) or a module.
        preset: such as ``"w4a8"``, or a whole :class:`QuantizationConfig`.
        prompts: calibration prompts, for a pipeline; 32 of our own if neither these nor ``forward_loop`` is given. Each
            is a text, or a dictionary of arguments of the pipeline's call, with a ``prompt`` and, where the pipeline
            takes pictures, paths of files or pictures under their arguments' names: ``{"prompt": "make it snow",
            "image": "house.png"}``. ``seed`` sets the noise.
        forward_loop: called once with ``target``; runs whatever shall be observed. Required for a plain module.
        components: by name of a pipeline's transformer, a preset or a whole configuration of its own, or None to leave
            it as it is; ``{"transformer_2": "w3a8"}``.
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
        ModelError: if nothing can be quantized, something is quantized already, or no layer ran. Layers that alone did
            not run are quantized without data; the log and the report name them.
        NumericalError: for NaN or Inf in weights or calibration activations.
    """
    config = _build_config(preset, settings)
    # a library or a variable at fault is an error now, not after the calibration
    native.is_available()
    attention.why_not_by_default()
    modules, dtypes = _find_modules(target, components), stored_dtypes or {}
    configs = _module_configs(config, modules, components, settings)
    plans = {name: models.plan(module, configs[name]) for name, module in modules.items()}
    layers = {name: models.linear_layers(module) for name, module in modules.items()}
    rests = {name: Rest.of(module, plans[name], dtypes.get(name)) for name, module in modules.items()}
    for name in modules:
        if configs[name].average_bits is not None:
            if not is_calibrated:
                raise ConfigError(
                    "average_bits needs calibration: it must know what each layer's bits do to the output"
                )
            check_budget(layers[name], plans[name], rests[name], configs[name])
    if is_calibrated and calibration is None and forward_loop is None:
        prompts = _check_prompts(target, prompts, arguments)
    for name, plan in plans.items():
        for layer_name, treatment in plan.items():
            if treatment != models.KEPT:
                check_finite(layer_name, layers[name][layer_name])
    if is_calibrated and calibration is not None:
        _check_calibration(calibration, layers)
    start = time.monotonic()
    bytes_before = sum(p.numel() * p.element_size() for module in modules.values() for p in module.parameters())
    parameters = sum(p.numel() for module in modules.values() for p in module.parameters())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # there are no gradients in it
        stack.enter_context(without_caches(modules.values()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks see every layer of compiled models
        folders: dict[str, RunFolder] = {}
        if resume_folder is not None:
            for name, module in modules.items():
                marks = describe_run(
                    module, component=name, **configs[name].to_dict(), prompts=list(prompts or []), steps=steps,
                    guidance_scale=guidance_scale, arguments=arguments, is_calibrated=is_calibrated,
                    stored_dtypes=stored_dtypes,
                )  # fmt: skip
                folders[name] = stack.enter_context(RunFolder(Path(resume_folder) / name, marks))
        observed: dict[str, Calibration] = {} if calibration is None else calibration
        if is_calibrated and calibration is None:
            kept = {name: found for name, folder in folders.items() if (found := folder.load_calibration()) is not None}
            observed = kept if kept.keys() == modules.keys() else observe(
                target, config, prompts=prompts, forward_loop=forward_loop, components=components, steps=steps,
                guidance_scale=guidance_scale, arguments=arguments, show_progress=show_progress,
            )  # fmt: skip
            for name, folder in folders.items() if observed is not kept else ():
                folder.save_calibration(observed[name])
        calibrated = time.monotonic()
        reports: list[GroupReport] = []
        # nothing is replaced before everything is fitted: a failed run leaves the model as it was
        replacements: dict[str, dict[str, QuantLinear]] = {}
        for name, module in modules.items():
            found, own = observed.get(name), configs[name]
            is_measured = found and found.groups and own.is_mixed and own.sensitivity == "measured"
            probe = Probe.of(module, found.steps) if found and is_measured else None
            job = Job(name, layers[name], plans[name], own, rests[name], found, probe, folders.get(name), show_progress)
            replacements[name], module_reports = job.run()
            reports += module_reports
    for name, module in modules.items():
        for layer_name, layer in replacements[name].items():
            original = layers[name][layer_name]
            layer.train(original.training)
            module.set_submodule(layer_name, layer.to(device=original.weight.device, dtype=original.weight.dtype))
        checkpoint.finish_layers(module)
        renew_cache(module)
        _attach(module, configs[name])
    attention.start()
    size = measure_size(nn.ModuleDict({name.replace(".", "_"): module for name, module in modules.items()}))
    times = calibrated - start, time.monotonic() - calibrated
    return CalibrationReport(config, reports, size, parameters, bytes_before, *times)


def _check_calibration(calibration: Any, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless a calibration is of these modules."""
    advice = "pass what lrqdit.observe returned for this very pipeline or module"
    if not isinstance(calibration, Mapping) or not all(isinstance(c, Calibration) for c in calibration.values()):
        raise ConfigError(f"calibration is a {type(calibration).__name__} of something else; {advice}")
    for name, found in layers.items():
        if name not in calibration:
            raise ConfigError(f"calibration has {', '.join(calibration) or 'nothing'}, but no {name}; {advice}")
        for group in calibration[name].groups:
            for layer in group.names:
                width = len(group.stats.channel_sum)
                if layer not in found or found[layer].weight.shape[1] != width:
                    raise ConfigError(f"calibration saw {name}.{layer} read {width} channels, another model; {advice}")


def _attach(module: nn.Module, config: QuantizationConfig) -> None:
    """Leave on a quantized module what saving it reads."""
    transformers = sys.modules.get("transformers")  # whoever has a model of it has imported it
    if isinstance(module, ConfigMixin):
        diffusers_plugin.attach(module, config)
    elif transformers is not None and isinstance(module, transformers.PreTrainedModel):
        if has_transformers_5():
            from lrqdit.integrations import transformers as transformers_plugin

            transformers_plugin.attach(module, config)
        else:
            _LOG.warning("save %s by lrqdit.save_checkpoint, or install transformers 5", type(module).__name__)
    vars(module)["lrqdit_settings"] = config.to_dict()


def _build_config(preset: str | QuantizationConfig, settings: dict[str, Any]) -> QuantizationConfig:
    if isinstance(preset, QuantizationConfig):
        config = QuantizationConfig.from_dict({**preset.to_dict(), **settings})
    else:
        config = QuantizationConfig.from_name(preset, **settings)
    if config.codebook not in CODEBOOKS:  # the configuration is free of torch and cannot know
        raise ConfigError(f"codebook={config.codebook!r} is not supported; use one of {', '.join(CODEBOOKS)}")
    return config


def _find_modules(target: Any, components: Components | None) -> dict[str, nn.Module]:
    """The modules to quantize by name, ready for it."""
    if isinstance(target, nn.Module):
        modules = {type(unwrap(target)).__name__: unwrap(target)}
    elif isinstance(target, DiffusionPipeline):
        modules = {name: unwrap(module) for name, module in models.denoisers(target).items()}
    else:
        raise ModelError(f"quantize: a {type(target).__name__} is neither a diffusers pipeline nor a torch module")
    if not modules:
        raise ModelError(
            f"quantize: {type(target).__name__} has no diffusion transformer; pass the module that denoises, with a "
            "forward_loop"
        )
    if unknown := sorted((components or {}).keys() - modules.keys()):
        raise ConfigError(f"components: there is no {unknown[0]} to quantize; there is {', '.join(modules)}")
    modules = {name: module for name, module in modules.items() if (components or {}).get(name, "") is not None}
    if not modules:
        raise ConfigError("components: nothing is left to quantize")
    for name, module in modules.items():
        diffusers_plugin.check_not_quantized(module, name)
        prepare(name, module)
    return modules


def _module_configs(
    config: QuantizationConfig, modules: Mapping[str, nn.Module], components: Components | None,
    settings: dict[str, Any],
) -> dict[str, QuantizationConfig]:  # fmt: skip
    """The configuration of each module; of patterns to exclude those that match something in it."""
    configs = {}
    for name in modules:
        own = (components or {}).get(name)
        configs[name] = config if own is None else _build_config(own, settings if isinstance(own, str) else {})
    names = {name: list(models.linear_layers(module)) for name, module in modules.items()}
    for name, own in configs.items():
        others = [layer for other in names if other != name for layer in names[other]]
        matching = tuple(
            pattern
            for pattern in own.exclude
            if any(re.search(pattern, layer) for layer in names[name])
            or not any(re.search(pattern, layer) for layer in others)  # of no module: the plan says so
        )
        configs[name] = dataclasses.replace(own, exclude=matching)
    return configs


def observe(
    target: nn.Module | DiffusionPipeline,
    preset: str | QuantizationConfig = "w4a8",
    *,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    forward_loop: Callable[[Any], object] | None = None,
    components: Components | None = None,
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
    modules = _find_modules(target, components)
    configs = _module_configs(config, modules, components, settings)
    held_out_every = HELD_OUT_EVERY if forward_loop is not None else 0
    moment_bytes = int(config.moment_gib * 2**30) if config.rounding == "compensated" else 0
    has_gradients = config.rounding == "compensated" and config.hessian == "output"
    sampling = Sampling(
        config.calibration_tokens, config.seed, moment_bytes // len(modules), held_out_every,
        GRADIENT_EVERY if has_gradients else 0,
    )  # fmt: skip
    observers = {
        name: Observer(module, tuple(n for n, t in models.plan(module, configs[name]).items() if t.is_fitted), sampling)
        for name, module in modules.items()
    }
    if forward_loop is None:
        prompts = _check_prompts(target, prompts, arguments)
        every = min(math.ceil(len(prompts) / batch_size), HELD_OUT_EVERY)

        def hold_out(index: int) -> None:
            for observer in observers.values():
                observer.is_held_out = every >= HELD_OUT_EVERY // 2 and index % every == every - 1

        forward_loop = pipeline_loop(
            prompts, steps, guidance_scale, arguments, config.seed, show_progress, hold_out, batch_size
        )
    recorders = {
        name: StepRecorder(config.seed, lambda observer=observer: observer.is_held_out, observer.end_step)
        for name, observer in observers.items()
    }
    attention.start()  # now, so that a process's first calibration sees what later ones see
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_caches(modules.values()))
        for observer in observers.values():
            stack.enter_context(observer)
        stack.enter_context(recorded_steps(modules, getattr(target, "scheduler", None), recorders))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks see every layer of compiled models
        forward_loop(target)
    check_seen(observers)
    return {name: Calibration(observer.groups(), recorders[name].steps()) for name, observer in observers.items()}


def _check_prompts(
    target: Any, prompts: Sequence[str | Mapping[str, Any]] | None, arguments: Mapping[str, Any] | None
) -> list[Record]:
    """The calibration's records: those given, or our prompts."""
    if not isinstance(target, DiffusionPipeline):
        raise ModelError(
            f"quantize: a {type(target).__name__} is not a pipeline, so lrqdit cannot run it; pass forward_loop, a "
            "function that runs it on your data, or is_calibrated=False"
        )
    return check_records(target, CALIBRATION_PROMPTS if prompts is None else prompts, arguments)
