"""Other libraries' worlds: diffusers and transformers as quantization backends, pipelines, LoRA, generation."""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from lrqdit.integrations import controlnets

BACKENDS = {  # where a library keeps its table of quantization backends, and what adds ours
    "diffusers.quantizers.auto": "lrqdit.integrations.diffusers",
    "transformers.quantizers.auto": "lrqdit.integrations.transformers",
}


def has_transformers_5() -> bool:
    """Whether transformers can have a backend of ours: version 5 loads weights otherwise than those before."""
    return importlib.util.find_spec("transformers.core_model_loading") is not None


def _is_adapted(name: str) -> bool:
    return name in BACKENDS or name.startswith(controlnets.MODULES)


def _adapt(name: str) -> None:
    """What is to be done when a module of another library has been imported."""
    if name not in BACKENDS:
        controlnets.take_quantized(sys.modules[name])
    elif not name.startswith("transformers") or has_transformers_5():
        importlib.import_module(BACKENDS[name])


def register_backends() -> None:
    """Make diffusers and transformers know the format: now if their backends are loaded, else as soon as they are."""
    for name in [name for name in sys.modules if _is_adapted(name)]:
        _adapt(name)
    sys.meta_path.insert(0, _Watch())


class _Watch:
    """A finder that lets these modules be found as always, and does what is to be done once they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_adapted(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _adapt(name)

            spec.loader.exec_module = execute_and_register
        return spec
