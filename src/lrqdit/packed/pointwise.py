"""A 1 x 1 convolution, quantized: a linear layer over the channels of each pixel."""

from typing import Any

import torch
from torch import Tensor, nn

from lrqdit.packed.format import LinearFormat
from lrqdit.packed.linear import QuantLinear


class QuantPointwise(QuantLinear):
    """y = W x + b at every pixel of x (batch, in_features, height, width); all else as in :class:`QuantLinear`."""

    def __init__(self, format: LinearFormat, dtype: torch.dtype = torch.float32, device: Any = None) -> None:
        super().__init__(format, dtype, device)
        self.in_channels, self.out_channels = format.in_features, format.out_features  # as a convolution answers

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]: torch's name is input
        return super().forward(x.movedim(-3, -1)).movedim(-1, -3)

    def to_linear(self) -> Any:
        """A dense ``nn.Conv2d`` that computes the same from unquantized activations."""
        linear = super().to_linear()
        has_bias = any(name == "bias" for name, _ in linear.named_parameters())
        dense = nn.Conv2d(
            self.in_features,
            self.out_features,
            1,
            bias=has_bias,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(linear.weight[:, :, None, None])
            if dense.bias is not None:
                dense.bias.copy_(linear.bias)
        return dense


def empty_layer(layout: LinearFormat, dtype: torch.dtype = torch.float32, device: Any = None) -> QuantLinear:
    """The layer of a format, without content."""
    return (QuantLinear if layout.channel_axis == -1 else QuantPointwise)(layout, dtype, device)
