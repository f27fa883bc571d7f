"""Configurations that the transformer classes of diffusers are published in, and what to know of each class."""

from typing import Any

_COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

# By class, the arguments of each configuration that differ from the class's defaults, by the name of the model. A class
# that is missing here is published as its defaults.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "CogVideoXTransformer3DModel": {"2B": {}, "5B": _COGVIDEOX_5B},
    "CogView4Transformer2DModel": {
        "CogView4-6B": {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32}
    },
    "ConsisIDTransformer3DModel": {"ConsisID": {**_COGVIDEOX_5B, "in_channels": 32, "is_train_face": True}},
    "DiTTransformer2DModel": {"DiT-XL/2": {"out_channels": 8}},
    "DreamLiteTransformer2DModel": {"1280 channels": {"in_channels": 1280, "num_attention_heads": 20,
                                                      "attention_head_dim": 64, "cross_attention_dim": 2048}},
    "EasyAnimateTransformer3DModel": {"V5.1-12B": {"in_channels": 16, "out_channels": 16, "patch_size": 2}},
    "Flux2Transformer2DModel": {
        "FLUX.2-dev": {},
        "FLUX.2-klein-4B": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
                            "joint_attention_dim": 7680, "guidance_embeds": False},
    },
    "FluxTransformer2DModel": {"FLUX.1-dev": {"guidance_embeds": True}},
    "GlmImageTransformer2DModel": {"GLM-Image": {"attention_head_dim": 128, "num_attention_heads": 32}},
    "HiDreamImageTransformer2DModel": {
        "HiDream-I1": {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096],
                       "axes_dims_rope": (64, 32, 32), "llama_layers": [*range(32), *[31] * 16]}
    },
    "HunyuanDiT2DModel": {
        "v1.2": {"in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637,
                 "sample_size": 128, "use_style_cond_and_image_meta_size": False}
    },
    "HunyuanImageTransformer2DModel": {"HunyuanImage-2.1": {"text_embed_2_dim": 1472}},
    "Kandinsky5Transformer3DModel": {
        "Lite 2B": {"in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True},
        "Pro 19B": {"in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 4096, "ff_dim": 16384, "time_dim": 1024,
                    "num_text_blocks": 4, "num_visual_blocks": 60, "axes_dims": (32, 48, 48), "visual_cond": True},
    },
    "LTX2VideoTransformer3DModel": {
        "LTX-2 19B": {}, "LTX-2.3": {"gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True,
                                     "audio_cross_attn_mod": True}
    },
    "LTXVideoTransformer3DModel": {
        "0.9 2B": {}, "0.9.7 13B": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}
    },
    "LatteTransformer3DModel": {
        "Latte-1": {"attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
                    "cross_attention_dim": 1152, "attention_bias": True, "patch_size": 2,
                    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
                    "norm_elementwise_affine": False, "caption_channels": 4096}
    },
    "Lumina2Transformer2DModel": {"Lumina-Image-2.0": {"cap_feat_dim": 2304}},
    "LuminaNextDiT2DModel": {"Lumina-Next-SFT": {"num_layers": 24, "num_kv_heads": 8, "num_attention_heads": 32}},
    "OmniGenTransformer2DModel": {
        "OmniGen-v1": {"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}}
    },
    "PRXTransformer2DModel": {"PRX": {"axes_dim": [32, 32]}},
    "PixArtTransformer2DModel": {"PixArt-Sigma XL/2": {"caption_channels": 4096}},
    "SD3Transformer2DModel": {
        "SD3-medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                       "pos_embed_max_size": 192},
        "SD3.5-medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                         "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        "SD3.5-large": {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                        "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    },
    "SkyReelsV2Transformer3DModel": {
        "14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    },
    "Transformer2DModel": {
        "SDXL mid block": {"num_attention_heads": 20, "attention_head_dim": 64, "in_channels": 1280, "num_layers": 10,
                           "cross_attention_dim": 2048, "use_linear_projection": True}
    },
    "TransformerTemporalModel": {
        "AnimateDiff, 1280 channels": {"num_attention_heads": 8, "attention_head_dim": 160, "in_channels": 1280}
    },
    "WanAnimateTransformer3DModel": {"2.2 Animate 14B": {"added_kv_proj_dim": 5120}},
    "WanTransformer3DModel": {
        "2.1 and 2.2 T2V 14B": {},
        "2.1 T2V 1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "2.1 I2V 14B": _WAN_I2V,
        "2.2 TI2V 5B": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48,
                        "out_channels": 48},
    },
}  # fmt: skip

_NO_BFLOAT16 = "does not run in bfloat16 on a CPU, unquantized either"
_NO_BACKWARD = "has no backward pass on a CPU: rounding weighs all tokens alike there"
QUIRKS = {  # by class, what a user should know
    "AnyFlowFARTransformer3DModel": _NO_BACKWARD,
    "ChromaTransformer2DModel": "the network that makes all modulations is kept",
    "Cosmos3OmniTransformer": "its head for text is not run by diffusers",
    "Flux3Transformer2DModel": "reference blocks run with reference pictures; else they are quantized without data",
    "HiDreamImageTransformer2DModel": "routers are single parameters and stay",
    "HunyuanDiT2DModel": "the text pooler stays as it is: it hands its weights on",
    "Kandinsky5Transformer3DModel": _NO_BFLOAT16,
    "Kandinsky6SRTransformer3DModel": _NO_BACKWARD,
    "Kandinsky6Transformer3DModel": "without sound its sound blocks are quantized without data",
    "MiniMaxMusic3RVQDepthDecoder": "a language model's decoder; its heads run outside of its call",
    "NucleusMoEImageTransformer2DModel": "experts are tensors of three dimensions and stay",
    "SD3Transformer2DModel": "3.5-medium: its table of positions alone is 1.5 bits",
    "SanaTransformer2DModel": "1 x 1 convolutions count as linear layers",
    "SanaVideoTransformer3DModel": "1 x 1 convolutions count as linear layers; those along time stay",
    "SanaWMLTX2RefinerTransformer3DModel": "sound blocks never run: they are quantized without data",
    "SanaWMTransformer3DModel": f"as SANA-Video; {_NO_BFLOAT16}",
    "WanAnimate2Transformer3DModel": "`sensitivity='measured'` is not possible: its cache cannot be recorded",
}
