"""Diffusion transformers at 2 to 4 bits: Twin-Log levels, adaptive rotations, real packing (arXiv 2508.03485).

Importing the package imports nothing else: a public name brings its module when it is first used, and diffusers
learns of the format when it is imported, before or after.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lrqdit.integrations import register_with_diffusers

if TYPE_CHECKING:
    from lrqdit import kernels as kernels
    from lrqdit import native as native
    from lrqdit.api import observe as observe
    from lrqdit.api import quantize as quantize
    from lrqdit.config import QuantizationConfig as QuantizationConfig
    from lrqdit.errors import LrqditError as LrqditError
    from lrqdit.fitting.reports import CalibrationReport as CalibrationReport
    from lrqdit.integrations.diffusers import LRQDiTConfig as LRQDiTConfig
    from lrqdit.kernels import cpu_attention
    from lrqdit.numerics import codebook as codebook
    from lrqdit.numerics import rotation as rotation
    from lrqdit.packed.checkpoint import load_checkpoint as load_checkpoint
    from lrqdit.packed.checkpoint import save_checkpoint as save_checkpoint
    from lrqdit.packed.linear import QuantLinear as QuantLinear
    from lrqdit.packed.size import measure_size as measure_size

    attention = cpu_attention

__version__ = "0.1.0"
# public name: the module it is in, or is
_PUBLIC = {
    "CalibrationReport": "lrqdit.fitting.reports",
    "LRQDiTConfig": "lrqdit.integrations.diffusers",
    "LrqditError": "lrqdit.errors",
    "QuantLinear": "lrqdit.packed.linear",
    "QuantizationConfig": "lrqdit.config",
    "attention": "lrqdit.kernels.cpu_attention",
    "codebook": "lrqdit.numerics.codebook",
    "kernels": "lrqdit.kernels",
    "load_checkpoint": "lrqdit.packed.checkpoint",
    "measure_size": "lrqdit.packed.size",
    "native": "lrqdit.native",
    "observe": "lrqdit.api",
    "quantize": "lrqdit.api",
    "rotation": "lrqdit.numerics.rotation",
    "save_checkpoint": "lrqdit.packed.checkpoint",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]: the imports above say it


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lrqdit' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    found = getattr(module, name, module)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_diffusers()
