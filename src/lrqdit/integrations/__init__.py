"""Other libraries' worlds: diffusers as a quantization backend, pipelines, generation."""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

BACKENDS = "diffusers.quantizers.auto"  # where diffusers keeps its table of quantization backends


def register_with_diffusers() -> None:
    """Make diffusers know the format: now if its backends are loaded, else as soon as they are. Imports nothing."""
    if BACKENDS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    importlib.import_module("lrqdit.integrations.diffusers")  # which registers itself


class _Watch:
    """A finder that lets diffusers' table of backends be found as always, and adds ours once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != BACKENDS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec
