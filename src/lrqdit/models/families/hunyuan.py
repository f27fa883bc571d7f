"""HunyuanVideo, HunyuanVideo 1.5, FramePack, HunyuanImage 2.1 and Motif-Video: blocks as FLUX.1 has them, or its double
ones alone, after refiner blocks for the text; and HunyuanDiT."""

from lrqdit.models.families.flux import DOUBLE_AND_SINGLE_BLOCKS
from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

_REFINER = r"context_embedder\.token_refiner\.refiner_blocks\.\d+\."
_WITH_REFINER = ModelSpec(
    rf"{DOUBLE_AND_SINGLE_BLOCKS.quantized}|{_REFINER}({ATTENTION}|{FEED_FORWARD})",
    weight_only=rf"{DOUBLE_AND_SINGLE_BLOCKS.weight_only}|{_REFINER}norm_out\.linear",
)
SPECS = {
    "HunyuanVideoTransformer3DModel": _WITH_REFINER,
    "HunyuanVideo15Transformer3DModel": _WITH_REFINER,
    "HunyuanVideoFramepackTransformer3DModel": _WITH_REFINER,
    "HunyuanImageTransformer2DModel": _WITH_REFINER,
    "MotifVideoTransformer3DModel": DOUBLE_AND_SINGLE_BLOCKS,
    "HunyuanDiT2DModel": ModelSpec(
        rf"blocks\.\d+\.({ATTENTION}|{FEED_FORWARD}|skip_linear)",
        weight_only=r"blocks\.\d+\.norm1\.linear",
        dense=r"time_extra_emb\.pooler\.\w+",  # it hands their weights to torch's multi-head attention
    ),
}
