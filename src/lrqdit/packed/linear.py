"""The quantized linear layer: an ``nn.Linear`` to everyone who asks, packed codes and int8 levels inside.

All state lies in frozen integer parameters, which offloading moves as it moves every weight. Float side data (row
scales, bias, input offset and scale) is kept as the bit pattern of its float type in an integer of the same width: no
``.half()`` and no loader that casts float tensors can change it, and reading it back is a view. One float parameter of
a single zero, which no file holds, comes first: models ask a module for the dtype of its first parameter.

Layers that read the same tensor share one input transform. Its first reader stores it; the others hold copies in
non-persistent buffers (``input_from`` in their format names the owner) and reuse the codes that the first one computed.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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
MARKER = "_dtype_marker"  # the parameter that no file holds
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

    They are dropped with the tensor, too, if not every layer of the group reads it. A compiler merges equal calls by
    itself; it finds the handle of one of the layers here, and so sees that they are equal.
    """

    def __init__(self, readers: int, handle: Tensor) -> None:
        self.readers, self.handle = readers, handle
        self.entry: tuple[weakref.ref[Tensor], int, Tokens] | None = None
        self.reads_left = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entry": None}  # copies and pickles leave the codes behind

    def _drop(self, reference: weakref.ref[Tensor]) -> None:
        if self.entry is not None and self.entry[0] is reference:
            self.entry = None

    def get(self, x: Tensor) -> Tokens | None:
        entry = None if torch.compiler.is_compiling() else self.entry  # in an export
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
        device: where the tensors are allocated.
    """

    # nn.Module says Tensor | Module of an attribute, and Tensor | None of a buffer
    packed: Tensor
    row_scale_bits: Tensor
    _dtype_marker: Tensor
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    def __init__(self, format: LinearFormat, dtype: torch.dtype = torch.float32, device: Any = None) -> None:
        nn.Module.__init__(self)
        self.format = format
        self.in_features, self.out_features = format.in_features, format.out_features
        self.handle = ops.make_handle(self)
        self.shared_input = SharedInput(1, self.handle)
        self.calls = LayerCalls()
        self.answer_dtype(dtype, device)
        stored = format.buffers()
        for name, (shape, kind) in (format.weight_buffers() | format.input.buffers()).items():
            tensor = torch.zeros(shape, dtype=DTYPES[kind], device=device)
            if name in stored:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor, persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = self.shared_input.handle = ops.make_handle(self)  # a copy is another layer

    def answer_dtype(self, dtype: torch.dtype, device: Any = None) -> None:
        """Set what ``weight.dtype`` answers."""
        marker = nn.Parameter(torch.zeros(1, dtype=dtype, device=device), requires_grad=False)
        self._parameters = {MARKER: marker, **{k: v for k, v in self._parameters.items() if k != MARKER}}

    def tensors(self) -> dict[str, Tensor]:
        """The integer tensors by name: those stored, and the copies of a shared input transform."""
        return {name: tensor for name, tensor in (self._parameters | self._buffers).items() if name != MARKER}

    def fill(
        self, codes: Tensor, table: Tensor | None, row_scale: Tensor, bias: Tensor | None, transform: InputTransform,
        outlet: LowRank | None = None,
    ) -> "QuantLinear":  # fmt: skip
        """Set every tensor. codes (out, in) uint8, table int8, row_scale and bias float32; returns self."""
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
        for name, tensor in self.tensors().items():
            tensor.copy_(values[name])
        return self

    def share_input(self, owner: "QuantLinear") -> None:
        """Read the same input transform as ``owner``, and reuse the codes it computes."""
        if not owner.packed.is_meta:  # offloaded to disk: the loader has copied it
            self.copy_transform(owner.tensors())
        if self.shared_input is not owner.shared_input:
            owner.shared_input.readers += 1
            self.shared_input = owner.shared_input

    def copy_transform(self, stored: Mapping[str, Tensor]) -> None:
        """Hold copies of those tensors of the owner's input transform that are there, by name."""
        device = "cpu" if self.packed.is_meta else self.packed.device
        for name in self.format.input.buffers().keys() & stored.keys():
            # of its own: offloading moves a layer at a time
            self._buffers[name] = stored[name].detach().to(device=device, copy=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **keywords: Any) -> None:
        state_dict.setdefault(prefix + MARKER, self._dtype_marker)  # no file holds it
        super()._load_from_state_dict(state_dict, prefix, *rest, **keywords)

    def _tensor(self, name: str) -> Any:
        found = self._parameters.get(name)
        return self._buffers.get(name) if found is None else found

    def _float_view(self, name: str, dtype: torch.dtype) -> Tensor | None:
        tensor = self._tensor(name)
        return None if tensor is None else tensor.view(dtype)

    @property
    def row_scale(self) -> Tensor:
        """float32 (out_features,)."""
        return self.row_scale_bits.view(torch.float32)

    @property
    def folded_bias(self) -> Tensor | None:
        """float32 (out_features,), the channel mean W mu included; None if the layer adds nothing."""
        return self._float_view("bias_bits", torch.float32)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """A stand-in (out_features,) like :attr:`weight`, None if the layer adds nothing.

        It is the b of ``x W^T + b`` with the dequantized W, not :attr:`folded_bias` where a channel mean is subtracted.
        """
        if "bias_bits" not in self._parameters:
            return None
        return self._stand_in((self.out_features,), QuantLinear._unfolded_bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A stand-in without storage that answers dtype, device and shape, see :class:`WeightStub`."""
        return self._stand_in((self.out_features, self.in_features), QuantLinear.dequantize)

    def _stand_in(self, shape: tuple[int, ...], compute: "Callable[[QuantLinear], Tensor]") -> Tensor:
        marker = self._dtype_marker
        one = torch.empty((1,) * len(shape), dtype=marker.dtype, device=marker.device)
        stub = one.expand(shape).as_subclass(WeightStub)
        stub.source = self, compute
        return stub

    def _unfolded_bias(self) -> Tensor:
        offset, folded = self.input_transform.input_offset, self.folded_bias
        assert folded is not None
        return folded if offset is None else folded - self.dequantize() @ offset.float()

    @property
    def input_transform(self) -> InputTransform:
        """The centring, smoothing, rotation and clip of this layer's input, as views of its tensors."""
        f, t = self.format.input, self.arguments().transform
        rotation = t.build_rotation(self.in_features)
        principal = self._low_rank("principal") if f.principal_rank else None
        return InputTransform(rotation, t.input_offset, t.input_scale, f.clip, f.token_levels, principal)

    def _low_rank(self, name: str) -> LowRank:
        return LowRank(self._tensor(name), self._tensor(f"{name}_scale_bits").view(torch.float32))

    def dequantize(self) -> Tensor:
        """The weight this layer multiplies with, in the original basis: float32 (out_features, in_features)."""
        weight = self._decode().float() * self.row_scale[:, None]
        acting = self._low_rank("outlet") if self.format.input.principal_rank else None
        return ops.unfold(self.input_transform, weight, acting)

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` that computes the same from unquantized activations."""
        has_bias = "bias_bits" in self._parameters
        dense = nn.Linear(self.in_features, self.out_features, has_bias, self.packed.device, torch.float32)
        with torch.no_grad():
            dense.weight.copy_(self.dequantize())
            if has_bias:
                dense.bias.copy_(self._unfolded_bias())
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
            y = self._dispatch(x, x.dtype)
        else:
            with torch.autocast(kind, enabled=False):  # it would reach the float products inside the operators
                y = self._dispatch(x, torch.get_autocast_dtype(kind))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _dispatch(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self.compute(x, out_dtype)
        x = x.reshape(-1, self.in_features)
        if self.format.input.activation_bits in (4, 16):  # of 4 bits some have a principal part, which would show
            return ops.layer_linear(x, self.handle, self.out_features, out_dtype)
        tokens = ops.layer_tokens(x, self.shared_input.handle)
        return ops.layer_product(*tokens, self.handle, self.out_features, out_dtype)

    def compute(self, x: Tensor, out_dtype: torch.dtype, is_shared: bool = True) -> Tensor:
        """The output (tokens, out_features) of x (..., in_features).

        ``is_shared=False`` leaves :attr:`shared_input` alone: a compiler writes other values into a tensor unseen.
        """
        calls = self.calls_for(x, out_dtype)
        if self.format.input.activation_bits == 16:
            return calls.weight_only_linear(x, out_dtype)
        if is_shared and (tokens := self.shared_input.get(x)) is not None:
            return calls.quantized_linear(tokens, out_dtype)
        y, tokens = calls.linear(x, out_dtype)
        if is_shared:
            self.shared_input.put(x, tokens)
        return y

    def quantize_input(self, x: Tensor) -> Tokens:
        """The codes and steps of x (..., in_features), computed or shared."""
        if (tokens := self.shared_input.get(x)) is None:
            tokens = self.calls_for(x, x.dtype).quantize_tokens(x)
            self.shared_input.put(x, tokens)
        return tokens

    def calls_for(self, x: Tensor, out_dtype: torch.dtype) -> Any:
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
        """What the operators are told of this layer, as views of its tensors."""
        f = self.format
        transform = TransformArgs(
            self._float_view("input_offset_bits", torch.float16),
            self._float_view("input_scale_bits", torch.float16),
            f.input.rotation,
            f.input.factors,
            self._float_view("block1_bits", torch.float32),
            self._tensor("permutation"),
            self._float_view("block2_bits", torch.float32),
        )
        weight = WeightArgs(
            self._parameters["packed"],
            self._parameters.get("table"),
            self._parameters["row_scale_bits"].view(torch.float32),
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
    """Answers questions about a packed weight or bias for nothing; computed with, it is dequantized for that moment.

    So DoRA, attention that multiplies with its owner's weights and LoRA files that widen a layer have their values. It
    cannot be changed: what is written to it would be lost.
    """

    source: tuple[QuantLinear, Callable[[QuantLinear], Tensor]]
    _is_hf_initialized = True  # transformers initializes no weight that says so
    _ANSWERS = frozenset(
        {"size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size", "stride",
         "get_device", "__len__", "__hash__", "is_contiguous", "untyped_storage", "data_ptr"}
    )  # fmt: skip
    _ITSELF = frozenset({"detach", "requires_grad_"})  # and ``.data``
    _CHANGES = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ior__", "__iand__"})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, first = func.__name__, next(iter((*args, *kwargs.values())), None)
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__set__" and attribute == "requires_grad":
            return None  # frozen anyway
        if name in cls._ANSWERS or (name == "type" and len(args) + len(kwargs) == 1):
            return super().__torch_function__(func, types, args, kwargs)
        if name in cls._ITSELF:
            return first
        if name == "__get__":
            if attribute == "data":
                return first
            found = super().__torch_function__(func, types, args, kwargs)
            if not isinstance(found, cls):
                return found
        is_in_place = name.endswith("_") and not name.endswith("__")
        is_target = isinstance(kwargs.get("out"), cls)
        if is_target or (isinstance(first, cls) and (is_in_place or name in cls._CHANGES or name == "__set__")):
            raise ModelError(
                f"{name if attribute == '' else attribute} on the weight of a quantized linear layer: it is packed and "
                "cannot be changed. Keep adapters unmerged, or merge them for good with lrqdit.fuse_lora; start a LoRA "
                "with init_lora_weights=True or 'gaussian', not with PiSSA, OLoRA, CorDA or LoftQ, which change the "
                "weights below; layer.dequantize() has the values"
            )
        if name in ("cat", "concat", "concatenate"):
            raise ModelError(
                "the projections of quantized layers are not fused (fuse_qkv_projections): layers that read one tensor "
                "quantize it once as they are; leave them apart"
            )
        args, kwargs = tree_map_only(cls, cls._dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def _dequantize(self) -> Tensor:
        layer, compute = self.source
        if layer.packed.is_meta:
            raise ModelError(
                "the weight of a quantized linear layer is asked for while it is offloaded; remove the offloading "
                "first (pipe.remove_all_hooks()), and switch it on again afterwards"
            )
        return compute(layer).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"WeightStub(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
