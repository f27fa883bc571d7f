"""Calls of a layer with a principal part (numerics/principal.py): what of a token passes beside its 4-bit codes.

Both classes wrap the calls of the layer without it, :class:`lrqdit.kernels.ops.LayerArgs` or
:class:`lrqdit.kernels.cpu.LayerCalls`, and answer to the same names. :class:`TorchCalls` takes the part out of the
tokens by torch, before the operators, and adds what the weight makes of it after them; :class:`KernelCalls` has the
native kernels do both inside.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrqdit import native
from lrqdit.kernels import cpu
from lrqdit.kernels.ops import Tokens
from lrqdit.numerics.principal import LowRank, split
from lrqdit.numerics.tokens import InputTransform

# the buffers of a layer that the native kernels read: U^T and C, each with the scales of its rows
BUFFERS = ("principal", "principal_scale_bits", "outlet", "outlet_scale_bits")


class TorchCalls(NamedTuple):
    """Products of torch around the calls; ``outlet`` is C."""

    calls: Any
    transform: InputTransform
    outlet: LowRank

    def quantize_tokens(self, x: Tensor) -> Tokens:
        left, coordinates = self._split(x)
        return self.calls.quantize_tokens(left)._replace(coordinates=coordinates)

    def quantized_linear(self, tokens: Tokens, out_dtype: torch.dtype) -> Tensor:
        assert tokens.coordinates is not None
        y = self.calls.quantized_linear(tokens, _wide(out_dtype))
        return self._add(y, tokens.coordinates).to(out_dtype)

    def linear(self, x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tokens]:
        left, coordinates = self._split(x)
        y, tokens = self.calls.linear(left, _wide(out_dtype))
        return self._add(y, coordinates).to(out_dtype), tokens._replace(coordinates=coordinates)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = self.transform
        assert t.principal is not None
        return split(x.reshape(-1, t.in_features), t.principal, t.input_offset, t.input_scale)

    def _add(self, y: Tensor, coordinates: Tensor) -> Tensor:
        coordinates = coordinates[:, : len(self.outlet.codes)]  # a kernel has an even number of columns
        return y.addmm_(coordinates.to(y.dtype), self.outlet.values.to(y.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which the parts of a sum are in range: a coordinate may exceed float16 where the output does not."""
    return torch.float32 if dtype == torch.float16 else dtype


class KernelCalls(NamedTuple):
    """The native kernels' own: of bfloat16 tokens and outputs, where :func:`kernels_take` the rank."""

    calls: cpu.LayerCalls
    rank: int
    addresses: list[int]  # of BUFFERS

    def quantize_tokens(self, x: Tensor) -> Tokens:
        principal, coordinates = self._describe(x.numel() // x.shape[-1])
        codes, scale, _ = self.calls.quantize_tokens(x, principal)
        return Tokens(codes, scale, coordinates)

    def quantized_linear(self, tokens: Tokens, out_dtype: torch.dtype) -> Tensor:
        principal, _kept = self._describe(len(tokens.codes), tokens.coordinates)
        return self.calls.quantized_linear(tokens, out_dtype, principal)

    def linear(self, x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tokens]:
        principal, coordinates = self._describe(x.numel() // x.shape[-1])
        y, (codes, scale, _) = self.calls.linear(x, out_dtype, principal)
        return y, Tokens(codes, scale, coordinates)

    def _describe(self, rows: int, coordinates: Tensor | None = None) -> tuple[native.Principal, Tensor]:
        """The C structure, and the coordinates that it points to: those given, or new memory."""
        if coordinates is None:
            coordinates = torch.empty(rows, self.rank + self.rank % 2, dtype=torch.bfloat16)
        elif coordinates.shape[1] % 2:  # torch's
            coordinates = F.pad(coordinates, (0, 1))
        return native.Principal(*self.addresses, self.rank, coordinates.data_ptr()), coordinates


def kernels_take(rank: int, x_dtype: torch.dtype, out_dtype: torch.dtype) -> bool:
    """Whether the native kernels, where they can be called, take a principal part of this rank themselves."""
    is_bfloat16 = x_dtype == out_dtype == torch.bfloat16
    library: Any = native.LIBRARY
    return is_bfloat16 and rank <= cpu.MAX_RANK and bool(library.lrq_has_pairs())
