"""The format of a quantized linear layer: everything needed to allocate it and to read its buffers.

Nothing here imports torch: a checkpoint is described from its configuration and the headers of its files.
docs/FORMAT.md has every byte.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lrqdit.config import ACTIVATION_BITS, TRELLIS_BITS, WEIGHT_BITS, check_types
from lrqdit.errors import CheckpointError
from lrqdit.numerics.shapes import check_factors, packed_shape

FORMAT_NAME = "lrqdit"
# what diffusers' folders say instead: its error names the unknown method, to who has not imported the package
FORMAT_NAME_WITH_ADVICE = 'lrqdit: run "import lrqdit" first'
FORMAT_NAMES = (FORMAT_NAME, FORMAT_NAME_WITH_ADVICE)
FORMAT_VERSION = 1
Buffers = dict[str, tuple[tuple[int, ...], str]]  # by name the shape, and the dtype by its safetensors name
DTYPE_BYTES = {  # by safetensors names
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
    "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class InputFormat:
    """What a layer does to its input before the product; equal for all layers that share one input transform.

    Args:
        in_features: width of the input.
        activation_bits: 4, 6, 8 or 16 (weight-only).
        rotation: kind of the rotation.
        factors: its Kronecker factors (or block sizes).
        clip: ratio of the per-token absmax that maps to the largest code.
        token_levels: one of :data:`lrqdit.numerics.tokens.TOKEN_LEVELS`; ``normal`` for 4-bit activations only.
        principal_rank: input directions that pass beside the codes (:mod:`lrqdit.numerics.principal`); 0 for none.
        has_offset, has_scale: whether channel means are subtracted, whether channels are multiplied.
    """

    in_features: int
    activation_bits: int
    rotation: str = "none"
    factors: tuple[int, ...] = ()
    clip: float = 1.0
    token_levels: Literal["uniform", "normal"] = "uniform"
    principal_rank: int = 0
    has_offset: bool = False
    has_scale: bool = False

    def buffers(self) -> Buffers:
        """The buffers that hold the input transform."""
        width, rank = self.in_features, self.principal_rank
        found: Buffers = {}
        if self.has_offset:
            found["input_offset_bits"] = (width,), "I16"
        if self.has_scale:
            found["input_scale_bits"] = (width,), "I16"
        if rank:
            found |= {"principal": ((rank, width), "I8"), "principal_scale_bits": ((rank,), "I32")}
        if self.rotation == "outlier":
            found["block1_bits"] = found["block2_bits"] = (self.factors[0],) * 2, "I32"
            found["permutation"] = (width,), "I32"
        return found

    def check(self) -> None:
        """Raise ValueError or TypeError for what no layer can have."""
        check_types(self)
        if not (self.in_features > 0 and 0 < self.clip <= 1):
            raise ValueError(f"in_features={self.in_features}, clip={self.clip}")
        if self.activation_bits not in ACTIVATION_BITS:
            raise ValueError(f"activation_bits={self.activation_bits}")
        if self.token_levels != "uniform" and self.activation_bits != 4:
            raise ValueError(f"token_levels={self.token_levels!r} at {self.activation_bits} bits")
        if not 0 <= self.principal_rank <= self.in_features or (self.principal_rank and self.activation_bits == 16):
            raise ValueError(f"principal_rank={self.principal_rank} at {self.activation_bits} bits")
        check_factors(self.rotation, self.in_features, self.factors)


@dataclasses.dataclass(frozen=True)
class LinearFormat:
    """The whole of a quantized linear layer: its input, its weight, and what is stored of both.

    Args:
        input: the format of the input.
        out_features: rows of the weight.
        weight_bits: 2 to 6, or 8.
        codebook: kind of the levels.
        table_rows: rows of the int8 table: 1, out_features, or 0 for 8-bit codes, which need none.
        is_trellis: the codes are a path through one table of twice as many levels, :mod:`lrqdit.numerics.trellis`.
        has_bias: whether a bias is stored.
        has_original_bias: whether the layer had a bias before centring gave it one.
        input_from: name of the layer whose input transform this one shares, or None.
        channel_axis: of the input: -1, or -3 where the layer is a 1 x 1 convolution (batch, channels, height, width).
    """

    input: InputFormat
    out_features: int
    weight_bits: int
    codebook: str = "twin_log"
    table_rows: int = 1
    is_trellis: bool = False
    has_bias: bool = True
    has_original_bias: bool = True
    input_from: str | None = None
    channel_axis: Literal[-1, -3] = -1

    @property
    def in_features(self) -> int:
        return self.input.in_features

    def at_bits(self, weight_bits: int, has_trellis: bool, has_table_per_row: bool = False) -> "LinearFormat":
        """The same layer at other weight bits, on a trellis where these bits have one."""
        rows = 0 if weight_bits == 8 else self.out_features if has_table_per_row else 1
        is_trellis = has_trellis and weight_bits in TRELLIS_BITS
        return dataclasses.replace(self, weight_bits=weight_bits, table_rows=rows, is_trellis=is_trellis)

    def weight_buffers(self) -> Buffers:
        """The buffers that hold the weight and the bias."""
        out, rank = self.out_features, self.input.principal_rank
        found: Buffers = {"packed": (packed_shape(out, self.in_features, self.weight_bits), "U8")}
        if self.table_rows:
            found["table"] = (self.table_rows, (2 if self.is_trellis else 1) << self.weight_bits), "I8"
        found["row_scale_bits"] = (out,), "I32"
        if self.has_bias:
            found["bias_bits"] = (out,), "I32"
        if rank:
            found |= {"outlet": ((rank, out), "I8"), "outlet_scale_bits": ((rank,), "I32")}
        return found

    def buffers(self) -> Buffers:
        """What a checkpoint stores of the layer: a shared input transform is stored by its owner alone."""
        return self.weight_buffers() | (self.input.buffers() if self.input_from is None else {})

    @property
    def size_bytes(self) -> int:
        """Bytes of :meth:`buffers`."""
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in self.buffers().values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values, those of the input among them; settings at their default are left out."""
        found = {}
        for record in (self.input, self):
            for field in dataclasses.fields(record):
                value = getattr(record, field.name)
                if field.name != "input" and value != field.default:
                    found[field.name] = list(value) if isinstance(value, tuple) else value
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LinearFormat":
        """Inverse of :meth:`to_dict`; unknown, missing or impossible values raise :class:`CheckpointError`."""
        try:
            names = {field.name for field in dataclasses.fields(InputFormat)}
            shared: dict[str, Any] = {name: value for name, value in values.items() if name in names}
            shared["factors"] = tuple(shared.get("factors", ()))
            own = {name: value for name, value in values.items() if name not in names}
            layout = cls(InputFormat(**shared), **own)
            layout.check()
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"layer format {values!r} is not readable: {error}; is it a newer version?"
            ) from error
        return layout

    def check(self) -> None:
        """Raise ValueError or TypeError for what no layer can have."""
        check_types(self)
        self.input.check()
        if not (self.out_features > 0 and self.weight_bits in WEIGHT_BITS):
            raise ValueError(f"out_features={self.out_features}, weight_bits={self.weight_bits}")
        if self.input.principal_rank > self.out_features:
            raise ValueError(f"principal_rank={self.input.principal_rank} of {self.out_features} rows")
        if self.table_rows not in ((0,) if self.weight_bits == 8 else (1, self.out_features)):
            raise ValueError(f"table_rows={self.table_rows}")
        if self.is_trellis and (self.table_rows != 1 or self.weight_bits not in TRELLIS_BITS):
            raise ValueError(f"is_trellis with table_rows={self.table_rows} at {self.weight_bits} bits")


def check_version(version: object) -> None:
    """Raise :class:`CheckpointError` unless this package reads the given format version."""
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint has format version {version!r}, this lrqdit reads version {FORMAT_VERSION}; "
            f"{'upgrade lrqdit' if isinstance(version, int) and version > FORMAT_VERSION else 'quantize it again'}"
        )


def is_no_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is the weight of a convolution or of experts in one, which is not packed."""
    return len(shape) > 2 and shape[0] > 1


def describe_unpacked(share: float) -> str:
    """A sentence about the weights that :func:`is_no_matrix` finds; empty if they are less than a hundredth."""
    if share < 0.01:
        return ""
    return (
        f"{share:.0%} of the parameters are weights of three and more dimensions (convolutions, experts), which stay "
        "as they are"
    )
