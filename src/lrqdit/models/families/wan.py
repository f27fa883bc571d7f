"""Wan 2.1 and 2.2, VACE, Animate, and what was built like them: SkyReels V2, ChronoEdit, AnyFlow, Helios."""

import dataclasses

from lrqdit.models.spec import ATTENTION, ModelSpec

_WAN = ModelSpec(
    rf"(vace_)?blocks\.\d+\.({ATTENTION}|ffn\.net\.(0\.proj|2)|proj_in|proj_out)"
    r"|face_adapter\.\d+\.(to_q|to_k|to_v|to_out)"
)
_ANYFLOW = dataclasses.replace(_WAN, dense=r"condition_embedder\.delta_embedder\.\w+")  # of the step's length
SPECS = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "WanAnimateTransformer3DModel": _WAN,
    "WanAnimate2Transformer3DModel": ModelSpec(rf"blocks\.\d+\.((self|cross)_{ATTENTION}|ffn\.[02])"),
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "AnyFlowTransformer3DModel": _ANYFLOW,
    "AnyFlowFARTransformer3DModel": _ANYFLOW,
    "HeliosTransformer3DModel": _WAN,
}
