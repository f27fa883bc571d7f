"""Diffusion transformers of random weights, small enough to quantize in a fraction of a second, and how to run each."""

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48, caption_channels=32,
        in_channels=4, out_channels=8, sample_size=8, patch_size=2, norm_num_groups=4,
    )  # fmt: skip


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


def _latte() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=48, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=32,
        video_length=2,
    )  # fmt: skip


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=48, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip


def _sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=24, cross_attention_dim=48, caption_channels=32,
        sample_size=8,
    )  # fmt: skip


def _cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=1, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        max_text_seq_length=6,
    )  # fmt: skip


def _wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=96, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def _hunyuan_video() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(8, 8, 8),
    )  # fmt: skip


def _inputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    text, step = _noise(2, 6, 32, seed=2), torch.tensor([500.0, 500.0])
    values = {
        "PixArtTransformer2DModel": {
            "hidden_states": _noise(2, 4, 8, 8), "encoder_hidden_states": text, "timestep": step.long(),
        },
        "FluxTransformer2DModel": {
            "hidden_states": _noise(2, 16, 4), "encoder_hidden_states": text, "timestep": step / 1000,
            "pooled_projections": _noise(2, 32, seed=3), "guidance": torch.ones(2),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "txt_ids": torch.zeros(6, 3),
        },
        "LatteTransformer3DModel": {
            "hidden_states": _noise(2, 4, 2, 8, 8), "encoder_hidden_states": text, "timestep": step.long(),
        },
        "SD3Transformer2DModel": {
            "hidden_states": _noise(2, 4, 8, 8), "encoder_hidden_states": text, "timestep": step.long(),
            "pooled_projections": _noise(2, 32, seed=3),
        },
        "SanaTransformer2DModel": {
            "hidden_states": _noise(2, 4, 8, 8), "encoder_hidden_states": text, "timestep": step.long(),
        },
        "CogVideoXTransformer3DModel": {
            "hidden_states": _noise(2, 2, 4, 8, 8), "encoder_hidden_states": text, "timestep": step.long(),
        },
        "WanTransformer3DModel": {
            "hidden_states": _noise(2, 4, 2, 8, 8), "encoder_hidden_states": text, "timestep": step.long(),
        },
        "HunyuanVideoTransformer3DModel": {
            "hidden_states": _noise(2, 4, 2, 8, 8), "encoder_hidden_states": text, "timestep": step.long(),
            "encoder_attention_mask": torch.ones(2, 6), "pooled_projections": _noise(2, 32, seed=3),
            "guidance": torch.full((2,), 6000.0),
        },
    }[name]  # fmt: skip
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in values.items()}


TINY_MODELS: dict[str, Callable[[], nn.Module]] = {
    "PixArtTransformer2DModel": _pixart,
    "FluxTransformer2DModel": _flux,
    "LatteTransformer3DModel": _latte,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "CogVideoXTransformer3DModel": _cogvideox,
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
}


def build_model(name: str, seed: int = 0) -> nn.Module:
    """A model of :data:`TINY_MODELS`, every weight random (some are initialized to zero by diffusers)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TINY_MODELS[name]().eval()
        for parameter in model.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.05)
    return model


def run_model(model: nn.Module) -> Tensor:
    """One denoising step on fixed inputs."""
    inputs = _inputs(type(model).__name__, next(p.dtype for p in model.parameters() if p.is_floating_point()))
    if type(model).__name__ == "PixArtTransformer2DModel":
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]
