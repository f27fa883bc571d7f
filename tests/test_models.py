import dataclasses
import re

import pytest
from conftest import build_tiny_pipeline
from tiny_transformers import TINY, build_model
from torch import nn

from lrqdit.config import WEIGHT_BITS, QuantizationConfig
from lrqdit.errors import ModelError
from lrqdit.models.registry import GENERIC, MODELS, Treatment, call_arguments, find_spec, plan
from lrqdit.models.spec import ModelSpec

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


CONFIG = QuantizationConfig.from_name("w4a8", keep_bits=16)
LOW_BIT, WEIGHT_ONLY_LAYER, KEPT_LAYER = Treatment(4, 8, WEIGHT_BITS), Treatment(4, 16, (4, 5, 6, 8)), Treatment(16)


def sort_layers(model, *exclude):
    """Names of a model's linear layers by treatment: low-bit, weight-only, kept."""
    found = plan(model, dataclasses.replace(CONFIG, exclude=exclude))
    assert set(found.values()) <= {LOW_BIT, WEIGHT_ONLY_LAYER, KEPT_LAYER}
    return tuple(
        [name for name in found if found[name] == treatment] for treatment in (LOW_BIT, WEIGHT_ONLY_LAYER, KEPT_LAYER)
    )


def names(prefix, *leaves):
    return {f"{prefix}.{leaf}" for leaf in leaves}


# The low-bit layers of the first block of each architecture, written down by hand.
EXPECTED = {
    "PixArtTransformer2DModel": names("transformer_blocks.0.attn1", *ATTENTION)
    | names("transformer_blocks.0.attn2", *ATTENTION)
    | names("transformer_blocks.0.ff.net", "0.proj", "2"),
    "FluxTransformer2DModel": names("transformer_blocks.0.attn", *ATTENTION)
    | names("transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    | names("transformer_blocks.0.ff.net", "0.proj", "2")
    | names("transformer_blocks.0.ff_context.net", "0.proj", "2")
    | names("single_transformer_blocks.0", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"),
    "LatteTransformer3DModel": names("transformer_blocks.0.attn1", *ATTENTION)
    | names("transformer_blocks.0.attn2", *ATTENTION)
    | names("transformer_blocks.0.ff.net", "0.proj", "2")
    | names("temporal_transformer_blocks.0.attn1", *ATTENTION)
    | names("temporal_transformer_blocks.0.ff.net", "0.proj", "2"),
    "SD3Transformer2DModel": names("transformer_blocks.0.attn", *ATTENTION)
    | names("transformer_blocks.0.attn2", *ATTENTION)
    | names("transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    | names("transformer_blocks.0.ff.net", "0.proj", "2")
    | names("transformer_blocks.0.ff_context.net", "0.proj", "2"),
    "SanaTransformer2DModel": names("transformer_blocks.0.attn1", *ATTENTION)
    | names("transformer_blocks.0.attn2", *ATTENTION)
    | names("transformer_blocks.0.ff", "conv_inverted", "conv_point"),
    "CogVideoXTransformer3DModel": names("transformer_blocks.0.attn1", *ATTENTION)
    | names("transformer_blocks.0.ff.net", "0.proj", "2"),
    "WanTransformer3DModel": names("blocks.0.attn1", *ATTENTION)
    | names("blocks.0.attn2", *ATTENTION)
    | names("blocks.0.ffn.net", "0.proj", "2"),
    "HunyuanVideoTransformer3DModel": names("transformer_blocks.0.attn", *ATTENTION)
    | names("transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    | names("transformer_blocks.0.ff.net", "0.proj", "2")
    | names("transformer_blocks.0.ff_context.net", "0.proj", "2")
    | names("single_transformer_blocks.0", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"),
}
REFINER = "context_embedder.token_refiner.refiner_blocks.0"
EXPECTED_REFINER = names(f"{REFINER}.attn", *ATTENTION) | names(f"{REFINER}.ff.net", "0.proj", "2")
CONVOLUTIONS = (".conv_inverted", ".conv_point")
WEIGHT_ONLY = {
    "FluxTransformer2DModel": {
        *names("transformer_blocks.0", "norm1.linear", "norm1_context.linear"),
        "single_transformer_blocks.0.norm.linear",
    },
    "SD3Transformer2DModel": {
        *names("transformer_blocks.0", "norm1.linear", "norm1_context.linear"),
        *names("transformer_blocks.1", "norm1.linear", "norm1_context.linear"),
    },
    "CogVideoXTransformer3DModel": {
        *names("transformer_blocks.0", "norm1.linear", "norm2.linear"),
        *names("transformer_blocks.1", "norm1.linear", "norm2.linear"),
    },
    "HunyuanVideoTransformer3DModel": {
        *names("transformer_blocks.0", "norm1.linear", "norm1_context.linear"),
        "single_transformer_blocks.0.norm.linear",
        f"{REFINER}.norm_out.linear",
    },
}


def test_entries_are_classes_of_diffusers():
    """What their patterns take is tested over every class, in test_every_transformer.py."""
    assert set(MODELS) <= set(TINY)


@pytest.mark.parametrize("name", EXPECTED)
def test_selection(name):
    model = build_model(name)
    quantized, weight_only, kept = sort_layers(model)
    of_first_block = {n for n in quantized if re.match(r"\w+\.0\.", n)}
    assert of_first_block == EXPECTED[name]
    assert set(weight_only) == WEIGHT_ONLY.get(name, set())
    linear = [n for n, layer in model.named_modules() if isinstance(layer, nn.Linear) or n.endswith(CONVOLUTIONS)]
    assert sorted([*quantized, *weight_only, *kept]) == sorted(linear)  # each layer once
    refined = {n for n in quantized if "emb" in n}
    assert kept and refined == (EXPECTED_REFINER if name == "HunyuanVideoTransformer3DModel" else set())


def tree(*layer_names, width=4):
    """A module with linear layers of the given names."""
    root = nn.Module()
    for name in layer_names:
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(leaf, nn.Linear(width, width))
    return root


QUANTIZED = [
    "layers.0.self_attn.to_q",
    "layers.0.mlp.gate_up_proj",
    "layers.0.mlp.gate_proj",
    "layers.0.ff.gate",
    "layers.0.ffn.w1",
    "blocks.3.attention.proj_out",
    "blocks.3.adapter_free.proj",
    "single_blocks.1.linear2",
]
MODULATION = [
    "blocks.0.adaLN_modulation.1",
    "blocks.0.ada_norm",
    "blocks.0.img_mod.1",
    "blocks.0.txt_mod.1",
    "blocks.0.mod.lin",
    "blocks.0.norm1.linear",
    "blocks.0.norm1_context.linear",
    "blocks.0.layer.1.FiLMLayer.scale",
]
KEPT = [
    "x_embedder",
    "proj_out",
    "proj_out.0",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
    "stream_modulation.linear",
    "blocks.0.time_mlp.0",
    "blocks.0.moe.router",
    "blocks.0.moe.gate",
    "blocks.0.pos_embed.proj",
    "blocks.0.time_text_embed.timestep_embedder.linear_1",
    "blocks.0.norm1.emb.timestep_embedder.linear_1",
    "caption_projection.0.linear",
    "prior_projector.net.0.proj",
]


def test_generic_rule():
    quantized, weight_only, kept = sort_layers(tree(*QUANTIZED, *MODULATION, *KEPT, width=64))
    assert (set(quantized), set(weight_only), set(kept)) == (set(QUANTIZED), set(MODULATION), set(KEPT))


def test_small_modulation_layers_stay_as_they_are():
    assert set(sort_layers(tree(*QUANTIZED, *MODULATION))[2]) == set(MODULATION)


def test_layers_of_few_outputs_are_kept():
    """Routers, gates of whole heads: whatever their names, where the generic rule decides."""
    block = nn.ModuleDict({"to_q": nn.Linear(64, 64), "beta": nn.Linear(64, 4), "down": nn.Linear(64, 8)})
    quantized, _, kept = sort_layers(nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    assert (quantized, kept) == (["blocks.0.to_q", "blocks.0.down"], ["blocks.0.beta"])


def test_layers_in_float32_stay_as_they_are():
    """A Wan asks its time embedder for the dtype of a parameter, so it must have one."""
    model = build_model("WanTransformer3DModel")
    found = plan(model, QuantizationConfig())
    embedder = {name: found[name] for name in found if "time_embedder" in name}
    assert len(embedder) == 2 and set(embedder.values()) == {KEPT_LAYER}
    assert min(model.get_submodule(name).weight.numel() for name in embedder) >= 4096
    assert found["condition_embedder.time_proj"] == Treatment(8)


def test_layers_whose_owner_reads_the_weight_stay_as_they_are():
    model = build_model("HunyuanDiT2DModel")
    found = plan(model, QuantizationConfig())
    assert found["time_extra_emb.pooler.q_proj"] == KEPT_LAYER
    assert model.time_extra_emb.pooler.q_proj.weight.numel() >= 4096


def test_module_without_blocks():
    assert sort_layers(tree("first", "second", "proj_out")) == (["first", "second"], [], ["proj_out"])


def test_subclasses_of_linear_are_left_alone():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert set(sort_layers(model)[0]) == {"linear1", "linear2"}  # not self_attn.out_proj, which reads .weight


def test_exclude():
    model = tree("blocks.0.q", "blocks.0.k", "blocks.1.q")
    assert sort_layers(model, r"\.q$")[0] == ["blocks.0.k"]
    with pytest.raises(
        ModelError, match=r"exclude='z' matches no linear layer of Module; its layers are named like blocks"
    ):
        plan(model, dataclasses.replace(CONFIG, exclude=("z",)))
    with pytest.raises(ModelError, match=r"no linear layer to quantize \(3 found\)"):
        plan(model, dataclasses.replace(CONFIG, exclude=("q", "k")))
    with pytest.raises(ModelError, match=r"\(0 found\)"):
        plan(nn.Conv2d(1, 1, 1), CONFIG)
    with pytest.raises(ModelError, match="it has none"):
        plan(nn.Conv2d(1, 1, 1), dataclasses.replace(CONFIG, exclude=("a",)))


def test_excluded_layers_stay_as_they_are():
    layers = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]), "proj_out": nn.Linear(64, 64)}
    )
    found = plan(layers, QuantizationConfig(exclude=("blocks.1", "proj_out")))
    assert found["blocks.1"] == found["proj_out"] == KEPT_LAYER and found["blocks.0"].weight_bits == 4


def test_exclude_reaches_weight_only_layers():
    kept = sort_layers(build_model("FluxTransformer2DModel"), r"norm\.linear")[2]
    assert "single_transformer_blocks.0.norm.linear" in kept


def test_bits_of_treatments():
    """Weight-only layers get at least 4 bits and float inputs; with a budget errors are compared at 4 bits or fewer."""
    model = build_model("FluxTransformer2DModel")

    def bits(preset, **settings):
        found = plan(model, QuantizationConfig.from_name(preset, **settings))
        leaves = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear", "norm_out.linear", "proj_out"
        return [(found[leaf].weight_bits, found[leaf].activation_bits) for leaf in leaves]

    assert bits("w3a8") == [(3, 8), (4, 16), (8, 16), (16, 16)]  # the last of them is small
    assert bits("w6a4") == [(6, 4), (6, 16), (8, 16), (16, 16)]
    assert bits("w6a4", average_bits=5.0) == [(4, 4), (4, 16), (8, 16), (16, 16)]


def test_large_kept_layers_are_stored_at_8_bits():
    layers = nn.ModuleDict({"blocks": nn.ModuleDict({"0": nn.Linear(64, 64)}), "norm_out": nn.Linear(64, 64)})
    found = plan(layers, QuantizationConfig())
    assert found["norm_out"] == Treatment(8) and not found["norm_out"].is_fitted
    assert plan(layers, QuantizationConfig(keep_bits=16))["norm_out"] == KEPT_LAYER


def test_find_spec():
    assert find_spec(nn.Linear(1, 1)) is GENERIC
    assert find_spec(build_model("PixArtTransformer2DModel")) is MODELS["PixArtTransformer2DModel"]


def test_call_arguments(monkeypatch):
    pipeline = build_tiny_pipeline()
    assert call_arguments(pipeline) == {"use_resolution_binning": False, "clean_caption": False}
    pipeline.transformer.register_to_config(sample_size=64)
    assert call_arguments(pipeline) == {"clean_caption": False}
    spec = ModelSpec(".*", call_arguments={"guidance_scale": 1.5, "unheard_of": 1})
    monkeypatch.setitem(MODELS, "PixArtTransformer2DModel", spec)
    assert call_arguments(pipeline) == {"guidance_scale": 1.5, "clean_caption": False}
