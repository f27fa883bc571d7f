"""Every transformer class of diffusers as a tiny random model.

Widths are 64 where a class allows it: a time embedder then has 4,096 weights, enough for a kept layer to be packed.
"""

import inspect
from typing import Any

import diffusers
import torch
from tiny_inputs import Normal
from tiny_pictures import PICTURES
from tiny_videos import VIDEOS
from torch import Tensor, nn

from lrqdit.calibration.observer import float_tensors

TINY = PICTURES | VIDEOS


def build_model(name: str, seed: int = 0) -> nn.Module:
    """A model of a class in :data:`TINY`, every weight random (diffusers sets some to zero, and experts not at all)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, name)(**TINY[name].config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 3 or not parameter.any():
                parameter.data.normal_(std=0.05)
    return model


def call(model: Any, seed: int = 1) -> Any:
    """What a model of :data:`TINY` returns for its inputs."""
    generator = torch.Generator().manual_seed(seed)

    def fill(value: Any) -> Any:
        if isinstance(value, Normal):
            return torch.randn(value.shape, generator=generator, dtype=torch.float32).to(model.dtype)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(model.dtype)
        if isinstance(value, dict):
            return {key: fill(part) for key, part in value.items()}
        return type(value)(map(fill, value)) if type(value) in (list, tuple) else value

    arguments = fill(TINY[type(model).__name__].inputs())
    if "return_dict" in inspect.signature(model.forward).parameters:
        arguments["return_dict"] = False
    return model(**arguments)


def run(model: Any, seed: int = 1) -> Tensor:
    """All float outputs of one call end to end, float32."""
    return torch.cat([output.detach().float().flatten() for output in float_tensors(call(model, seed))])


@torch.no_grad()
def run_model(model: Any) -> Tensor:
    """The first output of one call, in its own dtype."""
    return next(float_tensors(call(model)))
