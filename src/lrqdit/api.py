"""The public calls: observe a model on its denoising loop once; quantize it, in place."""

import contextlib
import math
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
from lrqdit.fitting.bits import Probe, Rest, check_budget, check_observed
from lrqdit.fitting.job import Job
from lrqdit.fitting.layer import check_finite
from lrqdit.fitting.reports import CalibrationReport, GroupReport
from lrqdit.integrations import diffusers as diffusers_plugin
from lrqdit.integrations.caches import renew_cache, without_caches
from lrqdit.integrations.generation import pipeline_loop
from lrqdit.integrations.records import Record, check_records
from lrqdit.kernels import cpu_attention as attention
from lrqdit.models import PIPELINE_COMPONENTS
from lrqdit.models import registry as models
from lrqdit.models.prompts import CALIBRATION_PROMPTS
from lrqdit.numerics.codebook import CODEBOOKS
from lrqdit.packed import checkpoint
from lrqdit.packed.linear import QuantLinear
from lrqdit.packed.size import measure_size

GRADIENT_EVERY = 2  # calls of a module that are not held out
HELD_OUT_EVERY = 8  # prompts, or calls of a module that a forward loop of the caller's runs


def quantize(
    target: nn.Module | DiffusionPipeline,
    preset: str | QuantizationConfig = "w4a8",
    *,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
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
        prompts: calibration prompts, for a pipeline; 32 of our own if neither these nor ``forward_loop`` is given. Each
            is a text, or a dictionary of arguments of the pipeline's call, with a ``prompt`` and, where the pipeline
            takes pictures, paths of files or pictures under their arguments' names: ``{"prompt": "make it snow",
            "image": "house.png"}``. ``seed`` sets the noise.
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
        ModelError: if nothing can be quantized, something is quantized already, or no layer ran. Layers that alone did
            not run are quantized without data; the log and the report name them.
        NumericalError: for NaN or Inf in weights or calibration activations.
    """
    config = _build_config(preset, settings)
    # a library or a variable at fault is an error now, not after the calibration
    native.is_available()
    attention.why_not_by_default()
    modules, dtypes = _find_modules(target), stored_dtypes or {}
    for name, module in modules.items():
        diffusers_plugin.check_not_quantized(module, name)
    plans = {name: models.plan(module, config) for name, module in modules.items()}
    layers = {name: models.linear_layers(module) for name, module in modules.items()}
    rests = {name: Rest.of(module, plans[name], dtypes.get(name)) for name, module in modules.items()}
    if config.average_bits is not None:
        if not is_calibrated:
            raise ConfigError("average_bits needs calibration: it must know what each layer's bits do to the output")
        for name in modules:
            check_budget(layers[name], plans[name], rests[name], config)
    if is_calibrated and calibration is None and forward_loop is None:
        prompts = _check_prompts(target, prompts, arguments)
    for name, plan in plans.items():
        for layer_name, treatment in plan.items():
            if treatment != models.KEPT:
                check_finite(layer_name, layers[name][layer_name])
    start = time.monotonic()
    bytes_before = sum(p.numel() * p.element_size() for module in modules.values() for p in module.parameters())
    parameters = sum(p.numel() for module in modules.values() for p in module.parameters())
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_caches(modules.values()))
        folders: dict[str, RunFolder] = {}
        if resume_folder is not None:
            for name, module in modules.items():
                marks = describe_run(
                    module, component=name, **config.to_dict(), prompts=list(prompts or []), steps=steps,
                    guidance_scale=guidance_scale, arguments=arguments, is_calibrated=is_calibrated,
                    stored_dtypes=stored_dtypes,
                )  # fmt: skip
                folders[name] = stack.enter_context(RunFolder(Path(resume_folder) / name, marks))
        observed: dict[str, Calibration] = calibration or {}
        if is_calibrated and calibration is None:
            kept = {name: found for name, folder in folders.items() if (found := folder.load_calibration()) is not None}
            observed = kept if kept.keys() == modules.keys() else observe(
                target, config, prompts=prompts, forward_loop=forward_loop, steps=steps, guidance_scale=guidance_scale,
                arguments=arguments, show_progress=show_progress,
            )  # fmt: skip
            for name, folder in folders.items() if observed is not kept else ():
                folder.save_calibration(observed[name])
        check_observed(observed, config)
        calibrated = time.monotonic()
        reports: list[GroupReport] = []
        # nothing is replaced before everything is fitted: a failed run leaves the model as it was
        replacements: dict[str, dict[str, QuantLinear]] = {}
        for name, module in modules.items():
            found = observed.get(name)
            probe = (
                Probe.of(module, found.steps)
                if found and found.groups and config.is_mixed and config.sensitivity == "measured"
                else None
            )
            job = Job(
                name, layers[name], plans[name], config, rests[name], found, probe, folders.get(name), show_progress
            )
            replacements[name], module_reports = job.run()
            reports += module_reports
    for name, module in modules.items():
        for layer_name, layer in replacements[name].items():
            original = layers[name][layer_name]
            layer.train(original.training)
            module.set_submodule(layer_name, layer.to(device=original.weight.device, dtype=original.weight.dtype))
        checkpoint.finish_layers(module)
        renew_cache(module)
        if isinstance(module, ConfigMixin):
            diffusers_plugin.attach(module, config)
        else:
            vars(module)["lrqdit_settings"] = config.to_dict()
    attention.start()
    size = measure_size(nn.ModuleDict({name.replace(".", "_"): module for name, module in modules.items()}))
    times = calibrated - start, time.monotonic() - calibrated
    return CalibrationReport(config, reports, size, parameters, bytes_before, *times)


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
    modules = models.denoisers(target)
    if not modules:
        raise ModelError(
            f"quantize: {type(target).__name__} has no {' or '.join(PIPELINE_COMPONENTS)}; pass the module that "
            "denoises, with a forward_loop"
        )
    return modules


def observe(
    target: nn.Module | DiffusionPipeline,
    preset: str | QuantizationConfig = "w4a8",
    *,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
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
    moment_bytes = int(config.moment_gib * 2**30) if config.rounding == "compensated" else 0
    has_gradients = config.rounding == "compensated" and config.hessian == "output"
    sampling = Sampling(
        config.calibration_tokens, config.seed, moment_bytes // len(modules), held_out_every,
        GRADIENT_EVERY if has_gradients else 0,
    )  # fmt: skip
    observers = {
        name: Observer(module, tuple(n for n, t in models.plan(module, config).items() if t.is_fitted), sampling)
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
        stack.enter_context(torch.no_grad())
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
