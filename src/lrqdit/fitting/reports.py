"""What a run says of its choices: one report for each group of layers, one for the whole."""

import dataclasses
from dataclasses import asdict, dataclass, field
from typing import Any

from lrqdit.config import QuantizationConfig
from lrqdit.packed.size import SizeReport


@dataclass
class GroupReport:
    """Why a group of layers got its input transform.

    Args:
        names: the layers that share the input, its owner first.
        rms: J, the RMS of the input; None without calibration.
        absmax: the largest |x|; None without calibration.
        rotation, is_smoothed, clip, principal_rank: the choice.
        error: relative output error of the choice.
        candidates: relative output error by the rotation's name, perhaps with "+smoothing" and "+principal", of plain
            rounding to scalar levels.
        rounding: by layer, the held-out output error of each way of rounding relative to plain rounding; the smallest
            was taken.
        predicted: with ``average_bits``, by layer and weight bits the mean squared change of the model's output.
        chosen_bits: with ``average_bits``, the weight bits of each layer; ``weight_bits`` is where that was measured.
    """

    names: list[str]
    weight_bits: int
    activation_bits: int
    rotation: str
    is_smoothed: bool
    clip: float
    rms: float | None = None
    absmax: float | None = None
    error: float | None = None
    candidates: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen_bits: dict[str, int] = field(default_factory=dict)
    principal_rank: int = 0

    @property
    def gain(self) -> float | None:
        """Error without rotation and smoothing over the error of the choice; above 1 is better."""
        plain = self.candidates.get("none")
        return plain / self.error if plain is not None and self.error else None

    def bits_of(self, name: str) -> int:
        """The weight bits of one of the layers."""
        return self.chosen_bits.get(name, self.weight_bits)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain}


@dataclasses.dataclass
class CalibrationReport:
    """What :func:`quantize` did: one :class:`GroupReport` per layer input, sizes, and the time it took."""

    config: QuantizationConfig
    groups: list[GroupReport]
    size: SizeReport
    parameters_before: int
    bytes_before: int
    calibration_seconds: float
    quantization_seconds: float

    @property
    def without_data(self) -> list[str]:
        """Names of the fitted layers whose input was not seen; all of them without calibration."""
        return [name for group in self.groups if group.rms is None for name in group.names]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        return {
            "preset": self.config.preset,
            "config": self.config.to_dict(),
            "size": self.size.to_dict(),
            "bytes_before": self.bytes_before,
            "calibration_seconds": self.calibration_seconds,
            "quantization_seconds": self.quantization_seconds,
            "without_data": self.without_data,
            "layers": [group.to_dict() for group in self.groups],
        }
