"""Diffusion transformers at 2 to 4 bits: Twin-Log levels, adaptive rotations, real packing (arXiv 2508.03485)."""

from lrqdit import codebook, gpu, kernels, native, rotation
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
    "kernels",
    "load_checkpoint",
    "measure_size",
    "native",
    "observe",
    "quantize",
    "rotation",
    "save_checkpoint",
]

register()
gpu.register()
