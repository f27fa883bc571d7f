"""Transformers of videos, sound and proteins as tiny random models."""

from typing import Any

import torch
from tiny_inputs import MASK, STEPS, Tiny, full, grid, normal, text


def _video(*shape: int, **others: Any) -> dict[str, Any]:
    """Latents (batch, channels, frames, height, width) with text."""
    return {
        "hidden_states": normal(*(shape or (2, 4, 2, 8, 8))), "encoder_hidden_states": text(), "timestep": STEPS,
        **others,
    }  # fmt: skip


def _frames_first(**others: Any) -> dict[str, Any]:
    return _video(2, 2, 4, 8, 8, **others)


def _anyflow(**others: Any) -> dict[str, Any]:
    return _video(2, 2, 4, 8, 8, timestep=full(500, 2, 2), r_timestep=full(250, 2, 2), **others)


def _consisid() -> dict[str, Any]:
    return _frames_first(id_vit_hidden=[normal(2, 4, 32)] * 2, id_cond=normal(2, 32))


def _cosmos3() -> dict[str, Any]:
    places = torch.arange(6, 22)
    return {
        "input_ids": torch.arange(6), "text_indexes": torch.arange(6),
        "position_ids": torch.arange(22).expand(3, 22), "und_len": 6, "sequence_length": 22,
        "vision_tokens": [normal(1, 4, 1, 4, 4)], "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": places, "vision_mse_loss_indexes": places, "vision_timesteps": full(500, 16),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }  # fmt: skip


def _framepack() -> dict[str, Any]:
    return _hunyuan(
        hidden_states=normal(2, 4, 3, 4, 4), image_embeds=normal(2, 6, 64), indices_latents=full(1, 3),
        latents_clean=normal(2, 4, 2, 4, 4), indices_latents_clean=full(1, 2),
        latents_history_2x=normal(2, 4, 2, 4, 4), indices_latents_history_2x=full(1, 2),
        latents_history_4x=normal(2, 4, 8, 4, 4), indices_latents_history_4x=full(1, 8),
    )  # fmt: skip


def _hunyuan(**others: Any) -> dict[str, Any]:
    values = {
        "encoder_attention_mask": full(1, 2, 6), "pooled_projections": normal(2, 64), "guidance": full(6000, 2),
        "timestep": full(500, 2),
    }  # fmt: skip
    return _video(**values | others)


def _helios() -> dict[str, Any]:
    return _video(
        indices_hidden_states=full(1, 2, 2), indices_latents_history_short=full(1, 2, 1),
        indices_latents_history_mid=full(1, 2, 1), indices_latents_history_long=full(1, 2, 4),
        latents_history_short=normal(2, 4, 1, 8, 8), latents_history_mid=normal(2, 4, 1, 8, 8),
        latents_history_long=normal(2, 4, 4, 8, 8),
    )  # fmt: skip


def _kandinsky5() -> dict[str, Any]:
    return _video(
        2, 2, 8, 8, 4, timestep=full(500, 2), pooled_projections=normal(2, 64),
        visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)], text_rope_pos=torch.arange(6),
    )  # fmt: skip


def _ltx(**others: Any) -> dict[str, Any]:
    return _video(
        2, 32, 4, encoder_attention_mask=MASK, num_frames=2, height=4, width=4, **others
    )  # fmt: skip


def _minimax() -> dict[str, Any]:
    tags, steps = torch.zeros(26, dtype=torch.int64), torch.zeros(26, dtype=torch.int64)
    tags[:6], tags[6:10], steps[6:10] = 1, 2, 1
    places = torch.zeros(26, 3, dtype=torch.float32)
    places[:, 0] = torch.arange(26)
    places[10:, 1:] = grid(4, 4)
    return {
        "hidden_states": normal(2, 16, 16), "audio_hidden_states": normal(2, 4, 6), "encoder_hidden_states": text(),
        "timestep": torch.tensor([0.7, 0.3]), "timestep_indices": steps, "token_tags": tags, "position_ids": places,
        "video_indices": torch.arange(10, 26), "audio_indices": torch.arange(6, 10), "text_indices": torch.arange(6),
    }  # fmt: skip


def _protein() -> dict[str, Any]:
    return {
        "bb_ca": normal(2, 8, 3), "local_latents": normal(2, 8, 16), "bb_ca_time": full(0.5, 2),
        "local_latents_time": full(0.5, 2), "padding_mask": torch.ones(2, 8, dtype=torch.bool),
        "token_type": torch.zeros(2, 8, dtype=torch.int64), "atom37_mask": torch.ones(2, 8, 37, dtype=torch.bool),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(2, 8, dtype=torch.bool),
            "supports_local_latent": torch.ones(2, 8, dtype=torch.bool),
        },
    }  # fmt: skip


def _sana_world() -> dict[str, Any]:
    return {
        "hidden_states": normal(2, 4, 2, 4, 4), "timestep": full(500, 2, 1, 2),
        "encoder_hidden_states": normal(2, 1, 6, 64), "encoder_attention_mask": MASK,
        "camera_conditions": _camera(), "chunk_plucker": normal(2, 6, 2, 4, 4),
    }  # fmt: skip


def _camera() -> torch.Tensor:
    """A pose (4 x 4, the identity) and focal lengths and centre for each of two frames, (2, 2, 20)."""
    pose = torch.eye(4, dtype=torch.float32).flatten()
    return torch.cat([pose, torch.tensor([4.0, 4.0, 2.0, 2.0])]).expand(2, 2, 20)


def _wan_animate() -> dict[str, Any]:
    return _video(
        2, 12, 3, 8, 8, encoder_hidden_states_image=normal(2, 6, 64), pose_hidden_states=normal(2, 4, 2, 8, 8),
        face_pixel_values=normal(2, 3, 5, 16, 16),
    )  # fmt: skip


def _wan_animate2() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache  # not in older ones

    return {
        "hidden_states": [normal(4, 2, 4, 4)], "timestep": full(1, 1), "encoder_hidden_states": [normal(6, 64)],
        "condition_latents": [normal(8, 2, 4, 4)], "encoder_hidden_states_image": normal(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(2), "kv_cache_mode": "extract", "seq_len": 8,
        "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
    }  # fmt: skip


WAN = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 64,
    "freq_dim": 64, "ffn_dim": 128, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIDEO = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 64,
    "text_embed_dim": 64, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "patch_size": 2,
    "max_text_seq_length": 6,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 64, "pooled_projection_dim": 64,
    "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
JOY = {
    "in_channels": 4, "hidden_size": 64, "num_attention_heads": 4, "text_dim": 64, "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}  # fmt: skip
LTX = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64,
    "num_layers": 2, "caption_channels": 64,
}  # fmt: skip
LTX2 = {
    **LTX, "num_layers": 1, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16, "audio_cross_attention_dim": 64, "rope_double_precision": False,
}  # fmt: skip
KANDINSKY = {
    "in_visual_dim": 4, "in_text_dim": 64, "in_text_dim2": 64, "time_dim": 64, "out_visual_dim": 4, "model_dim": 64,
    "ff_dim": 128, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
}  # fmt: skip

VIDEOS = {
    "AceStepTransformer1DModel": Tiny(
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
         "sliding_window": 16},
        lambda: {"hidden_states": normal(2, 8, 8), "timestep": full(0.5, 2), "timestep_r": full(0.5, 2),
                 "encoder_hidden_states": text(), "context_latents": normal(2, 8, 16)},
    ),
    "AllegroTransformer3DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2, "cross_attention_dim": 96,
         "sample_height": 8, "sample_width": 8, "sample_frames": 4, "caption_channels": 64},
        _video,
    ),
    "AnyFlowFARTransformer3DModel": Tiny(
        WAN, lambda: _anyflow(chunk_partition=[1, 1]), gradient_fault="flex attention has no backward pass on a CPU"
    ),
    "AnyFlowTransformer3DModel": Tiny(WAN, _anyflow),
    "ChronoEditTransformer3DModel": Tiny(WAN, _video),
    "CogVideoXTransformer3DModel": Tiny(COGVIDEO, _frames_first),
    "ConsisIDTransformer3DModel": Tiny(
        {**COGVIDEO, "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 16,
         "cross_attn_num_heads": 4, "LFE_id_dim": 32, "LFE_vit_dim": 32, "LFE_depth": 2, "LFE_dim_head": 16,
         "LFE_num_heads": 4, "LFE_num_id_token": 1, "LFE_num_querie": 2, "LFE_output_dim": 42, "LFE_ff_mult": 1,
         "LFE_num_scale": 2},
        _consisid,
    ),
    "Cosmos3OmniTransformer": Tiny(
        {"head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "latent_channel": 4, "latent_patch_size": 1,
         "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "patch_latent_dim": 4,
         "vocab_size": 64, "rope_scaling": {"mrope_section": [4, 2, 2]}},
        _cosmos3,
    ),
    "CosmosTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
         "text_embed_dim": 64, "adaln_lora_dim": 64, "max_size": (4, 16, 16), "concat_padding_mask": False},
        lambda: _video(fps=30),
    ),
    "EasyAnimateTransformer3DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
         "num_layers": 2, "mmdit_layers": 2, "time_embed_dim": 64, "text_embed_dim": 64},
        _video,
    ),
    "HeliosTransformer3DModel": Tiny(
        {**{key: value for key, value in WAN.items() if key != "rope_max_seq_len"}, "rope_dim": (4, 6, 6)}, _helios
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 1,
         "num_refiner_layers": 1, "text_embed_dim": 64, "text_embed_2_dim": 32, "image_embed_dim": 32,
         "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v"},
        lambda: _video(timestep=full(500, 2), encoder_attention_mask=full(1, 2, 6), encoder_hidden_states_2=text(32),
                       encoder_attention_mask_2=full(1, 2, 6), image_embeds=normal(2, 3, 32)),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 64, "has_clean_x_embedder": True}, _framepack
    ),
    "HunyuanVideoTransformer3DModel": Tiny(HUNYUAN, _hunyuan),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        JOY, lambda: _video(2, 8, 4, 1, 2, 2, timestep=full(500, 2), shape_list=[[(1, 2, 2), (1, 2, 2)]] * 2)
    ),
    "JoyImageEditTransformer3DModel": Tiny(JOY, lambda: _video(2, 4, 1, 8, 8, timestep=full(500, 2))),
    "Kandinsky5Transformer3DModel": Tiny(KANDINSKY, _kandinsky5, "mixes float32 modulation with bfloat16 layers"),
    "Kandinsky6SRTransformer3DModel": Tiny(
        {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 64, "model_dim": 64, "ff_dim": 128,
         "num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        lambda: {"hidden_states": normal(2, 2, 8, 8, 9), "timestep": full(500, 2)},
        gradient_fault="flex attention has no backward pass on a CPU",
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {**KANDINSKY, "num_visual_blocks": 1, "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        lambda: _video(2, 2, 8, 8, 4, timestep=full(500, 2), pooled_projections=normal(2, 64),
                       audio_hidden_states=normal(2, 4, 4)),
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        {**LTX2, "gated_attn": True, "audio_gated_attn": True},
        lambda: _ltx(timestep=full(500, 2), audio_hidden_states=normal(2, 4, 4), audio_encoder_hidden_states=text(),
                     audio_num_frames=4),
    ),
    "LTXVideoTransformer3DModel": Tiny(LTX, _ltx),
    "LatteTransformer3DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "cross_attention_dim": 64, "attention_bias": True, "sample_size": 8, "patch_size": 2,
         "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
         "norm_elementwise_affine": False, "caption_channels": 64, "video_length": 2},
        _video,
    ),
    "LongCatAudioDiTTransformer": Tiny(
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 64, "latent_dim": 8, "text_conv": False},
        lambda: {"hidden_states": normal(2, 8, 8), "encoder_hidden_states": text(), "encoder_attention_mask": MASK,
                 "timestep": full(0.5, 2), "latent_cond": normal(2, 8, 8)},
    ),
    "MiniMaxH3Transformer3DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "hidden_size": 64, "num_layers": 2,
         "num_refiner_layers": 1, "ffn_dim": 128, "in_channels": 4, "audio_in_channels": 6, "text_dim": 64,
         "freq_dim": 64, "time_embed_hidden_dim": 64, "time_embed_dim": 64, "rope_freq_dim": 2},
        _minimax,
    ),
    "MiniMaxMusic3RVQDepthDecoder": Tiny(
        {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
         "audio_vocab_size": 16},
        lambda: {"inputs_embeds": normal(2, 8, 64)},
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        {"in_channels": 8, "condition_dim": 64, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16,
         "ff_inner_dim": 128, "rotary_dim": 8, "fourier_embedding_dim": 64},
        lambda: {"hidden_states": normal(2, 8, 16), "timestep": full(0.5, 2),
                 "encoder_hidden_states": normal(2, 16, 64)},
    ),
    "MochiTransformer3DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "pooled_projection_dim": 64,
         "in_channels": 4, "text_embed_dim": 64, "time_embed_dim": 64, "max_sequence_length": 6},
        lambda: _video(encoder_attention_mask=MASK),
    ),
    "MotifVideoTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 1,
         "num_single_layers": 1, "num_decoder_layers": 0, "text_embed_dim": 64, "rope_axes_dim": (4, 6, 6)},
        _video,
    ),
    "RFD4ProteinaTransformer": Tiny(
        {"nlayers": 2, "token_dim": 64, "nheads": 4, "dim_cond": 64, "pair_repr_dim": 32, "latent_dim": 16,
         "t_emb_dim": 64, "tri_mult_c": 32, "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
         "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"), "feats_pair_repr": ("xt_bb_ca_pair_dists",)},
        _protein,
    ),
    "SanaVideoTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
         "num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "cross_attention_dim": 64,
         "caption_channels": 64, "sample_size": 8, "rope_max_seq_len": 32},
        _video,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        LTX2,
        lambda: {"hidden_states": normal(2, 32, 4), "encoder_hidden_states": text(), "timestep": full(500, 2, 32),
                 "video_rotary_emb": (normal(2, 32, 64), normal(2, 32, 64))},
    ),
    "SanaWMTransformer3DModel": Tiny(
        {"in_channels": 4, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "softmax_every_n": 2,
         "linear_head_dim": 16, "chunk_plucker_channels": 6, "caption_channels": 64},
        _sana_world, "mixes float32 attention with bfloat16 layers",
    ),
    "SkyReelsV2Transformer3DModel": Tiny(WAN, _video),
    "StableAudio3DiTModel": Tiny(
        {"io_channels": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "cond_token_dim": 64, "global_cond_dim": 64,
         "local_add_cond_dim": 5, "timestep_features_dim": 64, "ff_mult": 2, "num_memory_tokens": 3},
        lambda: {"hidden_states": normal(2, 8, 16), "timestep": full(0.5, 2), "encoder_hidden_states": text(),
                 "global_hidden_states": normal(2, 64)},
    ),
    "StableAudioDiTModel": Tiny(
        {"sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 32, "time_proj_dim": 64,
         "global_states_input_dim": 64, "cross_attention_input_dim": 64},
        lambda: {"hidden_states": normal(2, 4, 16), "timestep": full(500, 2), "encoder_hidden_states": text(),
                 "global_hidden_states": normal(2, 1, 64), "rotary_embedding": (normal(17, 8), normal(17, 8))},
    ),
    "T5FilmDecoder": Tiny(
        {"input_dims": 8, "targets_length": 16, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16,
         "d_ff": 128},
        lambda: {"encodings_and_masks": [(text(), full(1, 2, 6))], "decoder_input_tokens": normal(2, 16, 8),
                 "decoder_noise_time": full(0.5, 2)},
    ),
    "TransformerTemporalModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 32, "num_layers": 2, "norm_num_groups": 4},
        lambda: {"hidden_states": normal(4, 32, 4, 4), "num_frames": 2},
    ),
    "WanAnimate2Transformer3DModel": Tiny(
        {"text_len": 8, "in_dim": 12, "dim": 64, "ffn_dim": 128, "freq_dim": 64, "text_dim": 64, "out_dim": 4,
         "num_heads": 4, "num_layers": 2},
        _wan_animate2,
    ),
    "WanAnimateTransformer3DModel": Tiny(
        {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 64,
         "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
         "motion_style_dim": 64, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 64,
         "face_encoder_num_heads": 4, "inject_face_latents_blocks": 2},
        _wan_animate,
    ),
    "WanTransformer3DModel": Tiny(WAN, _video),
    "WanVACETransformer3DModel": Tiny(
        {**WAN, "vace_layers": [0], "vace_in_channels": 8}, lambda: _video(control_hidden_states=normal(2, 8, 2, 8, 8))
    ),
}  # fmt: skip
