"""A pipeline run on prompts: one picture at a time, with seeds of its own, or without its decoder."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lrqdit.calibration.steps import watched_scheduler
from lrqdit.errors import LrqditError, ModelError, first_line
from lrqdit.models import registry as models


@dataclass(frozen=True)
class Sample:
    """What one prompt and one seed gave.

    Args:
        frames: one picture, or the frames of a video.
        latents: the last denoising step's result, before the decoder, float32 on the CPU.
    """

    prompt: str
    seed: int
    frames: tuple[Image.Image, ...]
    latents: Tensor

    @property
    def picture(self) -> Image.Image:
        """The picture, or the first frame."""
        return self.frames[0]


def generate_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int] | int = 0,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    show_progress: bool = True,
    description: str = "generating",
) -> list[Sample]:
    """Generate one picture (or video) per prompt, each in a batch of its own.

    Args:
        pipeline: a text-to-image or text-to-video pipeline.
        prompts: any number of them.
        seeds: one per prompt, or the first of consecutive ones.
        steps, guidance_scale, negative_prompt, height, width: the pipeline's own defaults if None.
        show_progress: bars on stderr, over prompts and over denoising steps.
        description: of the bar over prompts.

    Raises:
        ModelError: if the pipeline lacks an argument that was given, or refuses its value.
    """
    chosen = range(seeds, seeds + len(prompts)) if isinstance(seeds, int) else seeds
    given = {
        "num_inference_steps": steps, "guidance_scale": guidance_scale, "negative_prompt": negative_prompt,
        "height": height, "width": width,
    }  # fmt: skip
    is_single = len(prompts) == 1
    bars = {"disable": not show_progress, "leave": is_single}
    samples = []
    pairs = list(zip(prompts, chosen, strict=True))
    for prompt, seed in tqdm(pairs, description, disable=is_single or not show_progress):
        output, latents = call_pipeline(pipeline, [prompt], [seed], given, progress=bars)
        samples.append(Sample(prompt, seed, _frames(output), latents))
    return samples


def call_pipeline(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], given: Mapping[str, Any],
    output_type: str = "pil", progress: Mapping[str, Any] = MappingProxyType({"disable": True}),
) -> tuple[Any, Tensor]:  # fmt: skip
    """Call a pipeline once, on a batch of prompts with noise of their own.

    Args:
        pipeline: a text-to-image or text-to-video pipeline.
        prompts, seeds: of the batch.
        given: further arguments by name; those that are None are left out.
        output_type: ``latent`` stops before the decoder.
        progress: of the bar over denoising steps, as tqdm has it.

    Returns:
        What the pipeline returned, and the latents after the last denoising step, float32 on the CPU.

    Raises:
        ModelError: if the pipeline lacks an argument that was given, refuses its value, or takes no step.
    """
    kind, given = type(pipeline).__name__, {name: value for name, value in given.items() if value is not None}
    accepted = inspect.signature(pipeline.__call__).parameters
    for name in ("prompt", *given):
        if name not in accepted:
            raise ModelError(f"{kind} takes no {name}; lrqdit generates from text prompts")
    call = ({"output_type": output_type} if "output_type" in accepted else {}) | models.call_arguments(pipeline) | given
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    batch = {"prompt": list(prompts), "generator": generators}
    if len(prompts) == 1:
        batch = {name: values[0] for name, values in batch.items()}
    latents: dict[bool, Tensor] = {}

    def keep(scheduler: Any, _: Tensor, result: Any) -> None:
        """The copies of a scheduler may serve other things, such as sound."""
        latents[scheduler is pipeline.scheduler] = result[0] if isinstance(result, tuple) else result.prev_sample

    had_progress = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**progress)
    try:
        with watched_scheduler(getattr(pipeline, "scheduler", None), keep), torch.no_grad():
            output = cast(Any, pipeline)(**batch, **call)  # the base class declares no call
    except LrqditError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        described = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ModelError(f"{kind} refuses its input ({described or 'defaults'}): {first_line(error)}") from error
    finally:
        pipeline.set_progress_bar_config(**{"disable": False, **had_progress})
    if not latents:
        raise ModelError(f"{kind} took no step of a scheduler; pass a diffusion pipeline")
    last = latents[True] if True in latents else latents[False]
    return output, last.detach().float().cpu()


def _frames(output: Any) -> tuple[Image.Image, ...]:
    pictures = output.images if hasattr(output, "images") else output.frames[0]
    return tuple(picture if isinstance(picture, Image.Image) else Image.fromarray(picture) for picture in pictures)


def pipeline_loop(
    prompts: Sequence[str],
    steps: int | None = None,
    guidance_scale: float | None = None,
    arguments: dict[str, Any] | None = None,
    seed: int = 0,
    show_progress: bool = True,
    on_prompt: Callable[[int], object] = lambda index: None,
    batch_size: int = 1,
) -> Callable[[Any], None]:
    """A forward loop that generates every prompt once, on noise of its own, and stops before the decoder.

    ``on_prompt`` is called with the index of each batch before it runs; ``batch_size`` prompts run together.
    """

    def loop(pipeline: DiffusionPipeline) -> None:
        given = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **(arguments or {})}
        for start in tqdm(range(0, len(prompts), batch_size), "calibrating", disable=not show_progress):
            on_prompt(start // batch_size)
            batch = prompts[start : start + batch_size]
            seeds = [seed * 1_000_003 + start + i for i in range(len(batch))]
            call_pipeline(pipeline, batch, seeds, given, "latent")

    return loop
