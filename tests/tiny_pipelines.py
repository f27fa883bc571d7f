"""Complete pipelines of random weights, small enough to run in a fraction of a second; no file is needed for them."""

import functools
import warnings
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

FLUX_CALL = {"height": 32, "width": 32, "max_sequence_length": 16}
SD3_CALL = {"height": 16, "width": 16, "max_sequence_length": 16}
WAN_CALL = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
LTX_CALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
COGVIDEOX_CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
_T5 = {
    "vocab_size": 384, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0,
    "tie_word_embeddings": False, "tokenizer_class": "ByT5Tokenizer",
}  # fmt: skip
_CLIP = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "projection_dim": 32, "max_position_embeddings": 77, "eos_token_id": 1, "bos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip


def randomize(module: nn.Module) -> Any:
    """Every weight random, also those that diffusers initializes to zero."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05)
    return module.eval()


def _vae(latent_channels: int = 4) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=latent_channels,
        norm_num_groups=4, mid_block_add_attention=False, sample_size=32, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.0,
    ).eval()  # fmt: skip


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_T5, feed_forward_proj="gated-gelu")).eval()


def _clip_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(model_max_length=77)


def flux_transformer(
    layers: int = 1, single_layers: int = 1, in_channels: int = 16, out_channels: int = 16, guidance: bool = True
) -> diffusers.FluxTransformer2DModel:
    return randomize(
        diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=in_channels, out_channels=out_channels, num_layers=layers,
            num_single_layers=single_layers, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
            pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
        )
    )  # fmt: skip


def flux(kind: Any = diffusers.FluxPipeline, transformer: nn.Module | None = None, layers: int = 1, **rest: Any) -> Any:
    """A pipeline of FLUX.1's components, always of the same weights."""
    torch.manual_seed(0)
    return kind(
        diffusers.FlowMatchEulerDiscreteScheduler(), _vae(), CLIPTextModel(CLIPTextConfig(**_CLIP)).eval(),
        _clip_tokenizer(), _t5(), ByT5Tokenizer(), transformer or flux_transformer(layers), **rest,
    )  # fmt: skip


def make_flux_small(monkeypatch) -> None:
    """Let FLUX pipelines make pictures of 32 x 32 pixels where no size is given, instead of 4,096 tokens."""
    for kind in (diffusers.FluxPipeline, diffusers.FluxImg2ImgPipeline, diffusers.FluxControlNetPipeline):
        monkeypatch.setattr(kind, "__init__", _with_small_default(kind.__init__))


def _with_small_default(plain: Any) -> Any:
    @functools.wraps(plain)
    def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:
        plain(self, *arguments, **keywords)
        self.default_sample_size = 16

    return __init__


def ip_adapter(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The two parts of an IP-Adapter of random weights for a FLUX transformer."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    width, text = model.inner_dim, model.config.joint_attention_dim
    keys = {
        f"{index}.{name}.{leaf}": random(*shape)
        for index in range(model.config.num_layers)
        for name in ("to_k_ip", "to_v_ip")
        for leaf, shape in (("weight", (width, text)), ("bias", (width,)))
    }
    projection = {
        "proj.weight": random(4 * text, 32), "proj.bias": random(4 * text), "norm.weight": 1 + random(text),
        "norm.bias": random(text),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": keys}


def flux_controlnet() -> diffusers.FluxControlNetModel:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of diffusers about itself
        model = diffusers.FluxControlNetModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    return randomize(model)


def sd3(kind: Any = diffusers.StableDiffusion3Pipeline, **rest: Any) -> Any:
    """A pipeline of Stable Diffusion 3's components."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=48, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP)).eval() for _ in range(2)]
    t5 = T5EncoderModel(T5Config(**{**_T5, "d_model": 64}, feed_forward_proj="gated-gelu")).eval()
    return kind(
        randomize(transformer), diffusers.FlowMatchEulerDiscreteScheduler(), _vae(), encoders[0], _clip_tokenizer(),
        encoders[1], _clip_tokenizer(), t5, ByT5Tokenizer(), **rest,
    )  # fmt: skip


def wan_transformer(in_channels: int = 4, **rest: Any) -> diffusers.WanTransformer3DModel:
    return randomize(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=in_channels, out_channels=4,
            text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2, rope_max_seq_len=32, **rest,
        )
    )  # fmt: skip


def wan(kind: Any = diffusers.WanPipeline, transformer: nn.Module | None = None, **rest: Any) -> Any:
    """A pipeline of Wan's components."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return kind(
        tokenizer=ByT5Tokenizer(), text_encoder=UMT5EncoderModel(UMT5Config(**_T5)).eval(), vae=vae.eval(),
        scheduler=scheduler, transformer=transformer or wan_transformer(), **rest,
    )  # fmt: skip


def ltx(kind: Any = diffusers.LTXPipeline) -> Any:
    """A pipeline of LTX-Video's components."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=24,
        cross_attention_dim=48, num_layers=2, caption_channels=32,
    )  # fmt: skip
    return kind(diffusers.FlowMatchEulerDiscreteScheduler(), vae.eval(), _t5(), ByT5Tokenizer(), randomize(transformer))


def cogvideox(kind: Any = diffusers.CogVideoXPipeline, in_channels: int = 4) -> Any:
    """A pipeline of CogVideoX's components."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=in_channels, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_width=2, sample_height=2, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return kind(ByT5Tokenizer(), _t5(), vae.eval(), randomize(transformer), diffusers.CogVideoXDDIMScheduler())


def qwen_image_edit(monkeypatch) -> Any:
    """Qwen-Image-Edit, whose text encoder needs files: its embeddings of text and picture are random ones instead."""
    torch.manual_seed(0)
    module = diffusers.pipelines.qwenimage.pipeline_qwenimage_edit

    def embed(self: Any, prompt: Any, image: Any = None, device: Any = None, dtype: Any = None) -> Any:
        generator = torch.Generator().manual_seed(len(str(prompt)))
        return torch.randn(1, 6, 32, generator=generator), torch.ones(1, 6, dtype=torch.long)

    monkeypatch.setattr(diffusers.QwenImageEditPipeline, "_get_qwen_prompt_embeds", embed)
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (32, 32, None))
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return diffusers.QwenImageEditPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, None, randomize(transformer)
    )
