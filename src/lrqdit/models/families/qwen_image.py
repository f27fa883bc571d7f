"""Qwen-Image (Edit and Layered are the same class), Qwen-Image 2.1, Nucleus-Image and JoyImage-Edit."""

from lrqdit.models.spec import ATTENTION, ModelSpec

_MLP = r"(img|txt)_mlp\.net\.(0\.proj|2)"
_JOY = ModelSpec(rf"double_blocks\.\d+\.(attn\.(img|txt)_attn_(qkv|proj)|{_MLP})")
SPECS = {
    "QwenImageTransformer2DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|{_MLP})", weight_only=r"transformer_blocks\.\d+\.(img|txt)_mod\.1"
    ),
    "QwenImage21Transformer2DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|img_mlp\.(proj|out|gate_layer))"
    ),
    "NucleusMoEImageTransformer2DModel": ModelSpec(
        rf"transformer_blocks\.\d+\.({ATTENTION}|encoder_proj|img_mlp\.(shared_expert\.)?net\.(0\.proj|2))",
        weight_only=r"transformer_blocks\.\d+\.img_mod\.1",
    ),
    "JoyImageEditTransformer3DModel": _JOY,
    "JoyImageEditPlusTransformer3DModel": _JOY,
}
