"""The quantized linear layer: an ``nn.Linear`` to everyone who asks, packed codes and int8 levels inside.

All state lies in integer buffers, and the state dict is the checkpoint. Float side data (row scales, bias, input offset
and scale) is kept as the bit pattern of its float type in an integer buffer of the same width: no ``.half()``, no
loader that casts float tensors, no offloading hook can change it, and reading it back is a view.

Layers that read the same tensor share one input transform. Its first reader stores it; the others hold it in
non-persistent buffers (``input_from`` in their format names the owner) and reuse the codes that the first one computed.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lrqdit.errors import ModelError
from lrqdit.kernels import ops, principal
from lrqdit.kernels.cpu import LayerCalls
from lrqdit.kernels.ops import LayerArgs, Rounding, Tokens, TransformArgs, WeightArgs
from lrqdit.numerics.packing import pack
from lrqdit.numerics.principal import LowRank
from lrqdit.numerics.tokens import InputTransform
from lrqdit.packed.format import InputFormat, LinearFormat

DTYPES = {  # by safetensors names; their sizes stand in format.DTYPE_BYTES
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # pyright: ignore[reportPrivateUsage]: no public name


def describe_input(transform: InputTransform, activation_bits: int) -> InputFormat:
    """The format of an input transform."""
    return InputFormat(
        transform.in_features,
        activation_bits,
        transform.rotation.kind,
        transform.rotation.factors,
        transform.clip,
        transform.levels,
        principal_rank=0 if transform.principal is None else len(transform.principal.codes),
        has_offset=transform.input_offset is not None,
        has_scale=transform.input_scale is not None,
    )


class SharedInput:
    """The codes of the last tensor that a group of layers quantized, dropped after the group's last reader.

    They are dropped with the tensor, too, if not every layer of the group reads it. A compiler, which merges equal
    calls by itself, finds nothing here.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.entry: tuple[weakref.ref[Tensor], int, Tokens] | None = None
        self.reads_left = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entry": None}  # copies and pickles leave the codes behind

    def _drop(self, reference: weakref.ref[Tensor]) -> None:
        if self.entry is not None and self.entry[0] is reference:
            self.entry = None

    def get(self, x: Tensor) -> Tokens | None:
        entry = None if torch.compiler.is_compiling() else self.entry
        if entry is None or entry[0]() is not x or x.is_inference() or entry[1] != x._version:
            return None
        self.reads_left -= 1
        if self.reads_left <= 0:
            self.entry = None
        return entry[2]

    def put(self, x: Tensor, tokens: Tokens) -> None:
        # an inference tensor has no version to check
        if self.readers > 1 and not torch.compiler.is_compiling() and not x.is_inference():
            self.entry = weakref.ref(x, self._drop), x._version, tokens
            self.reads_left = self.readers - 1


class QuantLinear(nn.Linear):
    """y = x W^T + b with packed W. Built empty from its format; filled by :meth:`fill` or ``load_state_dict``.

    Args:
        format: the layer's :class:`LinearFormat`.
        dtype: what ``weight.dtype`` answers; follows ``.to(dtype)``. The output has the input's dtype, or autocast's.
        device: where the buffers are allocated.
    """

    # nn.Module says Tensor | Module of an attribute, and Tensor | None of a buffer
    packed: Tensor
    row_scale_bits: Tensor
    _dtype_marker: Tensor
    _buffers: dict[str, Any]

    def __init__(self, format: LinearFormat, dtype: torch.dtype = torch.float32, device: Any = None) -> None:
        nn.Module.__init__(self)
        self.format = format
        self.in_features, self.out_features = format.in_features, format.out_features
        self.shared_input = SharedInput(1)
        self.calls = LayerCalls()
        stored = format.buffers()
        for name, (shape, kind) in (format.weight_buffers() | format.input.buffers()).items():
            buffer = torch.zeros(shape, dtype=DTYPES[kind], device=device)
            self.register_buffer(name, buffer, persistent=name in stored)
        marker = torch.empty(0, dtype=dtype, device=device)
        self.register_buffer("_dtype_marker", marker, persistent=False)

    def fill(
        self, codes: Tensor, table: Tensor | None, row_scale: Tensor, bias: Tensor | None, transform: InputTransform,
        outlet: LowRank | None = None,
    ) -> "QuantLinear":  # fmt: skip
        """Set every buffer. codes (out, in) uint8, table int8, row_scale and bias float32; returns self."""
        rotation, principal = transform.rotation, transform.principal
        values: dict[str, Any] = {
            "packed": pack(codes, self.format.weight_bits),
            "table": table,
            "row_scale_bits": row_scale.float().view(torch.int32),
            "bias_bits": None if bias is None else bias.float().view(torch.int32),
            "input_offset_bits": None if transform.input_offset is None else transform.input_offset.view(torch.int16),
            "input_scale_bits": None if transform.input_scale is None else transform.input_scale.view(torch.int16),
            "block1_bits": None if rotation.block1 is None else rotation.block1.view(torch.int32),
            "block2_bits": None if rotation.block2 is None else rotation.block2.view(torch.int32),
            "permutation": rotation.permutation,
            "principal": principal and principal.codes,
            "principal_scale_bits": principal and principal.scale.view(torch.int32),
            "outlet": outlet and outlet.codes,
            "outlet_scale_bits": outlet and outlet.scale.view(torch.int32),
        }
        for name, buffer in self.named_buffers():
            if name != "_dtype_marker":
                buffer.copy_(values[name])
        return self

    def share_input(self, owner: "QuantLinear") -> None:
        """Read the same input transform as ``owner``, and reuse the codes it computes."""
        for name in self.format.input.buffers():
            setattr(self, name, getattr(owner, name).to(self.packed.device))
        if self.shared_input is not owner.shared_input:
            owner.shared_input.readers += 1
            self.shared_input = owner.shared_input

    def _float_view(self, name: str, dtype: torch.dtype) -> Tensor | None:
        buffer = self._buffers.get(name)
        return None if buffer is None else buffer.view(dtype)

    @property
    def row_scale(self) -> Tensor:
        """float32 (out_features,)."""
        return self.row_scale_bits.view(torch.float32)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """float32 (out_features,), the folded channel mean W mu included; None if the layer has none."""
        return self._float_view("bias_bits", torch.float32)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A stand-in without storage that answers dtype, device and shape; any arithmetic on it is an error."""
        marker = self._dtype_marker
        stub = torch.empty((1, 1), dtype=marker.dtype, device=marker.device).expand(self.out_features, self.in_features)
        return stub.as_subclass(WeightStub)

    @property
    def input_transform(self) -> InputTransform:
        """The centring, smoothing, rotation and clip of this layer's input, as views of its buffers."""
        f, t = self.format.input, self.arguments().transform
        rotation = t.build_rotation(self.in_features)
        principal = self._low_rank("principal") if f.principal_rank else None
        return InputTransform(rotation, t.input_offset, t.input_scale, f.clip, f.token_levels, principal)

    def _low_rank(self, name: str) -> LowRank:
        return LowRank(self._buffers[name], self._buffers[f"{name}_scale_bits"].view(torch.float32))

    def dequantize(self) -> Tensor:
        """The weight this layer multiplies with, in the original basis: float32 (out_features, in_features)."""
        weight = self._decode().float() * self.row_scale[:, None]
        acting = self._low_rank("outlet") if self.format.input.principal_rank else None
        return ops.unfold(self.input_transform, weight, acting)

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` that computes the same from unquantized activations."""
        weight, offset = self.dequantize(), self.input_transform.input_offset
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, torch.float32)
        with torch.no_grad():
            dense.weight.copy_(weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias if offset is None else self.bias - weight @ offset.float())
        return dense.to(self._dtype_marker.dtype)

    def _decode(self) -> Tensor:
        return ops.decode_weight(self.arguments().weight, self.in_features)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]: torch's name is input
        if x.shape[-1] != self.in_features:
            raise ModelError(f"quantized linear: input of shape {tuple(x.shape)} must end in {self.in_features}")
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, self)
        # the first question is the cheap one
        if not _is_any_autocast_enabled() or not torch.is_autocast_enabled(kind := x.device.type):
            y = self._compute(x, x.dtype)
        else:
            with torch.autocast(kind, enabled=False):  # it would reach the float products inside the operators
                y = self._compute(x, torch.get_autocast_dtype(kind))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _compute(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        calls = self._calls(x, out_dtype)
        if self.format.input.activation_bits == 16:
            return calls.weight_only_linear(x, out_dtype)
        if (tokens := self.shared_input.get(x)) is not None:
            return calls.quantized_linear(tokens, out_dtype)
        y, tokens = calls.linear(x, out_dtype)
        self.shared_input.put(x, tokens)
        return y

    def quantize_input(self, x: Tensor) -> Tokens:
        """The codes and steps of x (..., in_features), computed or shared."""
        if (tokens := self.shared_input.get(x)) is None:
            tokens = self._calls(x, x.dtype).quantize_tokens(x)
            self.shared_input.put(x, tokens)
        return tokens

    def _calls(self, x: Tensor, out_dtype: torch.dtype) -> Any:
        """What computes on x: the native kernels directly where they can be called, else the operators."""
        has_kernels = self.calls.prepare(x, out_dtype, self)
        calls = self.calls if has_kernels else self.arguments()
        if not (rank := self.format.input.principal_rank):
            return calls
        if has_kernels and principal.kernels_take(rank, x.dtype, out_dtype):
            buffers = [getattr(self, name) for name in principal.BUFFERS]
            return principal.KernelCalls(self.calls, rank, [buffer.data_ptr() for buffer in buffers])
        return principal.TorchCalls(calls, self.input_transform, self._low_rank("outlet"))

    def arguments(self) -> LayerArgs:
        """What the operators are told of this layer, as views of its buffers."""
        f = self.format
        transform = TransformArgs(
            self._float_view("input_offset_bits", torch.float16),
            self._float_view("input_scale_bits", torch.float16),
            f.input.rotation,
            f.input.factors,
            self._float_view("block1_bits", torch.float32),
            self._buffers.get("permutation"),
            self._float_view("block2_bits", torch.float32),
        )
        weight = WeightArgs(
            self._buffers["packed"],
            self._buffers.get("table"),
            self._buffers["row_scale_bits"].view(torch.float32),
            self._float_view("bias_bits", torch.float32),
            f.weight_bits,
        )
        return LayerArgs(transform, Rounding(f.input.activation_bits, f.input.clip, f.input.token_levels), weight)

    def extra_repr(self) -> str:
        f = self.format
        return (
            f"{f.in_features} -> {f.out_features}, w{f.weight_bits}a{f.input.activation_bits}, {f.codebook}, "
            f"rotation={f.input.rotation}"
        )


class _StraightThrough(torch.autograd.Function):
    """Gradient to x as if nothing were rounded: dL/dx = (dL/dy) W with the dequantized W (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return QuantLinear.forward(layer, x)  # gradients are off in here

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.dequantize().to(gradients[0].dtype), None


class WeightStub(torch.Tensor):
    """Answers questions about a packed weight; refuses to take part in any computation."""

    _ANSWERS = frozenset(
        {"__get__", "size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size",
         "stride", "get_device", "__len__", "type", "detach", "__hash__", "is_contiguous", "requires_grad_",
         "untyped_storage", "data_ptr"}
    )  # fmt: skip

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in cls._ANSWERS:
            return super().__torch_function__(func, types, args, kwargs)
        raise ModelError(
            f"{func.__name__} on the weight of a quantized linear layer: it is packed and cannot be computed with or "
            "changed in place; use layer.dequantize() for its values, and keep LoRA adapters unmerged"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"WeightStub(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
