"""Diffusion transformers at 2 to 4 bits: Twin-Log levels, adaptive rotations, real packing (arXiv 2508.03485)."""

from lrqdit import codebook, rotation
from lrqdit.accounting import measure_size
from lrqdit.checkpoint import load_checkpoint, save_checkpoint
from lrqdit.config import QuantizationConfig
from lrqdit.diffusers_plugin import LRQDiTConfig, register
from lrqdit.errors import LrqditError
from lrqdit.linear import QuantLinear
from lrqdit.quantize import CalibrationReport, observe, quantize

__version__ = "0.1.0"
__all__ = [
    "CalibrationReport",
    "LRQDiTConfig",
    "LrqditError",
    "QuantLinear",
    "QuantizationConfig",
    "codebook",
    "load_checkpoint",
    "measure_size",
    "observe",
    "quantize",
    "rotation",
    "save_checkpoint",
]

register()
