"""Transformers of pictures (and of their embeddings) as tiny random models."""

from typing import Any

import torch
from tiny_inputs import MASK, STEPS, Tiny, full, grid, normal, text


def _tokens_and_ids(axes: int = 3, **others: Any) -> dict[str, Any]:
    """Packed latents and text as FLUX takes them."""
    image = torch.zeros(16, axes, dtype=torch.float32)
    image[:, 1:3] = grid(4, 4)
    return {
        "hidden_states": normal(2, 16, 4), "encoder_hidden_states": text(), "timestep": full(0.5, 2),
        "img_ids": image, "txt_ids": torch.zeros(6, axes, dtype=torch.float32), **others,
    }  # fmt: skip


def _latents(**others: Any) -> dict[str, Any]:
    return {"hidden_states": normal(2, 4, 8, 8), "encoder_hidden_states": text(), "timestep": STEPS, **others}


def _sized(**others: Any) -> dict[str, Any]:
    size = torch.tensor([[64, 64], [64, 64]])
    return _latents(target_size=size, crop_coords=torch.zeros(2, 2, dtype=torch.int64), **others)


def _qwen_image(**others: Any) -> dict[str, Any]:
    return {
        "hidden_states": normal(2, 16, 16), "encoder_hidden_states": text(), "timestep": full(0.5, 2),
        "encoder_hidden_states_mask": MASK.long(), "img_shapes": [(1, 4, 4)] * 2, **others,
    }  # fmt: skip


def _ideogram() -> dict[str, Any]:
    positions = torch.zeros(2, 10, 3, dtype=torch.int64)
    positions[:, :6] = torch.arange(6)[:, None]
    positions[:, 6:, 1:] = grid(2, 2).long()
    positions[:, 6:] += 65536
    is_picture = torch.arange(10) >= 6
    return {
        "hidden_states": normal(2, 10, 8), "encoder_hidden_states": normal(2, 10, 64), "timestep": full(0.5, 2),
        "position_ids": positions, "segment_ids": torch.ones(2, 10, dtype=torch.int64),
        "indicator": torch.where(is_picture, 2, 3).expand(2, 10),
    }  # fmt: skip


def _krea() -> dict[str, Any]:
    positions = torch.zeros(22, 3, dtype=torch.float32)
    positions[6:, 1:] = grid(4, 4)
    return {
        "hidden_states": normal(2, 16, 8), "encoder_hidden_states": normal(2, 6, 2, 64), "timestep": full(0.5, 2),
        "position_ids": positions, "encoder_attention_mask": MASK,
    }  # fmt: skip


def _omnigen() -> dict[str, Any]:
    return {
        "hidden_states": normal(2, 4, 8, 8), "timestep": full(0.5, 2), "input_ids": torch.arange(48).reshape(2, 24),
        "input_img_latents": [normal(1, 4, 8, 8)], "input_image_sizes": {0: [[0, 16]]},
        "attention_mask": torch.ones(2, 41, 41, dtype=torch.float32), "position_ids": torch.arange(41).expand(2, 41),
    }  # fmt: skip


def _hunyuan_dit() -> dict[str, Any]:
    return {
        "hidden_states": normal(2, 4, 8, 8), "timestep": full(500, 2), "encoder_hidden_states": text(32),
        "text_embedding_mask": full(1, 2, 6), "encoder_hidden_states_t5": text(),
        "text_embedding_mask_t5": full(1, 2, 6),
        "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * 2), "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": [full(1, 16, 16), full(0, 16, 16)],
    }  # fmt: skip


DOUBLE_AND_SINGLE = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 4, "joint_attention_dim": 64, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
QWEN = {
    "in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
COGVIEW = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
    "text_embed_dim": 64, "time_embed_dim": 64, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
}  # fmt: skip

PICTURES = {
    "AuraFlowTransformer2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 64,
         "out_channels": 4, "pos_embed_max_size": 64},
        lambda: _latents(timestep=full(0.5, 2)),
    ),
    "BriaFibo2Transformer2DModel": Tiny(
        {"in_channels": 4, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "cap_feat_dim": 64,
         "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
         "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (4, 6, 6),
         "axes_lens": (64, 16, 16)},
        lambda: _latents(encoder_hidden_states=normal(2, 2, 6, 64), timestep=full(0.5, 2)),
    ),
    "BriaFiboTransformer2DModel": Tiny(
        {**DOUBLE_AND_SINGLE, "text_encoder_dim": 32, "axes_dims_rope": [4, 4, 8]},
        lambda: _tokens_and_ids(text_encoder_layers=[text(32), text(32)]),
    ),
    "BriaTransformer2DModel": Tiny({**DOUBLE_AND_SINGLE, "axes_dims_rope": [4, 4, 8]}, _tokens_and_ids),
    "ChromaTransformer2DModel": Tiny(
        {**DOUBLE_AND_SINGLE, "approximator_num_channels": 8, "approximator_hidden_dim": 64, "approximator_layers": 2},
        _tokens_and_ids,
    ),
    "CogView3PlusTransformer2DModel": Tiny(COGVIEW, lambda: _sized(original_size=torch.tensor([[64, 64]] * 2))),
    "CogView4Transformer2DModel": Tiny(
        {**COGVIEW, "rope_axes_dim": (16, 16)}, lambda: _sized(original_size=torch.tensor([[64, 64]] * 2))
    ),
    "DiTTransformer2DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "sample_size": 8, "norm_num_groups": 4},
        lambda: {"hidden_states": normal(2, 4, 8, 8), "timestep": STEPS, "class_labels": torch.tensor([1, 2])},
    ),
    "DreamLiteTransformer2DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 32, "num_layers": 2, "norm_num_groups": 4,
         "cross_attention_dim": 64, "use_linear_projection": True},
        lambda: {"hidden_states": normal(2, 32, 8, 8), "encoder_hidden_states": text()},
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {"hidden_size": 64, "num_attention_heads": 4, "num_layers": 2, "ffn_hidden_size": 128, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 64, "rope_axes_dim": (4, 6, 6)},
        lambda: {"hidden_states": normal(2, 4, 4, 4), "timestep": full(0.5, 2), "text_bth": text(),
                 "text_lens": torch.tensor([6, 6])},
    ),
    "Flux2Transformer2DModel": Tiny(
        {**DOUBLE_AND_SINGLE, "axes_dims_rope": (4, 4, 4, 4)}, lambda: _tokens_and_ids(4, guidance=full(3, 2))
    ),
    "Flux3Transformer2DModel": Tiny(
        {"in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 4, "joint_attention_dim": 64, "axes_dims_rope": (4, 4, 4, 4)},
        lambda: _tokens_and_ids(4),
    ),
    "FluxTransformer2DModel": Tiny(
        {**DOUBLE_AND_SINGLE, "pooled_projection_dim": 64, "guidance_embeds": True},
        lambda: _tokens_and_ids(pooled_projections=normal(2, 64), guidance=full(3, 2)),
    ),
    "GlmImageTransformer2DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "text_embed_dim": 64, "time_embed_dim": 64, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 64},
        lambda: _sized(prior_token_id=torch.arange(32).reshape(2, 16), prior_token_drop=torch.tensor([False, True])),
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "attention_head_dim": 16, "num_attention_heads": 4, "caption_channels": [64, 64], "text_emb_dim": 64,
         "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6), "max_resolution": (16, 16),
         "llama_layers": (0, 1), "force_inference_output": True},
        lambda: {"hidden_states": normal(2, 4, 8, 8), "timesteps": STEPS, "pooled_embeds": normal(2, 64),
                 "encoder_hidden_states_t5": text(), "encoder_hidden_states_llama3": normal(2, 2, 6, 64)},
    ),
    "HunyuanDiT2DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 8,
         "hidden_size": 64, "num_layers": 4, "cross_attention_dim": 32, "cross_attention_dim_t5": 64,
         "pooled_projection_dim": 32, "text_len": 6, "text_len_t5": 6},
        _hunyuan_dit,
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 1,
         "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 64, "text_embed_2_dim": 32,
         "rope_axes_dim": (8, 8)},
        lambda: _latents(timestep=full(0.5, 2), encoder_attention_mask=MASK, encoder_hidden_states_2=text(32),
                         encoder_attention_mask_2=MASK),
    ),
    "Ideogram4Transformer2DModel": Tiny(
        {"in_channels": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "intermediate_size": 128, "adaln_dim": 64, "llm_features_dim": 64, "mrope_section": (4, 2, 2)},
        _ideogram,
    ),
    "Krea2Transformer2DModel": Tiny(
        {"in_channels": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 128, "timestep_embed_dim": 64, "text_hidden_dim": 64,
         "num_text_layers": 2, "text_num_attention_heads": 4, "text_num_key_value_heads": 2,
         "text_intermediate_size": 128, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
         "axes_dims_rope": (4, 6, 6)},
        _krea,
    ),
    "LongCatImageTransformer2DModel": Tiny(
        {**DOUBLE_AND_SINGLE, "pooled_projection_dim": 64, "axes_dims_rope": [4, 4, 8]}, _tokens_and_ids
    ),
    "Lumina2Transformer2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 6, 6),
         "axes_lens": (64, 16, 16), "cap_feat_dim": 64},
        lambda: _latents(timestep=full(0.5, 2), encoder_attention_mask=MASK),
    ),
    "LuminaNextDiT2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4,
         "num_kv_heads": 2, "multiple_of": 16, "cross_attention_dim": 64},
        lambda: _latents(timestep=full(0.5, 2), encoder_mask=full(1, 2, 6), image_rotary_emb=normal(384, 384, 8),
                         cross_attention_kwargs={}),
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        {**QWEN, "out_channels": 4, "num_layers": 5, "joint_attention_dim": 64, "num_experts": 4,
         "moe_intermediate_dim": 64, "capacity_factors": 2.0},
        _qwen_image,
    ),
    "OmniGenTransformer2DModel": Tiny(
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128,
         "num_layers": 2, "pad_token_id": 0, "vocab_size": 64, "time_step_dim": 64, "pos_embed_max_size": 16,
         "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}},
        _omnigen,
    ),
    "OvisImageTransformer2DModel": Tiny({**DOUBLE_AND_SINGLE, "out_channels": 4}, _tokens_and_ids),
    "PRXTransformer2DModel": Tiny(
        {"in_channels": 4, "context_in_dim": 64, "hidden_size": 64, "num_heads": 4, "depth": 2, "axes_dim": [8, 8]},
        lambda: _latents(timestep=full(0.5, 2)),
    ),
    "PixArtTransformer2DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "cross_attention_dim": 64,
         "caption_channels": 64, "sample_size": 8, "norm_num_groups": 4},
        lambda: _latents(added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "PriorTransformer": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 64, "num_embeddings": 6},
        lambda: {"hidden_states": normal(2, 64), "timestep": 2, "proj_embedding": normal(2, 64),
                 "encoder_hidden_states": text()},
    ),
    "QwenImage21Transformer2DModel": Tiny(
        {**QWEN, "out_channels": 16, "context_in_dim": 64},
        lambda: _qwen_image(img_shapes=[[(1, 4, 4)]] * 2, img_mask=(torch.arange(10) >= 6).expand(2, 10)),
    ),
    "QwenImageTransformer2DModel": Tiny({**QWEN, "out_channels": 4, "joint_attention_dim": 64}, _qwen_image),
    "SD3Transformer2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "joint_attention_dim": 64, "caption_projection_dim": 64, "pooled_projection_dim": 64, "out_channels": 4,
         "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: _latents(pooled_projections=normal(2, 64)),
    ),
    "SanaTransformer2DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
         "num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "cross_attention_dim": 64,
         "caption_channels": 64, "sample_size": 8},
        _latents,
    ),
    "Transformer2DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 32, "num_layers": 2, "norm_num_groups": 4,
         "cross_attention_dim": 64, "use_linear_projection": True},
        lambda: {"hidden_states": normal(2, 32, 8, 8), "encoder_hidden_states": text()},
    ),
    "ZImageTransformer2DModel": Tiny(
        {"in_channels": 4, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
         "cap_feat_dim": 64, "axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]},
        lambda: {"x": [normal(4, 1, 8, 8)] * 2, "cap_feats": [normal(6, 64)] * 2, "t": full(0.5, 2)},
    ),
}  # fmt: skip
