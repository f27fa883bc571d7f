"""Kandinsky 5 and 6, and the latter's super-resolution."""

from lrqdit.models.spec import ModelSpec

_BLOCK = r"(visual|(video_|audio_)?text)_transformer_blocks\.\d+\."
_KANDINSKY = ModelSpec(
    rf"{_BLOCK}((video|audio)_dec_block\.)?"
    r"((self_attention|cross_attention|attn|(va|av)_cross_attention)\.(to_query|to_key|to_value|out_layer)"
    r"|feed_forward\.(in_layer|out_layer|net\.0\.proj|net\.2))",
    weight_only=rf"{_BLOCK}((video|audio)_dec_block\.)?(visual|text|va|av)_modulation\.out_layer",
)
SPECS = {
    "Kandinsky5Transformer3DModel": _KANDINSKY,
    "Kandinsky6Transformer3DModel": _KANDINSKY,
    "Kandinsky6SRTransformer3DModel": _KANDINSKY,
}
