"""The input side of a quantized linear layer: centre, smooth, rotate, then quantize token by token.

With mu the channel mean, m the smoothing vector and R the rotation, a layer's input becomes

    x~ = ((x - mu) * m) R        and its weight        W~ = (W / m) R,

so that x~ W~^T + (b + W mu) = x W^T + b exactly. The random signs that come before a rotation multiply m: the stored
vector ``input_scale`` is m * signs, and R is the rotation alone. Each token of x~ is quantized symmetrically with the
step

    delta = clip * max|x~| / (2^(bits-1) - 1),    codes clamped to [-2^(bits-1), 2^(bits-1) - 1].

After a rotation tokens are close to Gaussian, and sixteen levels are better spent unevenly: with ``normal`` levels a
4-bit token is rounded on the 8-bit grid and then to the nearest of NORMAL_LEVELS, the Lloyd-Max levels of a Gaussian
(Max 1960) as int8, which are its codes. The product is of int8 anyway, so they cost nothing there.

Smoothing: m_j = w_j^alpha / a_j^(1-alpha), a_j = max |x_j - mu_j|, w_j = max_i |W_ij| (SmoothQuant, arXiv 2211.10438,
with the exponent's meaning of ViDiT-Q, arXiv 2406.02540), normalized to geometric mean 1 (a common factor cancels in
the per-token and per-row scales) and stored in float16; the rounded vector is the one that is folded, so nothing is
lost.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrqdit.numerics.principal import LowRank
from lrqdit.numerics.rotation import Rotation

TOKEN_LEVELS = ("uniform", "normal")
NORMAL_LEVELS = (6, 18, 31, 44, 58, 75, 96, 127)  # of either sign; 0.1284 ... 2.7326 sigma, the largest 127
SMOOTHING_RANGE = 1024.0
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclass(frozen=True)
class InputTransform:
    """What a layer, or several layers that read the same tensor, do to their input before it is quantized.

    :func:`lrqdit.kernels.ops.fold` makes the weight that goes with it.

    Args:
        rotation: R.
        input_offset: float16 (in_features,), the channel means mu, or None.
        input_scale: float16 (in_features,), smoothing times the rotation's signs, or None.
        clip: ratio of the per-token absmax that maps to the largest code.
        levels: one of TOKEN_LEVELS; ``normal`` is for 4 bits.
        principal: directions of the centred and smoothed input that stay unquantized, :mod:`lrqdit.numerics.principal`.
    """

    rotation: Rotation
    input_offset: Tensor | None
    input_scale: Tensor | None
    clip: float = 1.0
    levels: Literal["uniform", "normal"] = "uniform"
    principal: LowRank | None = None

    @property
    def in_features(self) -> int:
        return self.rotation.in_features

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in_features), any float dtype -> x~ float32, without its principal part."""
        x = self.smooth(x)
        if self.principal is not None:
            u = self.principal.values
            x = x - (x @ u.T) @ u
        return self.rotation.apply(x)

    def smooth(self, x: Tensor) -> Tensor:
        """(x - mu) * m, float32, of x (..., in_features)."""
        x = x.float()
        if self.input_offset is not None:
            x = x - self.input_offset.float()
        return x if self.input_scale is None else x * self.input_scale.float()

    def unsmooth(self, weight: Tensor) -> Tensor:
        """W / m, float32."""
        return weight.float() if self.input_scale is None else weight.float() / self.input_scale.float()


@functools.cache
def normal_lookup() -> Tensor:
    """int8 (256,): the level for every 8-bit code, at code + 128; of two equally near ones the larger in magnitude."""
    with torch.inference_mode(False):
        levels = torch.tensor(NORMAL_LEVELS, dtype=torch.int64)
        codes = torch.arange(-128, 128, dtype=torch.int64)
        nearest = levels[torch.searchsorted(levels[1:] + levels[:-1], 2 * codes.abs(), right=True)]
        return torch.where(codes < 0, -nearest, nearest).to(torch.int8)


def quantize_tokens(x: Tensor, bits: int, clip: float = 1.0, levels: str = "uniform") -> tuple[Tensor, Tensor]:
    """Dynamic symmetric quantization, one step per token.

    Args:
        x: float32 (tokens, channels), already transformed.
        bits: 4, 6 or 8.
        clip: ratio of the absmax that maps to the largest code.
        levels: one of TOKEN_LEVELS.

    Returns:
        Codes int8 (tokens, channels) and steps float32 (tokens,); a token of zeros gets step 0.
    """
    largest = 127.0 if levels == "normal" else 2.0 ** (bits - 1) - 1
    scale = x.abs().amax(dim=-1) * (clip / largest)
    inverse = torch.where(scale > torch.finfo(torch.float32).tiny, 1 / scale, torch.zeros_like(scale))
    codes = (x * inverse[..., None]).round().clamp(-largest - 1, largest).to(torch.int8)
    return (normal_lookup().to(x.device)[codes.long() + 128] if levels == "normal" else codes), scale


def dequantize_tokens(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (tokens, channels) int8 and steps (tokens,) -> float32 (tokens, channels)."""
    return codes.float() * scale[..., None]


def smoothing_vector(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """m_j = w_j^alpha / a_j^(1-alpha), float16 (in_features,), geometric mean 1; 1 where w_j or a_j is 0."""
    a, w = activation_absmax.double(), weight_absmax.double()
    is_alive = (a > 0) & (w > 0)
    if not bool(is_alive.any()):
        return torch.ones_like(a, dtype=torch.float16)
    log = torch.where(is_alive, alpha * w.log() - (1 - alpha) * a.log(), torch.zeros_like(a))
    log = torch.where(is_alive, log - log[is_alive].mean(), log)
    return log.exp().clamp(1 / SMOOTHING_RANGE, SMOOTHING_RANGE).to(torch.float16)
