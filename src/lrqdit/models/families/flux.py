"""FLUX.1, FLUX.2, FLUX.3, and what was built like FLUX.1: Bria, Fibo, Chroma, LongCat-Image, Ovis-Image.

FLUX.1 has double blocks with a text stream, then single ones, each with a large modulation layer. Chroma makes all
modulations by one network, which is kept; FLUX.2 and 3 share a few modulation layers among all blocks, kept, too.
"""

from lrqdit.models.spec import ATTENTION, DOUBLE_MODULATION, FEED_FORWARD, ModelSpec

DOUBLE_AND_SINGLE_BLOCKS = ModelSpec(
    rf"transformer_blocks\.\d+\.({ATTENTION}|{FEED_FORWARD})"
    rf"|single_transformer_blocks\.\d+\.({ATTENTION}|proj_mlp|proj_out)",
    weight_only=rf"{DOUBLE_MODULATION}|single_transformer_blocks\.\d+\.norm\.linear",
)
SPECS = {
    "FluxTransformer2DModel": DOUBLE_AND_SINGLE_BLOCKS,
    "BriaTransformer2DModel": DOUBLE_AND_SINGLE_BLOCKS,
    "BriaFiboTransformer2DModel": DOUBLE_AND_SINGLE_BLOCKS,
    "ChromaTransformer2DModel": DOUBLE_AND_SINGLE_BLOCKS,
    "LongCatImageTransformer2DModel": DOUBLE_AND_SINGLE_BLOCKS,
    "OvisImageTransformer2DModel": DOUBLE_AND_SINGLE_BLOCKS,
    "Flux2Transformer2DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
    "Flux3Transformer2DModel": ModelSpec(
        rf"(mode_blocks\.\w+|txt_mode_blocks|single_transformer_blocks)\.\d+\.({ATTENTION}|ff\.linear_(in|out))"
    ),
}
