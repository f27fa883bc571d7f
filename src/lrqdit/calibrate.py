"""Observers on linear layers while the real model runs: bounded statistics, a reservoir of tokens, who shares input.

Memory does not grow with the number of steps: per layer input five vectors of its width, at most
``calibration_tokens`` tokens in the model's own dtype, and, where compensated rounding will want them, two second
moments of the centred input, (width, width): see :mod:`lrqdit.moments`. For the one that weighs tokens by what they do
to the model's output, some of the model's calls are run a second time and differentiated.

Layers that are given the very same tensor one after the other (q, k and v; FLUX's proj_mlp beside them) form one group,
observed once.

**Hold-out.** What a layer's rounding is fitted to must not judge it. While ``Observer.is_held_out`` is set, tokens
enter the reservoir and not the second moment; otherwise the other way round (unless nothing is held out at all).
Prompts are held out whole: tokens of one prompt come back at every step.

Reductions run single-threaded in float64 (numpy; the second moment in float32 blocks of fixed size, added in float64),
so that the result does not depend on the number of threads.
"""

import copy
import functools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrqdit.errors import ModelError, NumericalError
from lrqdit.moments import ROWS_PER_BLOCK, SecondMoment, Tap, project_gradient

MAX_MOMENT_WIDTH = 16384


class ActivationStats:
    """Running statistics of one layer input with ``channels`` channels.

    Args:
        channels: width of the input.
        reservoir_size: how many tokens are kept, chosen uniformly over everything observed.
        seed: seed of that choice.
        has_moment: also sum up the second moments, (channels, channels) in float32 each.

    Attributes:
        tokens: the reservoir, (count, channels), from held-out calls only once there are any.
        is_held_out: whether the reservoir is held out from the second moment.
    """

    def __init__(self, channels: int, reservoir_size: int, seed: int, has_moment: bool = False) -> None:
        self.token_count = 0
        self.channel_sum = np.zeros(channels)
        self.channel_square_sum = np.zeros(channels)
        self.channel_minimum = np.full(channels, np.inf)
        self.channel_maximum = np.full(channels, -np.inf)
        self.tokens: Tensor | None = None
        self._priorities = torch.empty(0)
        self._reservoir_size = reservoir_size
        self._generator_state = torch.Generator().manual_seed(seed).get_state()
        self.is_held_out = False
        self._has_moment = has_moment
        self._moment: SecondMoment | None = None  # of the tokens that are not held out
        self._output_moment: SecondMoment | None = None
        self._energy: dict[str, tuple[float, int]] = {}  # by layer: sum of |M|^2, pictures
        self._sign_generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor, is_held_out: bool = False) -> None:
        """Add the tokens of x (..., channels)."""
        x = x.detach().reshape(-1, x.shape[-1])
        for chunk in x.split(ROWS_PER_BLOCK):
            values = chunk.to("cpu", torch.float32).numpy()
            self.token_count += len(values)
            self.channel_sum += values.sum(axis=0, dtype=np.float64)
            self.channel_square_sum += np.square(values, dtype=np.float64).sum(axis=0)
            np.minimum(self.channel_minimum, values.min(axis=0), out=self.channel_minimum)
            np.maximum(self.channel_maximum, values.max(axis=0), out=self.channel_maximum)
        if is_held_out and not self.is_held_out:
            self.tokens, self._priorities, self.is_held_out = None, torch.empty(0), True
        if is_held_out == self.is_held_out:
            self._sample(x)
        if self._has_moment and not is_held_out:
            self._add_moment(x)

    def _add_moment(self, x: Tensor) -> None:
        if self._moment is None:  # around the mean of the first call's tokens
            shift = torch.from_numpy(x.cpu().float().numpy().mean(axis=0, dtype=np.float64)).float().to(x.device)
            self._moment = SecondMoment(shift)
        self._moment.add(x.float() - self._moment.shift, torch.ones(len(x)))

    def add_gradient(self, name: str, gradient: Tensor, x: Tensor) -> None:
        """Add what the tokens x (batch, ..., channels), seen before, do to the model's output through a layer.

        ``gradient`` (batch, ..., out_features) is that of a random projection of it to the layer's output.
        """
        if self._moment is None:
            return
        rows, weights = project_gradient(gradient.detach(), x.detach(), self._moment.shift, self._sign_generator)
        if self._output_moment is None:
            self._output_moment = SecondMoment(self._moment.shift)
        is_finite = rows.isfinite().all(dim=1) & weights.isfinite()
        self._output_moment.add(rows[is_finite], weights[is_finite].cpu())
        total, pictures = self._energy.get(name, (0.0, 0))
        squares = np.square(rows[is_finite].cpu().numpy(), dtype=np.float64)
        self._energy[name] = total + float(squares.sum()), pictures + len(x)

    def second_moment(self, offset: Tensor) -> Tensor | None:
        """E[(x - offset)(x - offset)^T] over the tokens that are not held out, float64 (channels, channels)."""
        return None if self._moment is None else self._moment.about(offset)

    def output_moment(self, offset: Tensor) -> Tensor | None:
        """E[M^T M] of M = sum over a picture's tokens of g (x - offset)^T, float64 (channels, channels)."""
        return None if self._output_moment is None else self._output_moment.about(offset)

    def gradient_energy(self, name: str) -> float | None:
        """E |M|^2 over the pictures that a layer's M was seen of, squared Frobenius norm; None if of none."""
        total, pictures = self._energy.get(name, (0.0, 0))
        return total / pictures if pictures else None

    def _sample(self, x: Tensor) -> None:
        """Reservoir sampling by random priorities: the tokens with the largest ones so far stay, in place."""
        generator = torch.Generator()
        generator.set_state(self._generator_state)
        priorities = torch.rand(len(x), generator=generator)
        self._generator_state = generator.get_state()
        if self.tokens is None:
            self.tokens = x.new_empty((0, x.shape[1]), device="cpu")
        room = self._reservoir_size - len(self.tokens)
        is_chosen = torch.zeros(len(x), dtype=torch.bool)
        is_chosen[priorities.topk(min(self._reservoir_size, len(x))).indices] = True
        if room == 0:
            is_chosen &= priorities > self._priorities.min()
        chosen = is_chosen.nonzero()[:, 0]
        added, chosen = chosen[:room], chosen[room:]
        if len(added):
            self.tokens = torch.cat([self.tokens, x[added.to(x.device)].cpu()])
            self._priorities = torch.cat([self._priorities, priorities[added]])
        if len(chosen):
            kept = torch.cat([self._priorities, priorities[chosen]]).topk(self._reservoir_size).indices
            is_kept = torch.zeros(len(self._priorities) + len(chosen), dtype=torch.bool)
            is_kept[kept] = True
            replaced = (~is_kept[: len(self._priorities)]).nonzero()[:, 0]
            chosen = chosen[is_kept[len(self._priorities) :]]
            self.tokens[replaced] = x[chosen.to(x.device)].cpu()
            self._priorities[replaced] = priorities[chosen]

    @property
    def rms(self) -> float:
        """J = ||X||_F / sqrt(tokens * channels), the layer metric of the Adaptive Rotation Scheme."""
        return float(np.sqrt(self.channel_square_sum.sum() / max(1, self.token_count * len(self.channel_sum))))

    @property
    def channel_mean(self) -> Tensor:
        """float32 (channels,)."""
        return torch.from_numpy(self.channel_sum / max(1, self.token_count)).float()

    def channel_absmax(self, offset: Tensor | None = None) -> Tensor:
        """max |x_j - offset_j| over all observed tokens, float32 (channels,)."""
        shift = np.zeros_like(self.channel_sum) if offset is None else offset.double().numpy()
        return torch.from_numpy(np.maximum(self.channel_maximum - shift, shift - self.channel_minimum)).float()

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything :meth:`from_tensors` needs, for a checkpoint of the calibration."""
        vectors = [self.channel_sum, self.channel_square_sum, self.channel_minimum, self.channel_maximum]
        assert self.tokens is not None
        tensors = {
            "count": torch.tensor([self.token_count, int(self.is_held_out)]),
            "vectors": torch.from_numpy(np.stack(vectors)),
            "tokens": self.tokens.contiguous(),
        }
        for name, moment in (("moment", self._moment), ("output_moment", self._output_moment)):
            tensors |= moment.to_tensors(name) if moment is not None else {}
        for name, energy in self._energy.items():
            tensors[f"energy.{name}"] = torch.tensor(energy, dtype=torch.float64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "ActivationStats":
        """Statistics to read from; they cannot be updated further."""
        stats = cls(tensors["tokens"].shape[1], len(tensors["tokens"]), seed=0)
        stats.tokens = tensors["tokens"]
        stats.token_count, stats.is_held_out = (int(n) for n in tensors["count"])
        stats.channel_sum, stats.channel_square_sum, stats.channel_minimum, stats.channel_maximum = (
            tensors["vectors"].numpy().copy()
        )
        stats._moment = SecondMoment.from_tensors(tensors, "moment")
        stats._output_moment = SecondMoment.from_tensors(tensors, "output_moment")
        for key, tensor in tensors.items():
            if key.startswith("energy."):
                total, pictures = tensor.tolist()
                stats._energy[key.removeprefix("energy.")] = total, int(pictures)
        return stats


class InputGroup:
    """Layers that always read the same tensor: ``names[0]`` is the owner, ``stats`` describe their common input."""

    def __init__(self, names: list[str], stats: ActivationStats) -> None:
        self.names, self.stats = names, stats


class Observer:
    """Context manager that watches the inputs of named linear layers.

    Args:
        module: the model.
        names: layers to watch.
        reservoir_size: tokens kept per input.
        seed: seed of the token choice.
        moment_bytes: memory for second moments, given to the inputs in the order in which they are first seen.
        held_out_every: if not 0, every so many calls of the module one is held out.
        gradient_every: if not 0, every so many calls of the module one is differentiated, unless it is held out.

    Attributes:
        is_held_out: set while what runs shall be held out from the second moments.
    """

    def __init__(
        self,
        module: nn.Module,
        names: tuple[str, ...],
        reservoir_size: int,
        seed: int,
        moment_bytes: int = 0,
        held_out_every: int = 0,
        gradient_every: int = 0,
    ) -> None:
        self._module, self._held_out_every, self._calls = module, held_out_every, 0
        self._gradient_every, self._is_differentiating, self._gradient_calls = gradient_every, False, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._layers = {name: module.get_submodule(name) for name in names}
        self._reservoir_size, self._seed, self._moment_bytes_left = reservoir_size, seed, moment_bytes
        self.is_held_out = False
        self._group_of: dict[str, InputGroup] = {}
        self._last: tuple[weakref.ref, int, InputGroup] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _count_call(self, *_: object) -> None:
        if not self._is_differentiating:
            self.is_held_out = self._calls % self._held_out_every == self._held_out_every - 1
            self._calls += 1

    def __enter__(self) -> "Observer":
        if self._held_out_every:
            self._handles.append(self._module.register_forward_pre_hook(self._count_call))
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

    def _see(self, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        if not self._is_differentiating:
            self._observe(name, x)
        elif torch.is_grad_enabled() and x.ndim > 2 and name in self._group_of:
            y = y if y.requires_grad else y.detach().requires_grad_()
            return Tap.apply(y, x, functools.partial(self._group_of[name].stats.add_gradient, name))
        return None

    def _differentiate(self, module: nn.Module, arguments: tuple, keywords: dict, _: object) -> None:
        """Run a call again, and see how a random projection of its output depends on the layers' outputs."""
        if self._is_differentiating or self.is_held_out or not self._gradient_every:
            return
        self._gradient_calls += 1
        if self._gradient_calls % self._gradient_every != 0:
            return
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._is_differentiating = True
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.enable_grad(), recomputed_activations(module):
                output = first_float(module(*arguments, **keywords))
                if output is not None and output.requires_grad:
                    projection = torch.randn(output.shape, generator=self._generator)
                    (output.float() * projection.to(output.device)).sum().backward()
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

    def _observe(self, name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        version = 0 if x.is_inference() else x._version
        is_repeated = self._last is not None and self._last[0]() is x and self._last[1] == version
        group = self._group_of.get(name)
        if is_repeated and (group is None or (group is self._last[2] and group.names[0] != name)):
            if group is None:
                self._last[2].names.append(name)
                self._group_of[name] = self._last[2]
            return
        if group is None:
            seed = self._seed * 1_000_003 + len(self._group_of)
            moment_bytes = (8 if self._gradient_every else 4) * x.shape[-1] ** 2
            has_moment = x.shape[-1] <= MAX_MOMENT_WIDTH and moment_bytes <= self._moment_bytes_left
            self._moment_bytes_left -= moment_bytes if has_moment else 0
            group = InputGroup([name], ActivationStats(x.shape[-1], self._reservoir_size, seed, has_moment))
        elif group.names[0] != name:  # it read its owner's tensor so far, and now does not: on its own from here on
            group.names.remove(name)
            group = InputGroup([name], copy.deepcopy(group.stats))
        self._group_of[name] = group
        group.stats.update(x, self.is_held_out)
        self._last = weakref.ref(x), version, group

    def groups(self) -> list[InputGroup]:
        """The groups in the order of the model's layers.

        Raises:
            ModelError: if a layer was never run.
            NumericalError: if an input contained NaN or Inf.
        """
        missing = [name for name in self._layers if name not in self._group_of]
        if missing:
            raise ModelError(
                f"calibration: {len(missing)} of {len(self._layers)} layers never ran, the first is {missing[0]}; run "
                "the whole model in forward_loop, or exclude them"
            )
        groups = list({id(self._group_of[name]): self._group_of[name] for name in self._layers}.values())
        for group in groups:
            if not np.isfinite(group.stats.channel_square_sum).all():
                channel = int(np.flatnonzero(~np.isfinite(group.stats.channel_square_sum))[0])
                raise NumericalError(
                    f"calibration: the input of {group.names[0]} contains NaN or Inf (channel {channel}); run the "
                    "model in a wider dtype (bfloat16 or float32) or check its weights"
                )
        return groups


@contextmanager
def recomputed_activations(module: nn.Module) -> Iterator[None]:
    """Inside, a diffusers model keeps the activations of one block at a time and computes the others again."""
    is_possible = getattr(module, "_supports_gradient_checkpointing", False)
    if not is_possible or getattr(module, "is_gradient_checkpointing", False):
        yield
        return
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()


def first_float(output: Any) -> Tensor | None:
    """The first float tensor in what a module returned."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((found for part in parts if (found := first_float(part)) is not None), None)
