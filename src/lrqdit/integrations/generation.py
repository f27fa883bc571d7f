"""A pipeline run on prompts: one picture at a time, with seeds of its own, or without its decoder."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

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
    given = {name: value for name, value in given.items() if value is not None}
    accepted = inspect.signature(pipeline.__call__).parameters
    for name in ("prompt", *given):
        if name not in accepted:
            raise ModelError(f"{type(pipeline).__name__} takes no {name}; lrqdit generates from text prompts")
    arguments = given | models.call_arguments(pipeline) | ({"output_type": "pil"} if "output_type" in accepted else {})
    is_single = len(prompts) == 1
    had_progress = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=not show_progress, leave=is_single)
    samples = []
    try:
        bar = tqdm(list(zip(prompts, chosen, strict=True)), description, disable=is_single or not show_progress)
        for prompt, seed in bar:
            with _recorded_latents(pipeline) as latents, torch.no_grad():
                generator = torch.Generator("cpu").manual_seed(seed)
                output = pipeline(prompt=prompt, generator=generator, **arguments)
            samples.append(Sample(prompt, seed, _frames(output), latents[-1].detach().float().cpu()))
    except LrqditError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        described = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ModelError(
            f"{type(pipeline).__name__} refuses its input ({described or 'defaults'}): {first_line(error)}"
        ) from error
    finally:
        pipeline.set_progress_bar_config(**{"disable": False, **had_progress})
    return samples


@contextmanager
def _recorded_latents(pipeline: DiffusionPipeline) -> Iterator[list[Tensor]]:
    """Collect the latents of the last scheduler step: pipelines share no other way to see them beside the picture."""
    scheduler, latents = pipeline.scheduler, []
    step = scheduler.step

    @wraps(step)  # pipelines inspect its signature
    def recording_step(*arguments: Any, **keywords: Any) -> Any:
        result = step(*arguments, **keywords)
        latents[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    scheduler.step = recording_step
    try:
        yield latents
    finally:
        del scheduler.step


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
