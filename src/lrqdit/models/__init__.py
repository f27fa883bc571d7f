"""Which layers of which architecture are quantized, and how its pipeline is run."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

KNOWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # class and configuration, for measurements without a folder
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "pixart": ("PixArtTransformer2DModel", {"sample_size": 128, "num_layers": 28, "caption_channels": 4096}),
    "wan": ("WanTransformer3DModel", {}),
}


def is_denoiser(component: str, library: str, class_name: str) -> bool:
    """Whether a component of a pipeline is a model that denoises, from its name and its class's."""
    is_transformer = library != "transformers" and re.search(r"Transformer|DiT", class_name) is not None
    is_other = re.search(r"ControlNet|V[aA][eE]", class_name) is not None
    return component.startswith("transformer") or (is_transformer and not is_other)


def denoiser_names(index: Mapping[str, Any]) -> list[str]:
    """The components that denoise, of what a ``model_index.json`` holds."""
    classes = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return [name for name, (library, kind) in classes.items() if kind and is_denoiser(name, str(library), str(kind))]


class Selection(NamedTuple):
    """Names of the linear layers of a model by what becomes of them."""

    quantized: tuple[str, ...]  # low-bit weights and activations
    weight_only: tuple[str, ...]  # low-bit weights
    kept: tuple[str, ...]  # at eight bits, or as they are


def select_layers(module: Any, exclude: tuple[str, ...] = ()) -> Selection:
    """Which layers of a model are quantized, without quantizing it; the model may be on the meta device.

    Args:
        module: any module with ``nn.Linear`` layers.
        exclude: as in :class:`lrqdit.QuantizationConfig`.

    Raises:
        ModelError: if there is nothing to quantize, or a pattern of ``exclude`` matches nothing.
    """
    from lrqdit.config import QuantizationConfig
    from lrqdit.models.registry import plan

    treatments = plan(module, QuantizationConfig.from_name("w4a8", exclude=exclude))
    fitted = [name for name, treatment in treatments.items() if treatment.is_fitted]
    weight_only = tuple(name for name in fitted if treatments[name].activation_bits == 16)
    return Selection(
        tuple(name for name in fitted if name not in weight_only),
        weight_only,
        tuple(name for name in treatments if name not in fitted),
    )
