"""The table of docs/MODELS.md: every transformer class of diffusers, and what becomes of its published configurations.

Models are built on the meta device, so that no weight is needed: python -m benchmarks.models_table
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from torch import nn

from benchmarks.published import PUBLISHED, QUIRKS
from benchmarks.update_readme import ROOT, fill, table
from lrqdit.config import QuantizationConfig
from lrqdit.fitting.bits import Rest
from lrqdit.models import registry
from lrqdit.numerics.shapes import kronecker_factors
from lrqdit.packed.format import InputFormat, LinearFormat

DOCUMENT = ROOT / "docs/MODELS.md"
PRESETS = ("w4a8", "w3a8")


def transformer_classes() -> dict[str, type[nn.Module]]:
    """The classes that diffusers exports from its folder of transformers, by name."""
    exported = {name: getattr(diffusers, name) for name in dir(diffusers) if not name.startswith("_")}
    return {
        name: kind
        for name, kind in exported.items()
        if inspect.isclass(kind)
        and issubclass(kind, nn.Module)
        and kind.__module__.startswith("diffusers.models.transformers.")
    }


def true_bits(model: nn.Module, preset: str) -> float:
    """Bits per parameter of a model quantized without data, saved in bfloat16; it may be on the meta device."""
    config = QuantizationConfig.from_name(preset)
    plan, layers = registry.plan(model, config), registry.linear_layers(model)
    rest = Rest.of(model, plan, torch.bfloat16)
    size_bytes = rest.size_bytes
    for name, treatment in plan.items():
        if treatment != registry.KEPT:
            layer, kind = layers[name], "hadamard" if treatment.is_fitted else "none"
            bias: Any = layer.bias  # None where the layer has none, whatever torch says of its type
            factors = kronecker_factors(layer.in_features) if treatment.is_fitted else ()
            shared = InputFormat(
                layer.in_features, treatment.activation_bits, kind, factors, has_scale=treatment.is_fitted
            )
            layout = LinearFormat(shared, layer.out_features, 8, table_rows=0, has_bias=bias is not None)
            size_bytes += layout.at_bits(treatment.weight_bits, config.has_trellis).size_bytes
    return 8 * size_bytes / rest.parameters


def rows() -> Iterator[dict[str, Any]]:
    """One row for each published configuration: shares of its parameters by role, true bits by preset."""
    for name, kind in transformer_classes().items():
        for label, arguments in PUBLISHED.get(name, {"defaults": {}}).items():
            with torch.device("meta"):
                model = kind(**arguments)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            layers, weights = registry.linear_layers(model), Counter[str]()
            for layer, role in registry.roles(model).items():
                weights[role] += layers[layer].weight.numel()
            bits = {preset: true_bits(model, preset) for preset in PRESETS}
            shares = {role: weights[role] / parameters for role in ("quantized", "weight-only", "kept")}
            yield {"class": name, "label": label, "parameters": parameters, "shares": shares, "bits": bits}


def models_table() -> str:
    """The table in Markdown."""
    lines = []
    for row in rows():
        others = 1 - sum(row["shares"].values())
        lines.append((
            f"`{row['class']}`" + ("" if row["class"] in registry.MODELS else " (generic)"), row["label"],
            f"{row['parameters'] / 1e9:.2f}", *(f"{share:.0%}" for share in row["shares"].values()), f"{others:.0%}",
            *(f"{bits:.2f}" for bits in row["bits"].values()), QUIRKS.get(row["class"], ""),
        ))  # fmt: skip
    header = "class", "configuration", "billion", "low-bit", "weight-only", "8 bits", "as it is", *PRESETS, "to know"
    return table(header, lines)


def document() -> str:
    """docs/MODELS.md as it should be."""
    text = fill(DOCUMENT.read_text(encoding="utf-8"), "version", diffusers.__version__)
    return fill(text, "table", f"\n{models_table()}\n")


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
