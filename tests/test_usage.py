"""What else people do to a pipeline before and after it is quantized."""

import copy
import logging

import diffusers
import peft
import pytest
import torch
import transformers
from tiny_pipelines import FLUX_CALL, WAN_CALL, flux, flux_transformer, wan, wan_transformer
from torch import nn

import lrqdit
from lrqdit import models
from lrqdit.errors import CheckpointError, ConfigError, ModelError, NumericalError
from lrqdit.packed.linear import QuantLinear


def run(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    call = WAN_CALL if "Wan" in type(pipeline).__name__ else FLUX_CALL
    call = {"output_type": "latent", "num_inference_steps": 2, **call, **arguments}
    output = pipeline("a fox", generator=torch.Generator().manual_seed(0), **call)
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


def quantized(pipeline, preset="w4a8", **settings):
    call = WAN_CALL if "Wan" in type(pipeline).__name__ else FLUX_CALL
    lrqdit.quantize(
        pipeline, preset, prompts=["a", "b"], steps=2, arguments=call, show_progress=False, **settings
    )  # fmt: skip
    return pipeline


def relative(a, b):
    return float((a - b).norm() / b.norm())


def bits(module):
    return {n: m.format.weight_bits for n, m in module.named_modules() if isinstance(m, QuantLinear)}


# compilation


@pytest.mark.parametrize("how", ["wrapped", "in place", "repeated blocks"])
def test_compiled_before(tmp_path, how):
    plain, pipeline = quantized(flux()), flux()
    if how == "wrapped":
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    elif how == "in place":
        pipeline.transformer.compile(backend="eager")
    else:
        pipeline.transformer.compile_repeated_blocks(backend="eager")
    run(pipeline)
    quantized(pipeline)
    assert torch.equal(run(pipeline), run(plain))
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(run(diffusers.FluxPipeline.from_pretrained(tmp_path)), run(plain))


@pytest.mark.parametrize("preset", ["w4a8", "w4a4", "w4a16"])
def test_blocks_of_many_formats_share_a_graph(preset):
    import torch._dynamo as dynamo

    pipeline = quantized(flux(transformer=flux_transformer(1, 12)), preset)
    formats = [str([m.format for m in b.modules() if isinstance(m, QuantLinear)]) for b in
               pipeline.transformer.single_transformer_blocks]  # fmt: skip
    assert len({text.replace("single_transformer_blocks", "") for text in formats}) > 4
    before, graphs = run(pipeline), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    dynamo.reset()
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    with torch.no_grad():
        assert relative(run(pipeline), before) < 1e-3
        assert len(graphs) <= 3
        run(pipeline, height=48)
    assert len(graphs) <= 6


def test_a_copy_of_a_compiled_layer_is_itself():
    """Compiled graphs find a layer by a handle; a copy must not find the original."""
    layer = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48))
    lrqdit.quantize(layer, "w4a8", is_calibrated=False, show_progress=False)
    other, x = copy.deepcopy(layer), torch.randn(8, 64)
    before = layer(x)
    other[1].packed.random_(0, 255)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), before)
        assert not torch.equal(torch.compile(other, backend="eager", fullgraph=True)(x), before)
        assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(x), other(x))
    del layer
    assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(x), other(x))


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_wrapped_for_several_devices(wrap):
    model = flux().transformer
    lrqdit.quantize(wrap(model), "w4a8", is_calibrated=False, show_progress=False)
    assert bits(model)


def test_data_parallel_training(tmp_path):
    """One process; what a backend broadcasts at the start is the same with several."""
    pipeline = quantized(flux(), "w4a4")
    pipeline.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(pipeline.transformer)
        assert bits(parallel)
        pipeline.transformer = parallel.module
        run(pipeline)
    finally:
        torch.distributed.destroy_process_group()


# fused projections


def test_fused_projections_before(tmp_path, caplog):
    pipeline, plain = flux(), quantized(flux())
    pipeline.transformer.fuse_qkv_projections()
    exact = run(pipeline)
    with caplog.at_level(logging.INFO, "lrqdit"):
        quantized(pipeline)
    assert "fuse_qkv_projections is undone" in caplog.text
    assert torch.equal(run(pipeline), run(plain)) and relative(run(pipeline), exact) < 0.3
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(run(diffusers.FluxPipeline.from_pretrained(tmp_path)), run(plain))


def test_fused_projections_after():
    pipeline = quantized(flux())
    before = run(pipeline)
    with pytest.raises(ModelError, match="not fused.*leave them apart"):
        pipeline.transformer.fuse_qkv_projections()
    assert torch.equal(run(pipeline), before)


def test_a_stance_towards_compilation_is_the_users_again():
    """Calibration sets one of its own meanwhile."""
    with torch.compiler.set_stance("force_eager"):
        quantized(flux())
        graphs = []
        torch.compile(nn.Linear(4, 4), backend=lambda graph, _: graphs.append(graph) or graph)(torch.ones(1, 4))
        assert not graphs


# several transformers


def two_experts():
    torch.manual_seed(3)
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.9)


def test_components_have_presets_of_their_own(tmp_path):
    pipeline = quantized(two_experts(), sensitivity="none", components={"transformer_2": "w3a8"})
    assert 4 in bits(pipeline.transformer).values() and 3 not in bits(pipeline.transformer).values()
    assert 3 in bits(pipeline.transformer_2).values() and 4 not in bits(pipeline.transformer_2).values()
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(run(diffusers.WanPipeline.from_pretrained(tmp_path)), run(pipeline))
    alone = quantized(two_experts(), components={"transformer": None})
    assert not bits(alone.transformer) and bits(alone.transformer_2)
    with pytest.raises(ConfigError, match="no transformer_3 to quantize; there is transformer, transformer_2"):
        quantized(two_experts(), components={"transformer_3": None})
    with pytest.raises(ConfigError, match="nothing is left"):
        quantized(flux(), components={"transformer": None})


def test_a_pattern_may_match_in_one_of_them():
    pipeline = two_experts()
    pipeline.transformer_2 = wan_transformer()
    pipeline.transformer_2.blocks.append(copy.deepcopy(pipeline.transformer_2.blocks[0]))
    lrqdit.quantize(pipeline, "w4a8", is_calibrated=False, show_progress=False, exclude=[r"blocks\.2\."])
    assert bits(pipeline.transformer).keys() == bits(pipeline.transformer_2).keys()
    with pytest.raises(ModelError, match="exclude='nothing' matches no linear layer"):
        lrqdit.quantize(two_experts(), "w4a8", is_calibrated=False, exclude=["nothing"])


def test_denoisers_are_found_by_their_class():
    index = {
        "_class_name": "P", "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AE"],
        "unconditional_transformer": ["diffusers", "Ideogram4Transformer2DModel"], "scheduler": ["diffusers", "Euler"],
        "controlnet": ["diffusers", "HunyuanDiT2DControlNetModel"], "prior": ["diffusers", "PriorTransformer"],
        "image_encoder": ["transformers", "SiglipVisionTransformer"], "transformer_2": [None, None],
        "transformer_ref": ["my_package", "Mine"], "dit": ["diffusers", "DiTTransformer2DModel"],
    }  # fmt: skip
    found = ["transformer", "unconditional_transformer", "prior", "transformer_ref", "dit"]
    assert models.denoiser_names(index) == found


# text encoders


@pytest.fixture
def with_encoders(tmp_path):
    pipeline = quantized(flux())
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, name)
        lrqdit.quantize(encoder, "w8a16", forward_loop=lambda _: run(pipeline), show_progress=False)
        assert bits(encoder)
    return pipeline


def test_text_encoders_in_the_pipelines_folder(with_encoders, tmp_path, caplog):
    with_encoders.save_pretrained(tmp_path)
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(with_encoders))
    assert "MISSING" not in caplog.text
    for name in ("text_encoder", "text_encoder_2"):
        assert bits(getattr(loaded, name)) == bits(getattr(with_encoders, name))
    loaded.text_encoder_2.save_pretrained(tmp_path / "again")
    half = transformers.T5EncoderModel.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    layers = [m for m in half.modules() if isinstance(m, QuantLinear)]
    assert {m.weight.dtype for m in layers} == {torch.bfloat16} == {next(m.parameters()).dtype for m in layers}


def test_text_encoders_are_offloaded_as_the_error_advises(with_encoders, tmp_path):
    expected = run(with_encoders)
    with_encoders.text_encoder_2.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded onto the disk; .* enable_sequential_cpu_offload or"):
        transformers.T5EncoderModel.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "o")
    with_encoders.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(run(with_encoders), expected)
    with_encoders.remove_all_hooks()
    cpu = torch.device("cpu")
    with_encoders.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(run(with_encoders), expected)


def test_a_text_encoder_with_a_lost_tensor_is_refused(with_encoders, tmp_path):
    from safetensors.torch import load_file, save_file

    with_encoders.text_encoder_2.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.block.0.layer.0.SelfAttention.q.packed"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 of its packed tensors"):
        transformers.T5EncoderModel.from_pretrained(tmp_path)


def test_text_encoders_quantized_while_they_load(tmp_path):
    plain = flux()
    plain.save_pretrained(tmp_path)
    presets = {"transformer": "w4a8", "text_encoder": "w8a16", "text_encoder_2": "w8a8"}
    config = diffusers.PipelineQuantizationConfig(
        quant_mapping={name: lrqdit.LRQDiTConfig(preset) for name, preset in presets.items()}
    )
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path, quantization_config=config)
    for name, preset in presets.items():
        lrqdit.quantize(getattr(plain, name), preset, is_calibrated=False, show_progress=False)
    assert torch.equal(run(loaded), run(plain))
    assert all(bits(getattr(loaded, name)) == bits(getattr(plain, name)) for name in presets)
    loaded.save_pretrained(tmp_path / "out")
    assert torch.equal(run(diffusers.FluxPipeline.from_pretrained(tmp_path / "out")), run(plain))


SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Gemma2Model", {"head_dim": 16}),
        ("Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": False}),
        ("Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
        ("LlamaModel", {}),
        ("Qwen2_5_VLForConditionalGeneration", None),
    ],
)
def test_encoders_of_newer_pipelines(tmp_path, kind, config):
    build = getattr(transformers, kind)
    if config is None:  # its names in a file are others than in the model
        vision = {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        }  # fmt: skip
        text = {**SMALL, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "bos_token_id": 1}
        filled = build.config_class(text_config={**text, "eos_token_id": 2}, vision_config=vision)
    else:
        filled = build.config_class(**SMALL, **config)
    torch.manual_seed(0)
    model = build(filled).eval()
    model.save_pretrained(tmp_path / "plain")

    def outputs(module):
        with torch.no_grad():
            return module(input_ids=torch.arange(3, 15)[None], output_hidden_states=True).hidden_states[-1]

    exact = outputs(model)
    lrqdit.quantize(model, "w8a16", forward_loop=outputs, show_progress=False)
    assert relative(outputs(model), exact) < 0.05
    assert ("lm_head" in bits(model)) == (config == {"head_dim": 16, "tie_word_embeddings": False} or config is None)
    model.save_pretrained(tmp_path / "small")
    loaded, report = build.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert torch.equal(outputs(loaded), outputs(model)) and not any(report.values())
    while_loading = build.from_pretrained(tmp_path / "plain", quantization_config=lrqdit.LRQDiTConfig("w8a16"))
    assert bits(while_loading) == bits(model) and relative(outputs(while_loading), exact) < 0.05


def test_one_backend_for_transformer_and_text_encoder(tmp_path):
    flux().save_pretrained(tmp_path)
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="lrqdit",
        quant_kwargs={"preset": "w8a16"},
        components_to_quantize=["transformer", "text_encoder_2"],
    )
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert bits(loaded.transformer) and bits(loaded.text_encoder_2) and not bits(loaded.text_encoder)


# long directions


@pytest.mark.parametrize("length", [1e3, 1e5, 1e7])
def test_inputs_long_in_one_direction(length):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 32))
    direction = nn.functional.normalize(torch.randn(256, generator=generator), dim=0)
    x = length * torch.randn(512, 1, generator=generator) * direction + torch.randn(512, 256, generator=generator)
    exact = layer(x)
    lrqdit.quantize(layer, "w4a4", forward_loop=lambda module: module(x), show_progress=False)
    with torch.no_grad():
        assert relative(layer(x), exact) < 0.1


def test_coordinates_beyond_float16():
    """The long part of the input exceeds float16 though neither the input nor the output does."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(1024, 64))
    layer[0].weight.data.mul_(0.003)
    direction = nn.functional.normalize(torch.randn(1024, generator=generator), dim=0)
    x = 2e5 * torch.randn(256, 1, generator=generator).sign() * direction + torch.randn(256, 1024, generator=generator)
    assert x.abs().max() < 60000
    exact = layer(x)
    lrqdit.quantize(layer, "w4a4", forward_loop=lambda module: module(x), show_progress=False)
    assert layer[0].format.input.principal_rank
    with torch.no_grad():
        assert relative(layer(x.half()).float(), exact) < 0.1
        with torch.autocast("cpu", torch.float16):
            assert relative(layer(x).float(), exact) < 0.1


def test_a_moment_that_is_not_finite_is_an_error_of_ours():
    from lrqdit.fitting.compensate import factorize

    with pytest.raises(NumericalError, match="not finite; run the model in float32 or bfloat16"):
        factorize(torch.full((4, 4), torch.nan, dtype=torch.float64))


def test_selected_layers_without_weights():
    with torch.device("meta"):
        selection = models.select_layers(diffusers.FluxTransformer2DModel())
    assert "transformer_blocks.0.attn.to_q" in selection.quantized
    assert "transformer_blocks.0.norm1.linear" in selection.weight_only
    assert "x_embedder" in selection.kept


# beside it


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers about itself
def test_a_controlnet_from_a_quantized_transformer():
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4}
    model = quantized(flux()).transformer
    dense = copy.deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, QuantLinear):
            dense.set_submodule(name, layer.to_linear())
    found = diffusers.FluxControlNetModel.from_transformer(model, **sizes).state_dict()
    state = dense.state_dict()
    copied = [name for name in found if name in state]
    assert "transformer_blocks.0.attn.to_q.weight" in copied and "single_transformer_blocks.0.proj_out.bias" in copied
    assert all(torch.equal(found[name], state[name]) for name in copied if "controlnet" not in name)
    plain = flux().transformer
    same = diffusers.FluxControlNetModel.from_transformer(plain, **sizes).state_dict()
    assert torch.equal(same["x_embedder.weight"], plain.x_embedder.weight)


def test_a_text_is_no_list_of_prompts():
    for prompts in ("a red fox", {"prompt": "a red fox"}, 3):
        with pytest.raises(ConfigError, match="is not a list; pass several"):
            lrqdit.quantize(flux(), "w4a8", prompts=prompts)


def test_a_calibration_of_something_else():
    pipeline = flux()
    seen = lrqdit.observe(pipeline, prompts=["a"], steps=1, arguments=FLUX_CALL, show_progress=False)
    with pytest.raises(ConfigError, match="calibration has transformer, but no FluxTransformer2DModel"):
        lrqdit.quantize(pipeline.transformer, "w4a8", calibration=seen)
    with pytest.raises(ConfigError, match="another model; pass what lrqdit.observe returned"):
        other = flux_transformer(in_channels=32, out_channels=32)
        other.transformer_blocks[0].attn.to_q = nn.Linear(32, 64)
        lrqdit.quantize(other, "w4a8", calibration={"FluxTransformer2DModel": seen["transformer"]})
    for wrong in ({"x": 1}, "folder", {}):
        with pytest.raises(ConfigError, match="pass what lrqdit.observe returned"):
            lrqdit.quantize(flux(), "w4a8", calibration=wrong)


def test_inference_mode_changes_nothing():
    plain, inside = quantized(flux()), flux()
    with torch.inference_mode():
        quantized(inside)
    assert torch.equal(run(inside), run(plain))


def test_the_card_is_of_what_was_saved_last(tmp_path):
    pipeline, other = flux(), flux()
    for target, preset in ((pipeline, "w4a8"), (other, "w8a8")):
        lrqdit.quantize(target, preset, is_calibrated=False, show_progress=False)
    pipeline.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "w8a8" in card.read_text() and "w4a8" not in card.read_text()
    card.write_text(card.read_text() + "\nMy own words.\n")
    pipeline.save_pretrained(tmp_path)
    assert "My own words" in card.read_text()
