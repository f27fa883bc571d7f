"""What a saved folder tells a stranger: a model card that says how to load it, and how large it is."""

import functools
import inspect
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from lrqdit.errors import CheckpointError
from lrqdit.packed.linear import QuantLinear
from lrqdit.packed.size import measure_size

CARD_FILE = "README.md"
_WITH_CARD: list[Any] = []  # methods that write one
TEXT = """\
---
{metadata}
---

# {title}

Quantized by lrqdit, which must be installed, and imported before the folder is loaded; without it diffusers says
"Unknown quantization type".

```python
import torch, lrqdit
from diffusers import {kind}

{variable} = {kind}.from_pretrained("this folder, or its hub id", torch_dtype={dtype})
```

| part | class | preset | true bits per parameter | parameters | bytes |
|---|---|---|---|---|---|
{rows}

*True bits* are all that is stored, scales and layers left as they were included, over all parameters. The layers'
formats are in `config.json`; `lrqdit inspect` lists them.
"""
_OURS = re.compile(re.sub(r"\\{\w+\\}", r"[\\s\\S]*?", re.escape(TEXT)))


def install() -> None:
    """From now on, ``save_pretrained`` of diffusers' pipelines and models with quantized layers writes a card, and
    refuses to write pickles, which are not read."""
    from diffusers import DiffusionPipeline, ModelMixin  # not at the top: diffusers may be importing this module

    for kind in (DiffusionPipeline, ModelMixin):
        if kind.save_pretrained not in _WITH_CARD:
            kind.save_pretrained = _with_card(kind.save_pretrained)
            _WITH_CARD.append(kind.save_pretrained)


def _with_card(plain: Any) -> Any:
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def save_pretrained(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = signature.bind(self, *arguments, **keywords).arguments
        parts = quantized_parts(self)
        if parts and not given.get("safe_serialization", True):
            name = next(iter(parts)) or type(self).__name__
            raise CheckpointError(
                f"{name} is quantized and is read from safetensors alone; leave out safe_serialization=False"
            )
        result = plain(self, *arguments, **keywords)
        folder = Path(given["save_directory"])
        card = folder / CARD_FILE
        # push_to_hub writes a card of its own; an unedited one of ours is of what was here before
        is_ours = card.is_file() and _OURS.fullmatch(card.read_text(encoding="utf-8", errors="replace")) is not None
        if given.get("is_main_process", True) and folder.is_dir() and (is_ours or not card.exists()):
            if parts:
                card.write_text(describe(self, parts), encoding="utf-8")
            elif is_ours:
                card.unlink()
        return result

    return save_pretrained


def quantized_parts(target: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that have quantized layers by name; a model itself under an empty name."""
    parts = {"": target} if isinstance(target, nn.Module) else dict(target.components)
    return {
        name: part
        for name, part in parts.items()
        if isinstance(part, nn.Module) and any(isinstance(layer, QuantLinear) for layer in part.modules())
    }


def describe(target: Any, parts: dict[str, nn.Module]) -> str:
    """The card of a pipeline or a model.

    Args:
        target: what is saved.
        parts: of :func:`quantized_parts`.
    """
    sizes = {name: measure_size(part) for name, part in parts.items()}
    presets = {
        name: getattr(getattr(getattr(part, "hf_quantizer", None), "config", None), "preset", "")
        for name, part in parts.items()
    }
    rows = [
        f"| {name or 'model'} | `{type(part).__name__}` | {presets[name]} | {sizes[name].true_bits:.2f} | "
        f"{sizes[name].parameters:,} | {sizes[name].size_bytes:,} |"
        for name, part in parts.items()
    ]
    source = str(getattr(target.config, "_name_or_path", "") or "")
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) and not Path(source).exists()
    data = ModelCardData(
        library_name="diffusers", base_model=source if is_hub_id else None, tags=["lrqdit", "quantization"]
    )
    is_model, kind = isinstance(target, nn.Module), type(target).__name__
    title = f"{source.rsplit('/', 1)[-1] if is_hub_id else kind} at {', '.join(sorted(set(presets.values())))}"
    return TEXT.format(
        metadata=data.to_yaml(), title=title, kind=kind if is_model else "DiffusionPipeline",
        variable="model" if is_model else "pipe", dtype=target.dtype, rows="\n".join(rows),
    )  # fmt: skip
