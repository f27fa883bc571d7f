"""Diffusion transformers at 2 to 4 bits: Twin-Log levels, adaptive rotations, real packing (arXiv 2508.03485).

Importing the package imports nothing else: a public name brings its module when it is first used, and diffusers and
transformers learn of the format when they are imported, before or after.
"""

import importlib
from typing import Any

from lrqdit.integrations import register_backends

__version__ = "0.1.0"
# public name: the module it is in, or is; type checkers read __init__.pyi
_PUBLIC = {
    "CalibrationReport": "lrqdit.fitting.reports",
    "LRQDiTConfig": "lrqdit.integrations.diffusers",
    "LrqditError": "lrqdit.errors",
    "QuantLinear": "lrqdit.packed.linear",
    "QuantizationConfig": "lrqdit.config",
    "attention": "lrqdit.kernels.cpu_attention",
    "codebook": "lrqdit.numerics.codebook",
    "fuse_lora": "lrqdit.integrations.lora",
    "generate_images": "lrqdit.integrations.generation",
    "kernels": "lrqdit.kernels",
    "load_checkpoint": "lrqdit.packed.checkpoint",
    "measure_size": "lrqdit.packed.size",
    "native": "lrqdit.native",
    "observe": "lrqdit.api",
    "quantize": "lrqdit.api",
    "rotation": "lrqdit.numerics.rotation",
    "save_checkpoint": "lrqdit.packed.checkpoint",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lrqdit' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    found = getattr(module, name, module)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_backends()
