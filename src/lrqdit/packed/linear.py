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
from lrqdit.kernels import cpu as kernels
from lrqdit.kernels import ops
from lrqdit.numerics.packing import pack
from lrqdit.numerics.principal import LowRank, split
from lrqdit.numerics.rotation import Rotation
from lrqdit.numerics.tokens import InputTransform
from lrqdit.packed.format import InputFormat, LinearFormat

DTYPES = {  # by safetensors names; their sizes stand in format.DTYPE_BYTES
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


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

    They are dropped with the tensor, too, if not every layer of the group reads it.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.entry: tuple[weakref.ref, int, Tensor, Tensor, Tensor | None] | None = None
        self.reads_left = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entry": None}  # copies and pickles leave the codes behind

    def _drop(self, reference: weakref.ref) -> None:
        if self.entry is not None and self.entry[0] is reference:
            self.entry = None

    def get(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        entry = self.entry
        if entry is None or entry[0]() is not x or x.is_inference() or entry[1] != x._version:
            return None
        self.reads_left -= 1
        if self.reads_left <= 0:
            self.entry = None
        return entry[2:]

    def put(self, x: Tensor, codes: Tensor, scale: Tensor, principal: Tensor | None) -> None:
        if self.readers > 1 and not x.is_inference():  # an inference tensor has no version to check
            self.entry = weakref.ref(x, self._drop), x._version, codes, scale, principal
            self.reads_left = self.readers - 1


class QuantLinear(nn.Linear):
    """y = x W^T + b with packed W. Built empty from its format; filled by :meth:`fill` or ``load_state_dict``.

    Args:
        format: the layer's :class:`LinearFormat`.
        dtype: what ``weight.dtype`` answers; follows ``.to(dtype)``. The output has the input's dtype, or autocast's.
        device: where the buffers are allocated.
    """

    def __init__(self, format: LinearFormat, dtype: torch.dtype = torch.float32, device: Any = None) -> None:
        nn.Module.__init__(self)
        self.format = format
        self.in_features, self.out_features = format.in_features, format.out_features
        self.shared_input = SharedInput(1)
        self.calls = kernels.LayerCalls()
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
        values = {
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
        rotation = Rotation(
            self.format.input.rotation, self.in_features, self.format.input.factors, None,
            self._float_view("block1_bits", torch.float32), self._float_view("block2_bits", torch.float32),
            self._buffers.get("permutation"),
        )  # fmt: skip
        offset, scale = (self._float_view(f"input_{name}_bits", torch.float16) for name in ("offset", "scale"))
        return InputTransform(
            rotation, offset, scale, self.format.input.clip, self.format.input.token_levels, self._low_rank("principal")
        )

    def _low_rank(self, name: str) -> LowRank | None:
        if not self.format.input.principal_rank:
            return None
        return LowRank(self._buffers[name], self._buffers[f"{name}_scale_bits"].view(torch.float32))

    def dequantize(self) -> Tensor:
        """The weight this layer multiplies with, in the original basis: float32 (out_features, in_features)."""
        transform = self.input_transform
        weight = transform.unfold(self._decode().float() * self.row_scale[:, None])
        if (outlet := self._low_rank("outlet")) is not None:
            u = transform.principal.values
            part = (outlet.values.T - transform.unsmooth(weight) @ u.T) @ u
            weight = weight + (part if transform.input_scale is None else part * transform.input_scale.float())
        return weight

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
        f = self.format
        return ops.decode_weight(self.packed, self._buffers.get("table"), f.in_features, f.out_features, f.weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ModelError(f"quantized linear: input of shape {tuple(x.shape)} must end in {self.in_features}")
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, self)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        # the first question is the cheap one
        if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(kind := x.device.type):
            return self._compute(x, x.dtype)
        # autocast would reach the float products inside the operators
        with torch.autocast(kind, enabled=False):
            return self._compute(x, torch.get_autocast_dtype(kind))

    def _compute(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        is_direct, principal = self.calls.prepare(x, self), None
        has_principal = is_direct and self.calls.takes_principal(x, out_dtype)  # inside the kernels
        if self.format.input.activation_bits == 16:
            if is_direct:
                y = self.calls.weight_only_linear(x, out_dtype)
            else:
                tokens = x.reshape(-1, self.in_features)
                y = ops.weight_only_linear(tokens, *self._input_arguments(), *self._weight_arguments(), out_dtype)
        elif not is_direct:
            codes, scale, principal = self._quantize(x, is_direct)
            y = ops.quantized_linear(codes, scale, *self._weight_arguments(), out_dtype)
        elif (found := self.shared_input.get(x)) is not None:
            codes, scale, principal = found
            y = self.calls.quantized_linear(codes, scale, out_dtype, principal if has_principal else None)
        else:
            left, principal = (x, None) if has_principal else self._split(x)
            y, codes, scale, coordinates = self.calls.linear(left, out_dtype, has_principal)
            principal = coordinates if has_principal else principal
            self.shared_input.put(x, codes, scale, principal)
        if principal is not None and not has_principal:
            principal = principal[:, : self.format.input.principal_rank]  # a kernel has an even number of columns
            y = y.addmm_(principal.to(out_dtype), self._low_rank("outlet").values.to(out_dtype))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 (tokens, in_features) and steps float32 (tokens,) of x (..., in_features)."""
        return self._quantize(x, self.calls.prepare(x, self))[:2]

    def _quantize(self, x: Tensor, is_direct: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        is_eager = not torch.compiler.is_compiling()  # a compiler merges equal calls by itself
        if is_eager and (found := self.shared_input.get(x)) is not None:
            return found
        if is_direct and self.calls.takes_principal(x):
            codes, scale, principal = self.calls.quantize_tokens(x, has_principal=True)
        else:
            left, principal = self._split(x)
            if is_direct:
                codes, scale, _ = self.calls.quantize_tokens(left)
            else:
                tokens, f = left.reshape(-1, self.in_features), self.format
                codes, scale = ops.quantize_tokens(
                    tokens, *self._input_arguments(), f.input.activation_bits, f.input.clip, f.input.token_levels
                )
        if is_eager:
            self.shared_input.put(x, codes, scale, principal)
        return codes, scale, principal

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What of x is rounded, and the coordinates of what is not, (tokens, principal_rank)."""
        if not self.format.input.principal_rank:
            return x, None
        t = self.input_transform
        return split(x.reshape(-1, self.in_features), t.principal, t.input_offset, t.input_scale)

    def _weight_arguments(self) -> tuple:
        """What the operators want to know of the weight."""
        return (
            self._buffers["packed"],
            self._buffers.get("table"),
            self._float_view("row_scale_bits", torch.float32),
            self._float_view("bias_bits", torch.float32),
            self.format.weight_bits,
        )

    def _input_arguments(self) -> tuple:
        """What the operators want to know of :attr:`input_transform`."""
        return (
            self._float_view("input_offset_bits", torch.float16),
            self._float_view("input_scale_bits", torch.float16),
            self.format.input.rotation,
            self.format.input.factors,
            self._float_view("block1_bits", torch.float32),
            self._buffers.get("permutation"),
            self._float_view("block2_bits", torch.float32),
        )

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
        return layer._forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantize().to(gradient.dtype), None


class WeightStub(torch.Tensor):
    """Answers questions about a packed weight; refuses to take part in any computation."""

    _ANSWERS = frozenset(
        {"__get__", "size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size",
         "stride", "get_device", "__len__", "type", "detach", "__hash__", "is_contiguous", "requires_grad_",
         "untyped_storage", "data_ptr"}
    )  # fmt: skip

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.__name__ in cls._ANSWERS:
            return super().__torch_function__(func, types, args, kwargs)
        raise ModelError(
            f"{func.__name__} on the weight of a quantized linear layer: it is packed and cannot be computed with or "
            "changed in place; use layer.dequantize() for its values, and keep LoRA adapters unmerged"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"WeightStub(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
