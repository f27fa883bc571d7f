"""Observers of linear layers while the model runs: which layers share an input, and bounded statistics of each input.

Memory does not grow with the number of denoising steps. For each layer input there are five vectors of its width, at
most ``calibration_tokens`` tokens in the model's dtype, and, for compensated rounding, two second moments (width,
width) of the centred input (:mod:`lrqdit.calibration.moments`). The second of these weighs tokens by their effect on
the model's output; for it, some calls of the model are run a second time and differentiated.

Layers that are given the same tensor one after the other form one group, which is observed once: q, k and v, and FLUX's
proj_mlp beside them.

**Hold-out.** The tokens that a rounding is fitted to must not judge it. While ``Observer.is_held_out`` is set, tokens
enter the reservoir and not the second moments; otherwise they enter the second moments and not the reservoir. If
nothing is held out at all, they enter both. Prompts are held out whole, because the tokens of a prompt come back at
every step.

Sums are computed on one thread in float64, or in float32 blocks of fixed size that are added in float64, so that the
result does not depend on the number of threads.
"""

import copy
import dataclasses
import functools
import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrqdit.calibration.moments import Tap
from lrqdit.calibration.statistics import ActivationStats, InputGroup
from lrqdit.errors import ModelError, NumericalError

MAX_MOMENT_WIDTH = 16384
_LOG = logging.getLogger("lrqdit")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What an observer keeps of what it sees.

    Args:
        reservoir_size: tokens kept per input.
        seed: of the token choice.
        moment_bytes: memory for second moments, given to the inputs in the order in which they are first seen.
        held_out_every: if not 0, every so many calls of the module one is held out.
        gradient_every: if not 0, every so many calls of the module one is differentiated, unless it is held out. Where
            a step has a multiple of so many calls, as guidance in two calls has, another of them each time.
    """

    reservoir_size: int
    seed: int
    moment_bytes: int = 0
    held_out_every: int = 0
    gradient_every: int = 0


class Observer:
    """Context manager that watches the inputs of named linear layers.

    Args:
        module: the model.
        names: layers to watch.
        sampling: what is kept.

    Attributes:
        is_held_out: set while what runs shall be held out from the second moments.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], sampling: Sampling) -> None:
        self._module, self._sampling, self._calls = module, sampling, 0
        self._gradient_every, self._is_differentiating, self._gradient_calls = sampling.gradient_every, False, 0
        self._generator, self._pictures = torch.Generator().manual_seed(sampling.seed), 1
        self._steps, self._calls_in_step, self._calls_a_step = 0, 0, 1
        self._layers = {name: module.get_submodule(name) for name in names}
        self._moment_bytes_left = sampling.moment_bytes
        self.is_held_out = False
        self._group_of: dict[str, InputGroup] = {}
        self._last: tuple[weakref.ref, int, InputGroup] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _begin_call(self, _: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        self._pictures = count_pictures(arguments, keywords)
        if (every := self._sampling.held_out_every) and not self._is_differentiating:
            self.is_held_out = self._calls % every == every - 1
            self._calls += 1

    def __enter__(self) -> "Observer":
        self._handles.append(self._module.register_forward_pre_hook(self._begin_call, with_kwargs=True))
        for name, layer in self._layers.items():
            self._handles.append(
                layer.register_forward_hook(
                    lambda _, arguments, keywords, y, name=name: self._see(
                        name, arguments[0] if arguments else keywords["input"], y
                    ),
                    with_kwargs=True,
                )
            )
        if self._gradient_every:
            self._handles.append(self._module.register_forward_hook(self._differentiate, with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._last = [], None

    def end_step(self) -> None:
        """Note that the calls since the last time were one denoising step."""
        if self._calls_in_step:
            self._steps, self._calls_a_step, self._calls_in_step = self._steps + 1, self._calls_in_step, 0

    def _see(self, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        if isinstance(self._layers[name], nn.Conv2d):  # a 1 x 1 convolution has its channels before the pixels
            seen = self._see_tokens(name, x.movedim(-3, -1), y.movedim(-3, -1))
            return None if seen is None else seen.movedim(-1, -3)
        return self._see_tokens(name, x, y)

    def _see_tokens(self, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        if not self._is_differentiating:
            self._observe(name, x)
        elif torch.is_grad_enabled() and name in self._group_of and x.numel():
            y = y if y.requires_grad else y.detach().requires_grad_()
            return Tap.apply(y, x, functools.partial(self._add_gradient, name))
        return None

    def _add_gradient(self, name: str, gradient: Tensor, x: Tensor) -> None:
        gradient, x = _by_picture(gradient, self._pictures), _by_picture(x, self._pictures)
        self._group_of[name].stats.add_gradient(name, gradient, x, self._pictures)

    def _differentiate(self, module: nn.Module, arguments: tuple, keywords: dict, _: object) -> None:
        """Run a call again, and see how a random projection of its output depends on the layers' outputs."""
        if self._is_differentiating or self.is_held_out or not self._gradient_every:
            return
        self._gradient_calls += 1
        self._calls_in_step += 1
        shift = self._steps if self._calls_a_step % self._gradient_every == 0 else 0
        if (self._gradient_calls + shift) % self._gradient_every != 0:
            return
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._is_differentiating = True
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            try:
                with recomputed_activations(module):
                    self._run_back(module, arguments, keywords)
            except (RuntimeError, TypeError):  # a block that cannot be run again
                self._run_back(module, arguments, keywords)
        except RuntimeError as error:  # an operator without a derivative, or too little memory: input moments must do
            self._gradient_every = 0
            reason = str(error).strip().split("\n")[0]
            warnings.warn(
                f"lrqdit: {type(module).__name__} cannot be differentiated here ({reason}); rounding will weigh all "
                "tokens alike",
                stacklevel=2,
            )
        finally:
            self._is_differentiating = False
            for parameter in trained:
                parameter.requires_grad_(True)

    @torch.enable_grad()
    def _run_back(self, module: nn.Module, arguments: tuple, keywords: dict) -> None:
        """Differentiate a random projection of all float outputs; each counts by its mean square."""
        outputs = [output for output in float_tensors(module(*arguments, **keywords)) if output.requires_grad]
        total = None
        for output in outputs:
            projection = torch.randn(output.shape, generator=self._generator, dtype=torch.float32)
            part = (output.float() * projection.to(output.device)).sum()
            part = part * math.sqrt(outputs[0].numel() / output.numel())
            total = part if total is None else total + part
        if total is not None:
            total.backward()

    def _observe(self, name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        version = 0 if x.is_inference() else x._version
        seen = self._last[2] if self._last and self._last[0]() is x and self._last[1] == version else None
        group = self._group_of.get(name)
        if seen is not None and (group is None or (group is seen and group.names[0] != name)):
            if group is None:
                seen.names.append(name)
                self._group_of[name] = seen
            return
        if group is None:
            seed = self._sampling.seed * 1_000_003 + len(self._group_of)
            moment_bytes = (8 if self._gradient_every else 4) * x.shape[-1] ** 2
            has_moment = x.shape[-1] <= MAX_MOMENT_WIDTH and moment_bytes <= self._moment_bytes_left
            self._moment_bytes_left -= moment_bytes if has_moment else 0
            group = InputGroup([name], ActivationStats(x.shape[-1], self._sampling.reservoir_size, seed, has_moment))
        elif group.names[0] != name:  # it read its owner's tensor so far, and now does not: on its own from here on
            group.names.remove(name)
            group = InputGroup([name], copy.deepcopy(group.stats))
        self._group_of[name] = group
        group.stats.update(x, self.is_held_out)
        group.stats.note_tokens(-(-(x.numel() // x.shape[-1]) // self._pictures))
        self._last = weakref.ref(x), version, group

    def groups(self) -> list[InputGroup]:
        """The groups of the layers that ran, in the order of the model's layers.

        Raises:
            NumericalError: if an input contained NaN or Inf.
        """
        seen = [self._group_of[name] for name in self._layers if name in self._group_of]
        groups = list({id(group): group for group in seen}.values())
        for group in groups:
            if not np.isfinite(group.stats.channel_square_sum).all():
                channel = int(np.flatnonzero(~np.isfinite(group.stats.channel_square_sum))[0])
                raise NumericalError(
                    f"calibration: the input of {group.names[0]} contains NaN or Inf (channel {channel}); run the "
                    "model in a wider dtype (bfloat16 or float32) or check its weights"
                )
        return groups

    @property
    def unseen(self) -> list[str]:
        """Names of the layers that never ran."""
        return [name for name in self._layers if name not in self._group_of]


def check_seen(observers: Mapping[str, Observer]) -> None:
    """Log which layers never ran, by model; raise :class:`ModelError` if none of any model did."""
    if not any(observer.groups() for observer in observers.values()):
        raise ModelError(
            f"calibration: no layer of {' or '.join(observers)} ran; run the whole model in forward_loop, or pass "
            "is_calibrated=False"
        )
    for model, observer in observers.items():
        if unseen := observer.unseen:
            what = f"{len(unseen)} layers" if observer.groups() else f"all {len(unseen)} layers"
            _LOG.warning(
                "calibration: %s of %s never ran and will be quantized without data: %s%s", what, model,
                ", ".join(unseen[:3]), " ..." if len(unseen) > 3 else "",
            )  # fmt: skip


@contextmanager
def recomputed_activations(module: Any) -> Iterator[None]:
    """Inside, a diffusers model keeps the activations of one block at a time and computes the others again."""
    is_possible = getattr(module, "_supports_gradient_checkpointing", False)
    if not is_possible or getattr(module, "is_gradient_checkpointing", False):
        yield
        return
    module.enable_gradient_checkpointing(_checkpoint)
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()


def _checkpoint(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What diffusers calls; its own takes no keywords, which some of its models have."""
    return checkpoint(function, *arguments, use_reentrant=False, **keywords)


def count_pictures(arguments: tuple, keywords: dict[str, Any]) -> int:
    """How many pictures a call of a model is about: the length of its first batch or list of float tensors."""
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return len(value)
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor) and value[0].is_floating_point():
            return len(value)
    return 1


def _by_picture(x: Tensor, pictures: int) -> Tensor:
    """Tokens (..., channels) as (pictures, tokens, channels), or as (1, tokens, channels) where they are mixed."""
    if x.ndim > 2 and len(x) != pictures and x.shape[1] == pictures:
        x = x.transpose(0, 1)
    is_mixed = len(x) % pictures != 0 or (x.ndim == 2 and len(x) != pictures)
    return x.reshape(1 if is_mixed else pictures, -1, x.shape[-1])


def float_tensors(output: Any) -> Iterator[Tensor]:
    """The float tensors in what a module returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from float_tensors(part)


def first_float(output: Any) -> Tensor | None:
    """The first of :func:`float_tensors`."""
    return next(float_tensors(output), None)
