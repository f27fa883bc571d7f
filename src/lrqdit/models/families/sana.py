"""Sana, SANA-Video and SANA-WM: linear attention; most feed-forward weights are those of 1 x 1 convolutions."""

from lrqdit.models.spec import ATTENTION, ModelSpec

_SANA = ModelSpec(rf"transformer_blocks\.\d+\.{ATTENTION}")
SPECS = {
    "SanaTransformer2DModel": _SANA,
    "SanaVideoTransformer3DModel": _SANA,
    "SanaWMTransformer3DModel": ModelSpec(  # without the gates of its recurrence, whose errors add up
        r"blocks\.\d+\.(plucker_proj|attn\.(qkv|proj|[qkv]_proj_cam|out_proj_cam)|cross_attn\.(q_linear|kv_linear|proj))"
    ),
}
