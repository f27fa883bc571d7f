"""The format of a quantized linear layer: everything needed to allocate it and to read its buffers. No torch."""

import dataclasses
from typing import Any

from lrqdit.config import ACTIVATION_BITS, WEIGHT_BITS
from lrqdit.errors import CheckpointError
from lrqdit.numerics import trellis
from lrqdit.numerics.rotation import MAX_BLOCK, Rotation

FORMAT_NAME = "lrqdit"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LinearFormat:
    """Everything needed to allocate a quantized linear layer and to read its buffers; JSON in the model's config.

    Args:
        in_features, out_features: the layer's shape.
        weight_bits: 2 to 6, or 8.
        activation_bits: 4, 6, 8 or 16 (weight-only).
        codebook: kind of the levels.
        table_rows: rows of the int8 table: 1, out_features, or 0 for 8-bit codes, which need none.
        is_trellis: the codes are a path through one table of twice as many levels, :mod:`lrqdit.numerics.trellis`.
        rotation: kind of the rotation.
        factors: its Kronecker factors (or block sizes).
        clip: activation clip ratio.
        token_levels: one of :data:`lrqdit.numerics.tokens.TOKEN_LEVELS`; ``normal`` for 4-bit activations only.
        principal_rank: input directions that pass beside the codes (:mod:`lrqdit.numerics.principal`); 0 for none.
        has_bias, has_offset, has_scale: which optional buffers exist.
        has_original_bias: whether the layer had a bias before centring gave it one.
        input_from: name of the layer whose input transform this one shares, or None.
    """

    in_features: int
    out_features: int
    weight_bits: int
    activation_bits: int
    codebook: str = "twin_log"
    table_rows: int = 1
    is_trellis: bool = False
    rotation: str = "none"
    factors: tuple[int, ...] = ()
    clip: float = 1.0
    token_levels: str = "uniform"
    principal_rank: int = 0
    has_bias: bool = True
    has_original_bias: bool = True
    has_offset: bool = False
    has_scale: bool = False
    input_from: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values; settings at their default are left out."""
        values = dataclasses.asdict(self)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v != defaults[k]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LinearFormat":
        """Inverse of :meth:`to_dict`; unknown, missing or impossible values raise :class:`CheckpointError`."""
        try:
            layout = cls(**{**values, "factors": tuple(values.get("factors", ()))})
            layout._check()
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"layer format {values!r} is not readable: {error}; is it a newer version?"
            ) from error
        return layout

    def _check(self) -> None:
        kinds: dict[str, Any] = {"factors": tuple, "clip": (int, float)}
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), kinds.get(f.name, f.type)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{f.name}={value!r}")
        if not (self.in_features > 0 and self.out_features > 0 and 0 < self.clip <= 1):
            raise ValueError(f"{self.out_features} x {self.in_features}, clip={self.clip}")
        if self.weight_bits not in WEIGHT_BITS or self.activation_bits not in ACTIVATION_BITS:
            raise ValueError(f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}")
        if self.token_levels != "uniform" and (self.token_levels, self.activation_bits) != ("normal", 4):
            raise ValueError(f"token_levels={self.token_levels!r} at {self.activation_bits} bits")
        if not 0 <= self.principal_rank <= min(self.in_features, self.out_features) or (
            self.principal_rank and self.activation_bits == 16
        ):
            raise ValueError(f"principal_rank={self.principal_rank} at {self.activation_bits} bits")
        if self.table_rows not in ((0,) if self.weight_bits == 8 else (1, self.out_features)):
            raise ValueError(f"table_rows={self.table_rows}")
        if self.is_trellis and (self.table_rows != 1 or self.weight_bits not in trellis.BITS):
            raise ValueError(f"is_trellis with table_rows={self.table_rows} at {self.weight_bits} bits")
        if self.rotation != "outlier":
            Rotation.from_tensors(self.rotation, self.in_features, self.factors, {})
        elif (
            len(self.factors) != 1
            or self.factors[0] not in range(1, MAX_BLOCK + 1)
            or self.in_features % self.factors[0]
        ):
            raise ValueError(f"factors={self.factors} of an outlier rotation")


def check_version(version: object) -> None:
    """Raise unless this package reads the given format version."""
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint has format version {version!r}, this lrqdit reads version {FORMAT_VERSION}; "
            f"{'upgrade lrqdit' if isinstance(version, int) and version > FORMAT_VERSION else 'quantize it again'}"
        )
