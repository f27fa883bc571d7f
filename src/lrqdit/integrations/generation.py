"""A pipeline run on prompts: one picture at a time, with seeds of its own, or without its decoder."""

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
from lrqdit.integrations.records import (
    Record,
    batches,
    check_records,
    load_pictures,
    picture_arguments,
    warn_without_pictures,
)
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
    prompts: Sequence[str | Mapping[str, Any]],
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
        pipeline: of diffusers, for pictures or videos.
        prompts: any number of them; records (:mod:`lrqdit.integrations.records`) where it takes pictures.
        seeds: one per prompt, or the first of consecutive ones; a record's own seed comes before.
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
    pairs = list(zip(check_records(pipeline, prompts, None), chosen, strict=True))
    for record, seed in tqdm(pairs, description, disable=is_single or not show_progress):
        seed = record.get("seed", seed)
        output, latents = call_pipeline(
            pipeline, [record["prompt"]], [seed], {**given, **own(pipeline, record)}, progress=bars
        )
        samples.append(Sample(record["prompt"], seed, _frames(output), latents))
    return samples


def call_pipeline(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], given: Mapping[str, Any],
    output_type: str = "pil", progress: Mapping[str, Any] = MappingProxyType({"disable": True}),
) -> tuple[Any, Tensor]:  # fmt: skip
    """Call a pipeline once, on a batch of prompts with noise of their own.

    Args:
        pipeline: of diffusers, that takes prompts.
        prompts, seeds: of the batch.
        given: further arguments by name; those that are None are left out.
        output_type: ``latent`` stops before the decoder.
        progress: of the bar over denoising steps, as tqdm has it.

    Returns:
        What the pipeline returned, and the latents after the last denoising step, float32 on the CPU.

    Raises:
        ModelError: if the pipeline lacks an argument that was given, refuses its value, takes no step, or fails with
            parts in several dtypes.
    """
    kind, given = type(pipeline).__name__, {name: value for name, value in given.items() if value is not None}
    accepted = models.call_parameters(pipeline)
    for name in ("prompt", *given):
        if name not in accepted:
            raise ModelError(f"{kind} takes no {name}; lrqdit generates from text prompts")
    call = ({"output_type": output_type} if "output_type" in accepted else {}) | models.call_arguments(pipeline) | given
    several = max(given.get("num_images_per_prompt", 1), given.get("num_videos_per_prompt", 1))
    batch = {"prompt": list(prompts), "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds]}
    if len(prompts) == 1:
        batch = {name: values[0] for name, values in batch.items()}
    elif several > 1:  # diffusers takes one generator for all, or as many as there are pictures
        batch["generator"] = batch["generator"][0]
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
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        described = ", ".join(f"{name}={_shown(value)}" for name, value in given.items())
        absent = [name for name in picture_arguments(pipeline) if name not in given]
        hint = f"; it may miss a picture: it takes {', '.join(absent)}, too" if absent else ""
        raise ModelError(f"{kind} refuses its input ({described or 'defaults'}): {first_line(error)}{hint}") from error
    except RuntimeError as error:
        dtypes = {name: module.dtype for name, module in pipeline.components.items() if hasattr(module, "dtype")}
        if len(set(dtypes.values())) < 2:
            raise
        described = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        raise ModelError(
            f"{kind} fails, and its parts have several dtypes ({described}); load it in one, as in "
            f"from_pretrained(..., torch_dtype=torch.bfloat16): {first_line(error)}"
        ) from error
    finally:
        pipeline.set_progress_bar_config(**{"disable": False, **had_progress})
    if not latents:
        raise ModelError(f"{kind} took no step of a scheduler; pass a diffusion pipeline")
    last = latents[True] if True in latents else latents[False]
    return output, last.detach().float().cpu()


def own(pipeline: DiffusionPipeline, record: Record) -> Record:
    """A record's arguments beside its prompt and its seed, with its pictures loaded."""
    return load_pictures(pipeline, {name: value for name, value in record.items() if name not in ("prompt", "seed")})


def _shown(value: Any) -> str:
    """A value of an error's message: pictures and tensors by their kind, long texts cut."""
    text = repr(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) < 80 else text[:80] + "..."


def _frames(output: Any) -> tuple[Image.Image, ...]:
    pictures = output.images if hasattr(output, "images") else output.frames[0]
    return tuple(picture if isinstance(picture, Image.Image) else Image.fromarray(picture) for picture in pictures)


def pipeline_loop(
    prompts: Sequence[Record],
    steps: int | None = None,
    guidance_scale: float | None = None,
    arguments: dict[str, Any] | None = None,
    seed: int = 0,
    show_progress: bool = True,
    on_prompt: Callable[[int], object] = lambda index: None,
    batch_size: int = 1,
) -> Callable[[Any], None]:
    """A forward loop that runs every record once, on noise of its own, and stops before the decoder.

    ``on_prompt`` is called with the index of each batch before it runs; ``batch_size`` records run together.
    """
    found = batches(prompts, batch_size)

    def loop(pipeline: DiffusionPipeline) -> None:
        given = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **(arguments or {})}
        warn_without_pictures(pipeline, prompts, given)
        for index, batch in enumerate(tqdm(found, "calibrating", disable=not show_progress)):
            on_prompt(index)
            first = seed * 1_000_003 + index * batch_size
            seeds = [record.get("seed", first + i) for i, record in enumerate(batch)]
            arguments_of_its_own = own(pipeline, batch[0]) if batch_size == 1 else {}
            call_pipeline(
                pipeline, [record["prompt"] for record in batch], seeds, {**given, **arguments_of_its_own}, "latent"
            )

    return loop
