"""Observers on linear layers while the real model runs: bounded statistics, a reservoir of tokens, who shares input.

Memory does not grow with the number of steps: per layer input five vectors of its width, at most
``calibration_tokens`` tokens in the model's own dtype, and, where compensated rounding will want it, the second moment
of the centred input, (width, width). Layers that are given the very same tensor one after the other (q, k and v;
FLUX's proj_mlp beside them) form one group, observed once.

**Hold-out.** What a layer's rounding is fitted to must not judge it. While ``Observer.is_held_out`` is set, tokens
enter the reservoir and not the second moment; otherwise the other way round (unless nothing is held out at all).
Prompts are held out whole: tokens of one prompt come back at every step.

Reductions run single-threaded in float64 (numpy; the second moment in float32 blocks of fixed size, added in float64),
so that the result does not depend on the number of threads.
"""

import copy
import weakref
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from lrqdit.errors import ModelError, NumericalError
from lrqdit.rotation import single_thread

ROWS_PER_BLOCK, ROWS_PER_PRODUCT = 4096, 1024
MAX_MOMENT_WIDTH = 16384


class ActivationStats:
    """Running statistics of one layer input with ``channels`` channels.

    Args:
        channels: width of the input.
        reservoir_size: how many tokens are kept, chosen uniformly over everything observed.
        seed: seed of that choice.
        has_moment: also sum up the second moment, (channels, channels) in float32.

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
        self._moment: Tensor | None = None  # sum of (x - shift)(x - shift)^T over the tokens that are not held out
        self._shift: Tensor | None = None
        self._moment_sum = np.zeros(channels)  # sum of x - shift over the same tokens
        self._moment_count = 0
        self._pending: list[Tensor] = []

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
        """Around the mean of the first call's tokens: a constant offset would drown in rounding what varies."""
        if self._moment is None or self._shift is None:
            width = x.shape[1]
            self._shift = torch.from_numpy(x.cpu().float().numpy().mean(axis=0, dtype=np.float64)).float().to(x.device)
            self._moment = torch.zeros(width, width, device=x.device)
        # few rows at a time would add the whole matrix for each few
        self._pending.append(x.float() - self._shift)
        if sum(len(part) for part in self._pending) >= ROWS_PER_PRODUCT:
            self._add_pending()

    def _add_pending(self) -> None:
        if self._pending:
            with single_thread():
                for rows in torch.cat(self._pending).split(ROWS_PER_BLOCK):
                    self._moment += rows.T @ rows
                    self._moment_sum += rows.cpu().numpy().sum(axis=0, dtype=np.float64)
                    self._moment_count += len(rows)
            self._pending = []

    def second_moment(self, offset: Tensor) -> Tensor | None:
        """E[(x - offset)(x - offset)^T] over the tokens that are not held out, float64 (channels, channels)."""
        if self._moment is None or self._shift is None:
            return None
        self._add_pending()
        mean = torch.from_numpy(self._moment_sum / self._moment_count)
        distance = mean + self._shift.double().cpu() - offset.double()
        central = self._moment.double().cpu() / self._moment_count
        return central.sub_(torch.outer(mean, mean)).add_(torch.outer(distance, distance))

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
        self._add_pending()
        tensors = {
            "count": torch.tensor([self.token_count, int(self.is_held_out), self._moment_count]),
            "vectors": torch.from_numpy(np.stack(vectors)),
            "tokens": self.tokens.contiguous(),
        }
        if self._moment is not None and self._shift is not None:
            tensors["moment"] = self._moment.cpu()
            tensors["moment_vectors"] = torch.stack([self._shift.double().cpu(), torch.from_numpy(self._moment_sum)])
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "ActivationStats":
        """Statistics to read from; they cannot be updated further."""
        stats = cls(tensors["tokens"].shape[1], len(tensors["tokens"]), seed=0)
        stats.tokens = tensors["tokens"]
        stats.token_count, stats.is_held_out, stats._moment_count = (int(n) for n in tensors["count"])
        stats.channel_sum, stats.channel_square_sum, stats.channel_minimum, stats.channel_maximum = (
            tensors["vectors"].numpy().copy()
        )
        if "moment" in tensors:
            shift, moment_sum = tensors["moment_vectors"]
            stats._moment, stats._shift, stats._moment_sum = tensors["moment"], shift.float(), moment_sum.numpy().copy()
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
    ) -> None:
        self._module, self._held_out_every, self._calls = module, held_out_every, 0
        self._layers = {name: module.get_submodule(name) for name in names}
        self._reservoir_size, self._seed, self._moment_bytes_left = reservoir_size, seed, moment_bytes
        self.is_held_out = False
        self._group_of: dict[str, InputGroup] = {}
        self._last: tuple[weakref.ref, int, InputGroup] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _count_call(self, *_: object) -> None:
        self.is_held_out = self._calls % self._held_out_every == self._held_out_every - 1
        self._calls += 1

    def __enter__(self) -> "Observer":
        if self._held_out_every:
            self._handles.append(self._module.register_forward_pre_hook(self._count_call))
        for name, layer in self._layers.items():
            self._handles.append(
                layer.register_forward_pre_hook(
                    lambda _, arguments, keywords, name=name: self._observe(
                        name, arguments[0] if arguments else keywords["input"]
                    ),
                    with_kwargs=True,
                )
            )
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._last = [], None

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
            moment_bytes = 4 * x.shape[-1] ** 2
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
