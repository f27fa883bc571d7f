"""What the tables of tiny transformers are written in: a model's configuration, and inputs that run it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Normal:
    """Stands for a random normal tensor of this shape, in the dtype of the model."""

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """How to build and run a model of one class.

    Args:
        config: arguments of the class.
        inputs: arguments of its call; floating tensors follow the model's dtype.
        bfloat16_fault: why the class cannot run in bfloat16 on a CPU, unquantized; empty if it can.
        gradient_fault: why it cannot be differentiated on a CPU; empty if it can.
    """

    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    bfloat16_fault: str = ""
    gradient_fault: str = ""


def normal(*shape: int) -> Any:
    return Normal(shape)


def full(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float32)


def grid(*sizes: int) -> Tensor:
    """Coordinates of a grid, (tokens, axes)."""
    return torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in sizes))


STEPS = torch.tensor([500, 500])
MASK = torch.ones(2, 6, dtype=torch.bool)


def text(width: int = 64) -> Any:
    return normal(2, 6, width)
