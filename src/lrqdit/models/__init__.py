"""Which layers of which architecture are quantized, and how its pipeline is run."""

from typing import Any

PIPELINE_COMPONENTS = ("transformer", "transformer_2")  # of a diffusers pipeline: the models that denoise
KNOWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # class and configuration, for measurements without a folder
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "pixart": ("PixArtTransformer2DModel", {"sample_size": 128, "num_layers": 28, "caption_channels": 4096}),
    "wan": ("WanTransformer3DModel", {}),
}
