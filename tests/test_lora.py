"""LoRA as people use it on quantized pipelines: files, several at once, other adapters, training, merging, saving."""

import copy

import diffusers
import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import FLUX_CALL, SD3_CALL, WAN_CALL, flux, flux_transformer, sd3, wan

import lrqdit
from lrqdit.errors import ModelError, NumericalError
from lrqdit.packed.checkpoint import stored_tensors
from lrqdit.packed.linear import QuantLinear

# PEFT and diffusers warn of several adapters, and of merging
pytestmark = pytest.mark.filterwarnings("ignore:Already found a:UserWarning", "ignore:.*merg:UserWarning")
ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
KINDS_OF_ENCODER = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
CALLS = {"flux": FLUX_CALL, "sd3": SD3_CALL, "wan": WAN_CALL}


def run(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    call = next(
        CALLS[key] for key in CALLS if key in type(pipeline).__name__.lower().replace("stablediffusion3", "sd3")
    )
    call = {"output_type": "latent", "num_inference_steps": 2, **call, **arguments}
    output = pipeline("a fox", generator=torch.Generator().manual_seed(0), **call)
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


def quantized(pipeline, preset="w4a8"):
    lrqdit.quantize(pipeline, preset, is_calibrated=False, show_progress=False)
    return pipeline


def relative(a, b):
    return float((a - b).norm() / b.norm())


def random_lora(folder, pipeline, targets, seed=1, rank=4, part="transformer"):
    """A LoRA file in diffusers' names, of random weights."""
    model = copy.deepcopy(getattr(pipeline, part))
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False), "x")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.25)
    state = peft.get_peft_model_state_dict(model, adapter_name="x")
    type(pipeline).save_lora_weights(folder, **{f"{part}_lora_layers": state})
    return folder


def kohya_lora(path):
    """FLUX in the names of kohya-ss: fused projections, alpha beside them."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, width, out in (("img_attn_qkv", 64, 192), ("img_mlp_0", 64, 256), ("txt_mod_lin", 64, 384)):
        key = f"lora_unet_double_blocks_0_{name}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(3, width, generator=generator) * 0.3
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, 3, generator=generator) * 0.3
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
    save_file(tensors, path)
    return path


def comfyui_lora(path):
    """Wan in the names of ComfyUI's trainers: the original model's, below diffusion_model."""
    generator, tensors = torch.Generator().manual_seed(6), {}
    for block in range(2):
        for name, width, out in (("self_attn.q", 48, 48), ("self_attn.v", 48, 48), ("ffn.2", 96, 48)):
            key = f"diffusion_model.blocks.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(3, width, generator=generator) * 0.3
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, 3, generator=generator) * 0.3
    save_file(tensors, path)
    return path


def check_effect(build, load, call=None):
    """A LoRA does to a quantized pipeline what it does to the float one; unloaded, it leaves every bit."""
    exact, small = build(), quantized(build())
    exact_before, before = run(exact, **(call or {})), run(small, **(call or {}))
    load(exact), load(small)
    exact_effect, effect = run(exact, **(call or {})) - exact_before, run(small, **(call or {})) - before
    assert exact_effect.norm() > 0.02 * exact_before.norm()
    assert relative(effect, exact_effect) < 0.3
    small.unload_lora_weights()
    assert torch.equal(run(small, **(call or {})), before)


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_files_for_flux(tmp_path, names):
    if names == "kohya":
        source = kohya_lora(tmp_path / "lora.safetensors")
    else:
        source = random_lora(tmp_path / "lora", flux(), [*ATTENTION, "proj_mlp", "norm1.linear"])
    check_effect(flux, lambda pipeline: pipeline.load_lora_weights(source))


def test_files_for_wan_in_comfyuis_names(tmp_path):
    source = comfyui_lora(tmp_path / "lora.safetensors")
    check_effect(wan, lambda pipeline: pipeline.load_lora_weights(source))


def test_files_for_sd3(tmp_path):
    source = random_lora(tmp_path, sd3(), ATTENTION)
    check_effect(sd3, lambda pipeline: pipeline.load_lora_weights(source))


def test_files_for_both_transformers_of_wan(tmp_path):
    def build():
        torch.manual_seed(3)
        second = wan().transformer
        return wan(transformer_2=second, boundary_ratio=0.9)

    source = random_lora(tmp_path, build(), ["attn1.to_q", "attn1.to_v", "ffn.net.2"])

    def load(pipeline):
        pipeline.load_lora_weights(source, adapter_name="high")
        pipeline.load_lora_weights(source, adapter_name="low", load_into_transformer_2=True)

    check_effect(build, load)


def test_several_with_weights_switched_and_deleted(tmp_path):
    one, two = random_lora(tmp_path / "a", flux(), ATTENTION), random_lora(tmp_path / "b", flux(), ATTENTION, 2, 2)

    def load(pipeline):
        pipeline.load_lora_weights(one, adapter_name="a")
        pipeline.load_lora_weights(two, adapter_name="b")
        pipeline.set_adapters(["a", "b"], adapter_weights=[0.7, -0.5])

    check_effect(flux, load)
    pipeline = quantized(flux())
    before = run(pipeline)
    load(pipeline)
    both = run(pipeline)
    pipeline.disable_lora()
    assert torch.equal(run(pipeline), before)
    pipeline.enable_lora()
    assert torch.equal(run(pipeline), both)
    assert torch.equal(run(pipeline, joint_attention_kwargs={"scale": 0.0}), before)
    assert not torch.equal(run(pipeline, joint_attention_kwargs={"scale": 0.5}), both)
    pipeline.delete_adapters(["a", "b"])
    assert torch.equal(run(pipeline), before)


def test_hot_swap(tmp_path):
    one, two = random_lora(tmp_path / "a", flux(), ATTENTION), random_lora(tmp_path / "b", flux(), ATTENTION, 2)
    pipeline, other = quantized(flux()), quantized(flux())
    pipeline.load_lora_weights(one, adapter_name="a")
    pipeline.load_lora_weights(two, adapter_name="a", hotswap=True)
    other.load_lora_weights(two)
    torch.testing.assert_close(run(pipeline), run(other))


def test_control_lora_widens_its_layer(tmp_path):
    """The layer that it widens becomes a dense one, with the dequantized weight."""
    transformer = flux_transformer()
    state = {
        "transformer.x_embedder.lora_A.weight": torch.randn(4, 32) * 0.3,
        "transformer.x_embedder.lora_B.weight": torch.randn(64, 4) * 0.3,
    }
    save_file(state, tmp_path / "control.safetensors")
    for settings in ({}, {"exclude": ["x_embedder"]}):
        pipeline = flux(diffusers.FluxControlPipeline, transformer=copy.deepcopy(transformer))
        lrqdit.quantize(pipeline, "w4a8", is_calibrated=False, show_progress=False, **settings)
        pipeline.load_lora_weights(tmp_path / "control.safetensors")
        assert pipeline.transformer.config.in_channels == 32
        image = torch.rand(1, 3, 32, 32)
        pipeline.set_progress_bar_config(disable=True)
        found = pipeline("a", control_image=image, num_inference_steps=1, output_type="latent", **FLUX_CALL).images
        assert torch.as_tensor(found).isfinite().all()


KINDS = {
    "lora": peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False),
    "rslora": peft.LoraConfig(r=2, use_rslora=True, target_modules=ATTENTION, init_lora_weights=False),
    "bias": peft.LoraConfig(r=2, lora_bias=True, target_modules=ATTENTION, init_lora_weights=False),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=ATTENTION, init_lora_weights=False),
    "loha": peft.LoHaConfig(r=2, target_modules=ATTENTION, init_weights=False),
    "lokr": peft.LoKrConfig(r=2, target_modules=ATTENTION, init_weights=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_act_as_on_the_dequantized_model(kind):
    """Of 16-bit activations, so that nothing else differs."""
    pipeline = flux()
    lrqdit.quantize(pipeline, "w4a16", prompts=["a", "b"], steps=1, arguments=FLUX_CALL, show_progress=False)
    dense = copy.deepcopy(pipeline)
    for name, layer in list(dense.transformer.named_modules()):
        if isinstance(layer, QuantLinear):
            dense.transformer.set_submodule(name, layer.to_linear())
    before = run(pipeline)
    for either in (pipeline, dense):
        torch.manual_seed(1)
        either.transformer.add_adapter(KINDS[kind])
        for name, parameter in either.transformer.named_parameters():
            if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
                parameter.data.mul_(3.0)
    after = run(pipeline)
    assert relative(after, before) > 0.01
    torch.testing.assert_close(after, run(dense), rtol=1e-3, atol=1e-3)
    pipeline.transformer.unload_lora()
    assert torch.equal(run(pipeline), before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_weights_are_refused_by_name(start):
    pipeline = quantized(flux())
    before = run(pipeline)
    with pytest.raises(ModelError, match="(?i)pissa, olora.*") as error:
        pipeline.transformer.add_adapter(peft.LoraConfig(r=2, init_lora_weights=start, target_modules=ATTENTION))
    assert "init_lora_weights=True or 'gaussian'" in str(error.value)
    fresh = quantized(flux())
    fresh.transformer.add_adapter(peft.LoraConfig(r=2, init_lora_weights="gaussian", target_modules=ATTENTION))
    assert torch.equal(run(fresh), before)


@pytest.mark.parametrize("save", ["pipeline", "model", "checkpoint"])
def test_saved_with_an_adapter_it_loads_as_the_base(tmp_path, save):
    pipeline = quantized(flux())
    before = run(pipeline)
    pipeline.transformer.add_adapter(KINDS["lora"])
    if save == "checkpoint":
        lrqdit.save_checkpoint(pipeline.transformer, tmp_path)
        pipeline.transformer = lrqdit.load_checkpoint(flux().transformer, tmp_path)
    elif save == "model":
        pipeline.transformer.save_pretrained(tmp_path)
        pipeline.transformer = type(pipeline.transformer).from_pretrained(tmp_path)
    else:
        pipeline.save_pretrained(tmp_path)
        pipeline = diffusers.FluxPipeline.from_pretrained(tmp_path)
    assert torch.equal(run(pipeline), before)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_for_good(kind):
    pipeline = flux()
    lrqdit.quantize(pipeline, "w8a8", prompts=["a", "b"], steps=1, arguments=FLUX_CALL, show_progress=False)
    before = run(pipeline)
    pipeline.transformer.add_adapter(KINDS[kind])
    beside = run(pipeline)
    formats = {n: m.format for n, m in pipeline.transformer.named_modules() if isinstance(m, QuantLinear)}
    errors = lrqdit.fuse_lora(pipeline)
    assert errors and max(errors.values()) < 0.02
    fused = run(pipeline)
    assert relative(fused - before, beside - before) < 0.25
    found = {n: m.format for n, m in pipeline.transformer.named_modules() if isinstance(m, QuantLinear)}
    assert {n.replace(".base_layer", ""): f for n, f in formats.items()} == found  # and no wrapper is left
    with pytest.raises(ModelError, match="no active adapter; load one with load_lora_weights"):
        lrqdit.fuse_lora(pipeline)


def test_the_advice_for_merging_works(tmp_path):
    source = random_lora(tmp_path, flux(), ATTENTION)
    pipeline = quantized(flux())
    pipeline.load_lora_weights(source, adapter_name="a")
    beside = run(pipeline)
    with pytest.raises(ModelError, match=r"merge adapters for good with lrqdit\.fuse_lora"):
        pipeline.fuse_lora()
    errors = lrqdit.fuse_lora(pipeline, ["a"], lora_scale=1.0)
    assert all("attn.to_" in name for name in errors)
    assert relative(run(pipeline), beside) < 0.2
    pipeline.save_pretrained(tmp_path / "fused")
    assert torch.equal(run(diffusers.FluxPipeline.from_pretrained(tmp_path / "fused")), run(pipeline))


def test_fused_before_it_is_quantized(tmp_path):
    source = random_lora(tmp_path, flux(), ATTENTION)
    pipeline = flux()
    pipeline.load_lora_weights(source)
    with pytest.raises(ModelError, match=r"not fused; call pipe\.fuse_lora\(\)"):
        quantized(pipeline)
    pipeline.fuse_lora()
    exact = run(pipeline)
    assert relative(run(quantized(pipeline)), exact) < 0.2
    assert all("lora" not in name for name, _ in pipeline.transformer.named_modules())


@pytest.mark.parametrize("preset", ["w4a8", "w3a4"])
def test_training_with_checkpointing_changes_the_adapter_alone(preset):
    pipeline = quantized(flux(), preset)
    model, stored = pipeline.transformer, stored_tensors(pipeline.transformer.state_dict())
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=ATTENTION))
    model.enable_gradient_checkpointing()
    model.train().to(torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    noise = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 4, 32, generator=generator).bfloat16(),
        "pooled_projections": torch.randn(1, 32, generator=generator).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(), "guidance": torch.tensor([3.5]).bfloat16(),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(4, 3),
    }  # fmt: skip
    target, losses = torch.randn(1, 16, 16, generator=generator), []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(**noise).sample.float() - target).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = stored_tensors(model.state_dict())
    packed = [name for name in stored if name.endswith(".packed")]
    assert packed and all(torch.equal(after[name], stored[name]) for name in packed)


def test_a_state_dict_answers_for_packed_weights():
    model = quantized(flux()).transformer
    state = model.state_dict()
    name = "transformer_blocks.0.attn.to_q.weight"
    assert state[name].shape == (64, 64) and name not in state and name not in dict(state)
    for missing in ("transformer_blocks.0.attn.to_q.other", "nothing.weight", "proj_out.wight"):
        with pytest.raises(KeyError, match=missing):
            state[missing]
    assert type(copy.deepcopy(state)).__name__ == "OrderedDict"
    model.load_state_dict(copy.deepcopy(state))


def test_fusing_what_has_no_loader_of_diffusers(tmp_path):
    """Wrappers go away with their adapters, also in a text encoder and in a plain module."""
    pipeline = quantized(flux())
    for model in (pipeline.text_encoder, pipeline.text_encoder_2):
        targets = ["q_proj"] if model is pipeline.text_encoder else ["q"]
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
    pipeline.transformer.add_adapter(KINDS["lora"])
    beside = run(pipeline)
    lrqdit.fuse_lora(pipeline)
    parts = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer)
    assert not any("lora_" in name or "base_layer" in name for part in parts for name, _ in part.named_modules())
    fused = run(pipeline)
    assert relative(fused, beside) < 0.2
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(run(diffusers.FluxPipeline.from_pretrained(tmp_path)), fused)

    module, x = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), torch.randn(8, 64)
    lrqdit.quantize(module, "w8a8", is_calibrated=False, show_progress=False)
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    wrapped = peft.get_peft_model(module, config)
    beside = wrapped(x).detach()
    with pytest.raises(ModelError, match=r"PEFT's wrapper .* use model\.get_base_model\(\)"):
        lrqdit.fuse_lora(wrapped)
    inside = wrapped.get_base_model()
    lrqdit.fuse_lora(inside)
    assert relative(inside(x).detach(), beside) < 0.05


@pytest.mark.parametrize("kind", [peft.IA3Config, peft.FourierFTConfig])
def test_fusing_adapters_without_a_scale(kind):
    settings = {"feedforward_modules": []} if kind is peft.IA3Config else {"n_frequency": 10}
    pipeline = quantized(flux(), "w8a8")
    pipeline.transformer.add_adapter(kind(target_modules=["attn.to_q"], **settings))
    torch.manual_seed(0)
    for name, parameter in pipeline.transformer.named_parameters():
        if ".default" in name and parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    beside = run(pipeline)
    with pytest.raises(ModelError, match="has no scale for lora_scale=0.5; leave that out"):
        lrqdit.fuse_lora(pipeline, lora_scale=0.5)
    lrqdit.fuse_lora(pipeline)
    assert relative(run(pipeline), beside) < 0.01


def test_fusing_some_adapters_leaves_the_others(tmp_path):
    one, two = random_lora(tmp_path / "a", flux(), ATTENTION), random_lora(tmp_path / "b", flux(), ATTENTION, 2, 2)

    def load(active):
        pipeline = quantized(flux(), "w8a8")
        pipeline.load_lora_weights(one, adapter_name="a")
        pipeline.load_lora_weights(two, adapter_name="b")
        pipeline.set_adapters(active)
        return pipeline

    pipeline = load(["a", "b"])
    beside = run(pipeline)
    lrqdit.fuse_lora(pipeline, ["a"])
    assert pipeline.get_list_adapters() == {"transformer": ["b"]}
    assert relative(run(pipeline), beside) < 0.1
    only = load(["a"])
    lrqdit.fuse_lora(only, "b")  # not active, but named
    only.set_adapters(["a"])
    assert relative(run(only), beside) < 0.1
    half = load(["a", "b"])
    lrqdit.fuse_lora(half, ["a"], lora_scale=0.5)
    scales = {layer.scaling["b"] for layer in half.transformer.modules() if "b" in getattr(layer, "scaling", {})}
    assert scales == {1.0}


def test_fusing_that_fails_changes_nothing(tmp_path):
    pipeline = quantized(flux())
    pipeline.load_lora_weights(random_lora(tmp_path, flux(), [*ATTENTION, "x_embedder"]), adapter_name="a")
    beside = run(pipeline)
    with pytest.raises(ModelError, match="there is no adapter 'nope'; there is a"):
        lrqdit.fuse_lora(pipeline, ["nope"])
    with pytest.raises(NumericalError, match="not finite"):
        lrqdit.fuse_lora(pipeline, lora_scale=float("nan"))
    with pytest.raises(ModelError, match=r"lrqdit\.fuse_lora\(pipe\)"):
        pipeline.fuse_lora(lora_scale=0.5)
    assert torch.equal(run(pipeline), beside)
    last = [layer for layer in pipeline.transformer.modules() if "a" in getattr(layer, "lora_A", {})][-1]
    last.lora_A["a"].weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="an adapter at .* is not finite"):
        lrqdit.fuse_lora(pipeline)
    last.lora_A["a"].weight.data[0, 0] = 0.0
    pipeline.unload_lora_weights()
    assert torch.equal(run(pipeline), run(quantized(flux())))


def test_a_fused_text_encoder_is_quantized():
    pipeline = flux()
    peft.inject_adapter_in_model(KINDS_OF_ENCODER, pipeline.text_encoder_2)
    with pytest.raises(ModelError, match="not fused"):
        lrqdit.quantize(pipeline.text_encoder_2, "w8a16", is_calibrated=False, show_progress=False)
    for layer in pipeline.text_encoder_2.modules():
        if hasattr(layer, "merged_adapters"):
            layer.merge()
    exact = run(pipeline)
    lrqdit.quantize(pipeline.text_encoder_2, "w8a16", is_calibrated=False, show_progress=False)
    assert relative(run(pipeline), exact) < 0.05
    with pytest.raises(ModelError, match=r"quantize model\.merge_and_unload\(\)"):
        lrqdit.quantize(peft.get_peft_model(flux().transformer, KINDS["lora"]), "w8a8", is_calibrated=False)
