"""Step caches of diffusers (``model.enable_cache``): off while a model is observed or measured, on again afterwards.

With one on, blocks are left out where their output hardly changes, and calibration would not see what they read.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lrqdit.errors import ModelError

HOOKS = ("cache", "fbc_", "pyramid_attention_broadcast")  # in the names of the hooks of step caches
_LOG = logging.getLogger("lrqdit")


@contextlib.contextmanager
def without_caches(modules: Iterable[Any]) -> Iterator[None]:
    """Inside, no step cache of these modules is on.

    Raises:
        ModelError: if one was switched on in another way than by ``enable_cache``.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if (config := getattr(module, "_cache_config", None)) is not None:
                module.disable_cache()
                stack.callback(module.enable_cache, config)
                _LOG.info("%s: %s is off during calibration", type(module).__name__, type(config).__name__)
            _check(module)
        yield


def renew_cache(module: Any) -> None:
    """Put a step cache that is on into the layers that have been replaced since."""
    if getattr(module, "_cache_config", None) is not None:
        with without_caches([module]):
            pass


def _check(module: nn.Module) -> None:
    for name, part in module.named_modules():
        for hook in getattr(getattr(part, "_diffusers_hook", None), "hooks", {}):
            if any(word in hook for word in HOOKS):
                raise ModelError(
                    f"{type(module).__name__} has a step cache ({hook} at {name or 'the top'}) that enable_cache did "
                    "not switch on, so it cannot be switched off; load the model again, and use model.enable_cache"
                )
