"""LTX-Video, LTX-2 with its sound stream, and the refiner of SANA-WM, which is an LTX-2."""

from lrqdit.models.spec import ATTENTION, FEED_FORWARD, ModelSpec

_LTX = ModelSpec(  # without LTX-2.3's to_gate_logits, one number a head
    rf"transformer_blocks\.\d+\.((audio_|(audio_to_video|video_to_audio)_)?{ATTENTION}|(audio_)?{FEED_FORWARD})"
)
SPECS = {
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": _LTX,
    "SanaWMLTX2RefinerTransformer3DModel": _LTX,
}
