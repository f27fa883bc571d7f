"""Running statistics of what a linear layer reads: five vectors, a reservoir of tokens, second moments."""

import numpy as np
import torch
from torch import Tensor

from lrqdit.calibration.moments import ROWS_PER_BLOCK, SecondMoment, project_gradient


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
        tokens_a_picture: the most that were read of one picture in a call.
    """

    def __init__(self, channels: int, reservoir_size: int, seed: int, has_moment: bool = False) -> None:
        self.token_count = self.tokens_a_picture = 0
        self.channel_sum = np.zeros(channels)
        self.channel_square_sum = np.zeros(channels)
        self.channel_minimum = np.full(channels, np.inf)
        self.channel_maximum = np.full(channels, -np.inf)
        self.tokens: Tensor | None = None
        self._priorities = torch.empty(0, dtype=torch.float32)
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
            self.tokens, self._priorities, self.is_held_out = None, torch.empty(0, dtype=torch.float32), True
        if is_held_out == self.is_held_out:
            self._sample(x)
        if self._has_moment and not is_held_out:
            self._add_moment(x)

    def note_tokens(self, tokens_a_picture: int) -> None:
        """Note how many tokens of each picture a call read."""
        self.tokens_a_picture = max(self.tokens_a_picture, tokens_a_picture)

    def _add_moment(self, x: Tensor) -> None:
        if self._moment is None:  # around the mean of the first call's tokens
            shift = torch.from_numpy(x.cpu().float().numpy().mean(axis=0, dtype=np.float64)).float().to(x.device)
            self._moment = SecondMoment(shift)
        self._moment.add(x.float() - self._moment.shift, torch.ones(len(x), dtype=torch.float32))

    def add_gradient(self, name: str, gradient: Tensor, x: Tensor, pictures: int) -> None:
        """Add what tokens, seen before, do to the model's output through a layer.

        Args:
            name: of the layer.
            gradient: of a random projection of the model's output to the layer's output, (batch, tokens, out_features).
            x: the tokens, (batch, tokens, channels).
            pictures: how many these are; the batch, or more where their tokens are mixed in one row of it.
        """
        if self._moment is None:
            return
        rows, weights = project_gradient(gradient.detach(), x.detach(), self._moment.shift, self._sign_generator)
        if self._output_moment is None:
            self._output_moment = SecondMoment(self._moment.shift)
        is_finite = rows.isfinite().all(dim=1) & weights.isfinite()
        self._output_moment.add(rows[is_finite], weights[is_finite].cpu())
        total, count = self._energy.get(name, (0.0, 0))
        squares = np.square(rows[is_finite].cpu().numpy(), dtype=np.float64)
        self._energy[name] = total + float(squares.sum()), count + pictures

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
        priorities = torch.rand(len(x), generator=generator, dtype=torch.float32)
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
            "count": torch.tensor([self.token_count, int(self.is_held_out), self.tokens_a_picture], dtype=torch.int64),
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
        counts = [*map(int, tensors["count"]), 0]  # an older folder does not say how many tokens a picture has
        stats.token_count, stats.is_held_out, stats.tokens_a_picture = counts[:3]
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
