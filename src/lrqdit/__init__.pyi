from lrqdit import kernels as kernels
from lrqdit import native as native
from lrqdit.api import observe as observe
from lrqdit.api import quantize as quantize
from lrqdit.config import QuantizationConfig as QuantizationConfig
from lrqdit.errors import LrqditError as LrqditError
from lrqdit.fitting.reports import CalibrationReport as CalibrationReport
from lrqdit.integrations.diffusers import LRQDiTConfig as LRQDiTConfig
from lrqdit.integrations.generation import generate_images as generate_images
from lrqdit.integrations.lora import fuse_lora as fuse_lora
from lrqdit.kernels import cpu_attention as attention
from lrqdit.numerics import codebook as codebook
from lrqdit.numerics import rotation as rotation
from lrqdit.packed.checkpoint import load_checkpoint as load_checkpoint
from lrqdit.packed.checkpoint import save_checkpoint as save_checkpoint
from lrqdit.packed.linear import QuantLinear as QuantLinear
from lrqdit.packed.size import measure_size as measure_size

__version__: str
__all__ = [
    "CalibrationReport",
    "LRQDiTConfig",
    "LrqditError",
    "QuantLinear",
    "QuantizationConfig",
    "attention",
    "codebook",
    "fuse_lora",
    "generate_images",
    "kernels",
    "load_checkpoint",
    "measure_size",
    "native",
    "observe",
    "quantize",
    "rotation",
    "save_checkpoint",
]
