"""The last denoising steps of a few prompts, kept on the CPU so that they can be run again with one layer changed.

The model's error at the last steps decides the error of the picture: two of ten steps make 90 % of it. Guidance
combines several outputs of the model at each step. With a scale of 3, the square of an error that the conditional and
the unconditional output have in common counts once, that of an error of the conditional output alone nine times. So
each step is kept with the weights by which the scheduler's input was made of the model's outputs. Steps of held-out
prompts are preferred, because the rounding was not fitted to them.
"""

import collections
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrqdit.calibration.observer import first_float, float_tensors
from lrqdit.calibration.statistics import InputGroup

LAST_STEPS = 2
MAX_CALLS, MAX_ROWS = 8, 16
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module: JSON-safe ``structure`` of its arguments, its ``tensors`` on the CPU."""

    structure: Any
    tensors: list[Tensor]

    @classmethod
    def record(cls, arguments: tuple, keywords: dict[str, Any]) -> "Call | None":
        """A copy of a call's arguments; None if they are more than tensors, numbers, texts, lists and dictionaries."""
        tensors: list[Tensor] = []
        try:
            return cls(_flatten([list(arguments), keywords], tensors), tensors)
        except TypeError:
            return None

    def run(self, module: nn.Module) -> list[Tensor]:
        """The float tensors that the module returns, in float32."""
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        arguments, keywords = _unflatten(self.structure, [tensor.to(device) for tensor in self.tensors])
        return [output.float() for output in float_tensors(module(*arguments, **keywords))]


@dataclasses.dataclass(frozen=True)
class Step:
    """The calls of one denoising step.

    Args:
        calls: one, or several where guidance runs the model more than once.
        weights: of the equal parts of the calls' outputs, laid end to end, in what the scheduler was given; empty if
            that is unknown.
        shape: of what the scheduler was given.
    """

    calls: list[Call]
    weights: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()

    def run(self, module: nn.Module) -> Tensor:
        """The step's output as the scheduler sees it, or the calls' first outputs end to end; float32.

        Further outputs of the model, such as sound, stand behind it, each scaled to count by its mean square.
        """
        outputs = [found for call in self.calls if (found := call.run(module))]
        first = [found[0] for found in outputs]
        further = [
            part.flatten() * math.sqrt(found[0].numel() / part.numel())
            for found in outputs
            for part in found[1:]
            if part.numel()
        ]
        if self.weights:
            parts = _split(first, self.shape)
            weights = torch.tensor(self.weights, dtype=torch.float32, device=parts.device)
            combined = torch.tensordot(weights, parts, dims=1)
        else:
            combined = torch.cat([torch.empty(0, dtype=torch.float32), *(output.flatten() for output in first)])
        return torch.cat([combined.flatten(), *further]) if further else combined


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was observed of one model.

    Args:
        groups: statistics of its layers' inputs, in the order of the layers.
        steps: some denoising steps; none if the model's arguments cannot be kept.
    """

    groups: list[InputGroup]
    steps: list[Step] = dataclasses.field(default_factory=list)


class StepRecorder:
    """Collects steps of one module: the last two of each run of the denoising loop, of a few runs chosen by chance."""

    def __init__(
        self, seed: int, is_held_out: Callable[[], bool], on_step: Callable[[], object] = lambda: None
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._is_held_out, self._on_step = is_held_out, on_step
        self._calls: list[tuple[Call | None, Tensor]] = []
        self._last: collections.deque[tuple[Step, int]] = collections.deque(maxlen=LAST_STEPS)
        self._rank = False, 0.0
        self._runs: list[tuple[tuple[bool, float], list[tuple[Step, int]]]] = []

    def add_call(self, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
        """Note a call of the module."""
        found = first_float(output)
        kept = torch.empty(0, dtype=torch.float32) if found is None else found.detach().cpu()
        self._calls.append((Call.record(arguments, keywords), kept))
        if len(self._calls) > MAX_CALLS:  # no scheduler asks for them
            self.end_step(None)

    def end_step(self, given: Tensor | None) -> None:
        """The calls so far were one step, from which the scheduler was given a tensor, if there is a scheduler."""
        self._on_step()
        calls = [call for call, _ in self._calls if call is not None]
        outputs = [output for _, output in self._calls]
        if calls and len(calls) == len(outputs):
            weights = () if given is None else _find_weights(outputs, given.detach().cpu())
            rows = sum(len(output) if output.ndim else 1 for output in outputs)
            self._last.append((Step(calls, weights, tuple(given.shape) if given is not None and weights else ()), rows))
            self._rank = not self._is_held_out(), float(torch.rand((), generator=self._generator, dtype=torch.float32))
        self._calls = []

    def end_run(self) -> None:
        """Whatever comes next belongs to other noise."""
        if self._last:
            self._runs.append((self._rank, list(self._last)))
            self._last.clear()
        kept, calls, rows = [], 0, 0
        for rank, steps in sorted(self._runs, key=lambda run: run[0]):
            if calls < MAX_CALLS and rows < MAX_ROWS:
                kept.append((rank, steps))
            calls += sum(len(step.calls) for step, _ in steps)
            rows += sum(count for _, count in steps)
        self._runs = kept

    def steps(self) -> list[Step]:
        """What was kept; nothing if the module's arguments cannot be."""
        self.end_run()
        return [step for _, steps in self._runs for step, _ in steps]


@contextmanager
def recorded_steps(modules: dict[str, nn.Module], scheduler: Any, recorders: dict[str, StepRecorder]) -> Iterator[None]:
    """Let recorders see their modules' calls, and the steps of a diffusers scheduler (None: every call is a step)."""

    def note_call(name: str, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            return  # calibration differentiates the call before
        recorders[name].add_call(arguments, keywords, output)
        if scheduler is None:
            recorders[name].end_step(None)
            recorders[name].end_run()

    handles = [
        module.register_forward_hook(
            lambda _, arguments, keywords, output, name=name: note_call(name, arguments, keywords, output),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]

    def end_step(_: Any, given: Tensor, result: Any) -> None:
        for recorder in recorders.values():
            recorder.end_step(given)

    def end_run() -> None:
        for recorder in recorders.values():
            recorder.end_run()

    try:
        with watched_scheduler(scheduler, end_step, end_run):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_scheduler(
    scheduler: Any, on_step: Callable[[Any, Tensor, Any], object], on_start: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Tell of what a diffusers scheduler does, and of what deep copies do that a pipeline makes of it meanwhile.

    The scheduler's class is another one meanwhile, which copies inherit; attributes of the instance would leave copies
    bound to the original.

    Args:
        scheduler: None if there is none; then nothing is told.
        on_step: called after each step with the scheduler or copy that took it, the model's output and the result.
        on_start: called before the time steps of another run are set.
    """
    if scheduler is None:
        yield
        return
    kind = type(scheduler)
    plain = getattr(kind, "unwatched", kind)

    class Watched(kind):
        unwatched = plain

        @functools.wraps(kind.step)  # pipelines inspect the signatures
        def step(self, *arguments: Any, **keywords: Any) -> Any:
            result = kind.step(self, *arguments, **keywords)
            on_step(self, arguments[0] if arguments else keywords["model_output"], result)
            return result

        @functools.wraps(kind.set_timesteps)
        def set_timesteps(self, *arguments: Any, **keywords: Any) -> Any:
            on_start()
            return kind.set_timesteps(self, *arguments, **keywords)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            memo[id(self)] = new = object.__new__(type(self))
            new.__dict__.update(copy.deepcopy(vars(self), memo))
            return new

        def __reduce_ex__(self, protocol: Any) -> tuple:  # a pickle finds a class by its name
            return object.__new__, (plain,), vars(self)

    Watched.__name__, Watched.__qualname__, Watched.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    scheduler.__class__ = Watched
    try:
        yield
    finally:
        scheduler.__class__ = kind
        del Watched.step, Watched.set_timesteps  # copies that are left are as the original


def _find_weights(outputs: list[Tensor], given: Tensor) -> tuple[float, ...]:
    """Weights w with sum w_i part_i = given, by least squares; none if there are no such."""
    parts = _split(outputs, tuple(given.shape))
    if parts.numel() == 0 or not given.is_floating_point():
        return ()
    columns, wanted = parts.flatten(1).double().numpy().T, given.flatten().double().numpy()
    weights = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    left = np.square(columns @ weights - wanted).sum()
    return tuple(weights.tolist()) if left <= TOLERANCE * np.square(wanted).sum() else ()


def _split(outputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Outputs end to end as (parts, *shape), empty if they are not parts of that shape; channels in excess, such as
    predicted variances, are left out."""
    nothing = torch.empty(0, dtype=torch.float32)
    if not shape or any(o.ndim != len(shape) or o.shape[1:] != outputs[0].shape[1:] for o in outputs):
        return nothing
    joined = torch.cat(outputs)
    if shape[1:]:
        joined = joined[:, : shape[1]]
    is_divisible = len(joined) % shape[0] == 0 if shape[0] else False
    return joined.reshape(-1, *shape) if is_divisible and joined.shape[1:] == shape[1:] else nothing


def _flatten(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().clone())
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_flatten(part, tensors) for part in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _flatten(part, tensors) for key, part in value.items()}}
    raise TypeError(type(value))


def _unflatten(structure: dict[str, Any], tensors: list[Tensor]) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {key: _unflatten(part, tensors) for key, part in content.items()}
    parts = [_unflatten(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else parts
