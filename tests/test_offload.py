"""Low memory: every way in which accelerate and diffusers move weights leaves the pictures as they are, and takes the
packed weights along."""

import accelerate
import diffusers
import pytest
import torch
from tiny_pipelines import FLUX_CALL, flux
from torch import nn

import lrqdit
from lrqdit.errors import ConfigError, ModelError
from lrqdit.packed.linear import MARKER, QuantLinear

CPU = torch.device("cpu")
DEVICES = {
    name: "cpu" for name in ("single_transformer_blocks", "norm_out", "proj_out", "x_embedder", "context_embedder")
} | {"time_text_embed": "cpu", "pos_embed": "cpu"}  # fmt: skip


def run(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        output = pipeline("a fox", generator=generator, output_type="latent", num_inference_steps=2, **FLUX_CALL)
    return torch.as_tensor(output.images)


def bytes_left(model):
    """Of a model's packed weights, what is not on the meta device."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    return sum(t.nbytes for layer in layers for n, t in layer._parameters.items() if n != MARKER and not t.is_meta)


@pytest.fixture(scope="module", params=["w4a8", "w4a4", "w4a16"])
def saved(request, tmp_path_factory):
    pipeline = flux()
    lrqdit.quantize(pipeline, request.param, prompts=["a", "b"], steps=1, arguments=FLUX_CALL, show_progress=False)
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return folder, run(pipeline)


@pytest.fixture
def pipeline(saved):
    return diffusers.FluxPipeline.from_pretrained(saved[0])


def check(pipeline, saved):
    assert torch.equal(run(pipeline), saved[1]) and torch.equal(run(pipeline), saved[1])


def test_sequential(pipeline, saved):
    pipeline.enable_sequential_cpu_offload(device="cpu")
    check(pipeline, saved)
    assert bytes_left(pipeline.transformer) == 0
    with pytest.raises(ModelError, match=r"while it is offloaded; remove .*remove_all_hooks"):
        pipeline.transformer.transformer_blocks[0].attn.to_q.weight.float()
    pipeline.remove_all_hooks()
    check(pipeline, saved)
    assert bytes_left(pipeline.transformer) > 0


@pytest.mark.parametrize("has_buffers", [False, True])
def test_accelerate_to_the_cpu_and_to_disk(pipeline, saved, tmp_path, has_buffers):
    accelerate.cpu_offload(pipeline.transformer, "cpu", offload_buffers=has_buffers)
    check(pipeline, saved)
    assert bytes_left(pipeline.transformer) == 0
    other = diffusers.FluxPipeline.from_pretrained(saved[0])
    accelerate.disk_offload(other.transformer, tmp_path, "cpu", offload_buffers=has_buffers)
    check(other, saved)
    assert bytes_left(other.transformer) == 0


def test_dispatched_in_part_to_disk(pipeline, saved, tmp_path):
    devices = {"transformer_blocks": "disk", **DEVICES}
    accelerate.dispatch_model(pipeline.transformer, devices, main_device="cpu", offload_dir=tmp_path)
    check(pipeline, saved)
    assert bytes_left(pipeline.transformer.transformer_blocks) == 0


@pytest.mark.parametrize("through_files", [None, False])
def test_loaded_in_part_to_disk(pipeline, saved, tmp_path, through_files):
    pipeline.transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        saved[0] / "transformer", device_map={"transformer_blocks": "disk", **DEVICES}, offload_folder=tmp_path,
        offload_state_dict=through_files,
    )  # fmt: skip
    check(pipeline, saved)
    assert bytes_left(pipeline.transformer.transformer_blocks) == 0
    assert bytes_left(pipeline.transformer.single_transformer_blocks) > 0


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("is_on_disk", [False, True])
def test_groups(pipeline, saved, tmp_path, level, is_on_disk):
    pipeline.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type=level, num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path) if is_on_disk else None,
    )  # fmt: skip
    check(pipeline, saved)


def test_a_stream_moves_packed_weights(saved, monkeypatch):
    """diffusers restores parameters alone when a group leaves the device; there is no second device here, so what is
    restored is looked at: the copies that it keeps on the CPU."""
    from diffusers.hooks.group_offloading import ModuleGroup

    layer = diffusers.FluxPipeline.from_pretrained(saved[0]).transformer.transformer_blocks[0].attn.to_k
    group = ModuleGroup([layer], CPU, CPU, layer)
    group.stream = object()
    group.low_cpu_mem_usage = True
    group.record_stream = True
    group.cpu_param_dict = group._init_cpu_param_dict()
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    for name, parameter in layer._parameters.items():
        if name != MARKER:
            parameter.data = torch.zeros_like(parameter)  # as if on another device
    group._offload_to_memory()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.tensors().items())


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_leaves_packed_weights(pipeline, storage):
    layers = {n: m for n, m in pipeline.transformer.named_modules() if isinstance(m, QuantLinear)}
    before = {name: layer.packed.clone() for name, layer in layers.items()}
    pipeline.transformer.enable_layerwise_casting(storage, torch.float32)
    assert run(pipeline).isfinite().all()
    assert all(torch.equal(layer.packed, before[name]) for name, layer in layers.items())


def test_the_first_parameter_answers_a_float_dtype():
    """As Wan, AuraFlow and others ask."""
    for dtype in (torch.float32, torch.bfloat16):
        model = flux().transformer.to(dtype)
        lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
        assert all(next(m.parameters()).dtype == dtype for m in model.modules() if isinstance(m, QuantLinear))
        assert next(model.parameters()).dtype == model.dtype == dtype
        assert not any(p.requires_grad for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters())
        assert all(next(m.parameters()).dtype == torch.half for m in model.half().modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    ("prepare", "advice"),
    [
        (lambda p: p.enable_sequential_cpu_offload(device="cpu"), r"call pipe\.remove_all_hooks\(\)"),
        (lambda p: accelerate.cpu_offload(p.transformer, "cpu"), "remove_hook_from_module"),
        (
            lambda p: p.transformer.enable_group_offload(CPU, CPU, num_blocks_per_group=1),
            "load it again without enable_group_offload",
        ),
        (
            lambda p: p.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
            "load it again without",
        ),
        (lambda p: p.transformer.to("meta"), "load the model's weights first"),
    ],
)
def test_an_offloaded_model_is_refused_in_words(prepare, advice):
    pipeline = flux()
    prepare(pipeline)
    with pytest.raises(ModelError, match=advice):
        lrqdit.quantize(pipeline, "w4a8", is_calibrated=False, show_progress=False)


def test_the_advice_for_an_offloaded_model_works():
    pipeline, plain = flux(), flux()
    pipeline.enable_sequential_cpu_offload(device="cpu")
    pipeline.remove_all_hooks()
    for either in (pipeline, plain):
        lrqdit.quantize(either, "w4a8", is_calibrated=False, show_progress=False)
    pipeline.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(run(pipeline), run(plain))


def test_what_diffusers_would_not_load_is_an_error_in_words(saved, tmp_path):
    load = diffusers.FluxTransformer2DModel.from_pretrained
    with pytest.raises(ConfigError, match="offload_state_dict=True without .* leave it out"):
        load(saved[0] / "transformer", offload_state_dict=True)
    flux().transformer.save_pretrained(tmp_path / "plain")
    config, devices = lrqdit.LRQDiTConfig("w4a8"), {"transformer_blocks": "disk", **DEVICES}
    with pytest.raises(ConfigError, match="while a part of it is loaded to the disk; .* save it, and load"):
        load(tmp_path / "plain", quantization_config=config, device_map=devices, offload_folder=tmp_path / "offload")
    load(tmp_path / "plain", quantization_config=config).save_pretrained(tmp_path / "small")
    load(tmp_path / "small", device_map=devices, offload_folder=tmp_path / "offload")
