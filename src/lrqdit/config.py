"""What to do to a model: one frozen dataclass, presets parsed from their names, JSON in and out. No torch here.

A preset is ``w<weight bits>a<activation bits>``: ``w4a8`` stores weights at 4 bits and multiplies them with activations
quantized to 8. Two named modes set everything else:

========== ================================================= ==========================================================
mode       what it is                                        settings
========== ================================================= ==========================================================
``auto``   the default: per layer, the rotation and          one table per layer, codes on a trellis, centring,
           smoothing with the smallest measured error,       fitted activation clip, 8-bit storage of the layers kept
           GPTQ where held-out prompts gain from it          out of the low-bit set
``paper``  LRQ-DiT as published (arXiv 2508.03485)           one table per row, smoothing 0.5, rotation by J >= 1,
                                                             no clip, no centring, kept layers untouched, rounding to
                                                             nearest
========== ================================================= ==========================================================
"""

import dataclasses
import math
import re
import types
import typing
from typing import Any, Literal

from lrqdit.errors import ConfigError

WeightBits = Literal[2, 3, 4, 5, 6, 8]
ActivationBits = Literal[4, 6, 8, 16]
WEIGHT_BITS: tuple[int, ...] = typing.get_args(WeightBits)
TRELLIS_BITS = (2, 3, 4, 5)  # weight bits whose codes may be a path through a trellis
ACTIVATION_BITS: tuple[int, ...] = typing.get_args(ActivationBits)
MODES: dict[str, dict[str, Any]] = {
    "auto": {},
    "paper": {
        "table_scope": "row",
        "coding": "scalar",
        "rotation": "threshold",
        "smoothing": "always",
        "is_centred": False,
        "is_clipped": False,
        "token_levels": "uniform",
        "rounding": "nearest",
        "keep_bits": 16,
        "sensitivity": "none",
        "principal_rank": 0,
    },
}
_KIND_NAMES = {
    str: "a name",
    float: "a number",
    float | None: "a positive number of bits per parameter, or None",
    bool: "true or false",
    int: "a whole number",
    tuple[str, ...]: "a list of regular expressions",
}


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Everything that decides the bytes of a quantized model, beside the model and the calibration data.

    Args:
        weight_bits: 2 to 6 (Twin-Log levels) or 8 (uniform).
        activation_bits: 4, 6, 8, or 16 for weight-only quantization.
        average_bits: true bits per parameter that each quantized model may take in all, scales and kept layers
            included. None: what ``weight_bits`` in every layer would take.
        sensitivity: by what each layer gets its own weight bits within that size (``weight_bits``, at most 4, is
            then only the width at which errors are compared). ``gradient``: by its error and the gradients seen in
            calibration, which costs nothing; every layer has ``weight_bits`` where there are none. ``measured``: by
            running the model with each layer rounded. ``none``: every layer has ``weight_bits``.
        mode: name of the mode the other defaults came from, ``auto`` or ``paper``.
        codebook: weight levels, a key of :data:`lrqdit.numerics.codebook.CODEBOOKS`.
        table_scope: ``layer`` (one int8 table per layer) or ``row`` (one per output row).
        coding: ``scalar`` (a code is a level), ``trellis`` (codes are paths through twice as many levels,
            :mod:`lrqdit.numerics.trellis`: a third less error at equal bits, from one table per layer, up to 5 bits) or
            ``auto`` (``trellis`` for Twin-Log levels with one table per layer).
        rotation: ``auto`` (smallest measured error), ``threshold`` (the paper's: Hadamard below ``rotation_threshold``,
            R1 P R2 from it on), or one kind for every layer.
        rotation_threshold: threshold on J, the RMS of a layer's input.
        smoothing: ``auto`` (where it lowers the measured error), ``always`` or ``never``.
        smoothing_alpha: exponent of the weights in the smoothing vector.
        is_centred: subtract the calibrated channel mean and fold it into the bias.
        is_clipped: fit a clip ratio of the per-token absmax for each layer.
        token_levels: of 4-bit activations: ``uniform``, ``normal`` (Lloyd-Max levels of a Gaussian) or ``auto`` (the
            smaller measured error); other activations are uniform.
        rounding: ``nearest``, or ``compensated`` (GPTQ where it lowers a layer's error on held-out prompts).
        hessian: what compensation minimizes: the change of the model's ``output``, to first order, which runs and
            differentiates every second call of the calibration once more, or of each layer's output (``input``).
        principal_rank: directions of the input of layers with 4-bit activations that may pass beside the codes
            (:mod:`lrqdit.numerics.principal`), where that lowers the measured error by a quarter; 0 for none.
        damping: of the compensation's Hessian, relative to its mean diagonal.
        moment_gib: memory for second moments of layer inputs, in GiB; layers that find none left round plainly.
        keep_bits: storage of linear layers outside the low-bit set: 16 (untouched) or 8 (weight-only). Small ones, and
            those that diffusers keeps in float32, are untouched in any case.
        exclude: regular expressions of layers to leave as they are.
        calibration_tokens: size of the token reservoir of each layer input.
        seed: seed of rotations and of calibration sampling.

    Raises:
        ConfigError: for any value outside the above.
    """

    weight_bits: WeightBits = 4
    activation_bits: ActivationBits = 8
    average_bits: float | None = None
    sensitivity: Literal["gradient", "measured", "none"] = "gradient"
    mode: Literal["auto", "paper"] = "auto"
    codebook: str = "twin_log"
    table_scope: Literal["layer", "row"] = "layer"
    coding: Literal["auto", "scalar", "trellis"] = "auto"
    rotation: Literal["auto", "threshold", "none", "hadamard", "block_hadamard", "outlier"] = "auto"
    rotation_threshold: float = 1.0
    smoothing: Literal["auto", "always", "never"] = "auto"
    smoothing_alpha: float = 0.5
    is_centred: bool = True
    is_clipped: bool = True
    token_levels: Literal["auto", "uniform", "normal"] = "auto"
    rounding: Literal["nearest", "compensated"] = "compensated"
    hessian: Literal["output", "input"] = "output"
    principal_rank: int = 24
    damping: float = 0.03
    moment_gib: float = 16.0
    keep_bits: Literal[8, 16] = 8
    exclude: tuple[str, ...] = ()
    calibration_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if not 0 <= self.principal_rank <= 256:
            raise ConfigError(f"principal_rank={self.principal_rank} must be 0 (none) to 256")
        if self.coding == "trellis" and (self.table_scope != "layer" or self.codebook == "minmax"):
            raise ConfigError(
                f"coding='trellis' needs one table per layer, but table_scope={self.table_scope!r} and "
                f"codebook={self.codebook!r} have one per row; set table_scope='layer' and another codebook"
            )
        if self.average_bits is not None:
            if not 0 < self.average_bits < math.inf:
                raise ConfigError(f"average_bits={self.average_bits!r} is not a positive number of bits per parameter")
            if self.sensitivity == "none":
                raise ConfigError(
                    "average_bits gives layers different bits, but sensitivity='none' (the default in mode 'paper') "
                    "asks for the same everywhere; set sensitivity to 'gradient' or 'measured'"
                )
        if not 0 < self.smoothing_alpha < 1:
            raise ConfigError(f"smoothing_alpha={self.smoothing_alpha!r} must lie between 0 and 1; 0.5 is the default")
        for name in ("damping", "moment_gib"):
            if not 0 <= getattr(self, name) < math.inf or (name == "damping" and self.damping == 0):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a positive number (moment_gib may be 0)")
        if self.calibration_tokens < 16:
            raise ConfigError(f"calibration_tokens={self.calibration_tokens} is too few to fit a clip; use 16 or more")
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"exclude={pattern!r} is not a regular expression: {error}") from error

    @property
    def has_trellis(self) -> bool:
        """Whether layers of up to 5 bits are coded by a trellis."""
        is_default = self.table_scope == "layer" and self.codebook == "twin_log"
        return self.coding == "trellis" or (self.coding == "auto" and is_default)

    @property
    def is_mixed(self) -> bool:
        """Whether layers may get different weight bits."""
        return self.sensitivity != "none" and (self.average_bits is not None or self.weight_bits < 8)

    @property
    def preset(self) -> str:
        """The preset's name, such as ``w4a8``."""
        return f"w{self.weight_bits}a{self.activation_bits}"

    @classmethod
    def from_name(cls, name: str, mode: str = "auto", **changes: Any) -> "QuantizationConfig":
        """Parse a preset such as ``"w4a8"``, under a mode, with single settings changed by keyword."""
        match = re.fullmatch(r"w(\d+)a(\d+)", name.strip().lower()) if isinstance(name, str) else None
        if match is None:
            raise ConfigError(
                f"preset {name!r} is not of the form w<bits>a<bits>; use w4a8, w3a8 or another of weight bits "
                f"{WEIGHT_BITS} and activation bits {ACTIVATION_BITS}"
            )
        _check_type("mode", mode, Literal["auto", "paper"])
        settings = {"weight_bits": int(match[1]), "activation_bits": int(match[2]), "mode": mode, **MODES[mode]}
        return cls.from_dict({**settings, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizationConfig":
        """Build from a dictionary (as read from JSON); unknown keys are errors."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown setting(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-safe values."""
        return {**dataclasses.asdict(self), "exclude": list(self.exclude)}


def choices(name: str) -> tuple:
    """The values that a setting of :class:`QuantizationConfig` may have."""
    return typing.get_args(typing.get_type_hints(QuantizationConfig)[name])


def check_types(record: Any) -> None:
    """Raise :class:`ConfigError` for a field of a dataclass whose value is not of the type that it declares."""
    for field in dataclasses.fields(record):
        _check_type(field.name, getattr(record, field.name), field.type)


def _check_type(name: str, value: object, kind: Any) -> None:
    if not _is_of(value, kind):
        if typing.get_origin(kind) is Literal:
            allowed = ", ".join(map(str, typing.get_args(kind)))
            raise ConfigError(f"{name}={value!r} is not supported; use one of {allowed}")
        raise ConfigError(f"{name}={value!r} is not {_KIND_NAMES.get(kind, kind)}")


def _is_of(value: object, kind: Any) -> bool:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return not isinstance(value, bool) and value in arguments
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, part) for part in arguments)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_is_of(part, arguments[0]) for part in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
