"""HiDream-I1: double and single blocks whose feed-forward layers are a few experts."""

from lrqdit.models.spec import ModelSpec

_BLOCK = r"(double|single)_stream_blocks\.\d+\.block\."
SPECS = {
    "HiDreamImageTransformer2DModel": ModelSpec(
        rf"{_BLOCK}(attn1\.(to_q|to_k|to_v|to_out)(_t)?|ff_i\.(shared_experts|experts\.\d+)\.w\d|ff_[it]\.w\d)",
        weight_only=rf"{_BLOCK}adaLN_modulation\.1",
    )
}
