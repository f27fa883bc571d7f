"""Sana, SANA-Video and SANA-WM: linear attention, and feed-forward parts of convolutions, most of them 1 x 1."""

from lrqdit.models.spec import ATTENTION, ModelSpec

_SANA = ModelSpec(rf"transformer_blocks\.\d+\.({ATTENTION}|ff\.conv_(inverted|point))")
SPECS = {
    "SanaTransformer2DModel": _SANA,
    "SanaVideoTransformer3DModel": _SANA,
    "SanaWMTransformer3DModel": ModelSpec(  # without the gates of its recurrence, whose errors add up
        r"blocks\.\d+\.(mlp\.(inverted|point)_conv\.conv|plucker_proj|attn\.(qkv|proj|[qkv]_proj_cam|out_proj_cam)|cross_attn\.(q_linear|kv_linear|proj))"
    ),
}
