import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, PixArtTransformer2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from safetensors.torch import load_file, save_file
from tiny_transformers import build_model, run_model
from torch import nn

import lrqdit
from lrqdit.config import QuantizationConfig
from lrqdit.errors import CheckpointError, ConfigError, LrqditError, ModelError, NumericalError
from lrqdit.integrations.diffusers import LRQDiTConfig, LRQDiTQuantizer
from lrqdit.packed.checkpoint import stored_tensors
from lrqdit.packed.linear import QuantLinear

FAST = {"rotation": "hadamard", "smoothing": "never", "show_progress": False}
EIGHT = (
    "PixArtTransformer2DModel", "FluxTransformer2DModel", "LatteTransformer3DModel", "SD3Transformer2DModel",
    "SanaTransformer2DModel", "CogVideoXTransformer3DModel", "WanTransformer3DModel", "HunyuanVideoTransformer3DModel",
)  # fmt: skip
PIXART = "PixArtTransformer2DModel"


def load(folder, name=PIXART, **arguments):
    return getattr(diffusers, name).from_pretrained(folder, **arguments)


def quantized_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized PixArt: folder, the model in memory, its output."""
    model = build_model(PIXART)
    lrqdit.quantize(model, "w4a8", forward_loop=run_model, **FAST)
    folder = tmp_path_factory.mktemp("pixart")
    model.save_pretrained(folder)
    return folder, model, run_model(model)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An unquantized PixArt: folder and output."""
    model, folder = build_model(PIXART), tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    return folder, run_model(model)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def edit_config(folder, edit):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(("preset", "limit"), [("w4a8", 0.15), ("w3a4", 0.6)])
@pytest.mark.parametrize("name", EIGHT)
def test_every_architecture(name, preset, limit, tmp_path):
    model = build_model(name)
    y = run_model(model)
    lrqdit.quantize(model, preset, forward_loop=run_model, **FAST)
    quantized = run_model(model)
    assert 0 < (quantized - y).norm() < limit * y.norm()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, name)
    assert torch.equal(run_model(loaded), quantized)
    for key, layer in quantized_layers(model).items():
        other = loaded.get_submodule(key)
        assert other.format == layer.format and other.weight.dtype == layer.weight.dtype == torch.float32
        assert other.shared_input.readers == layer.shared_input.readers
    assert any(layer.shared_input.readers > 1 for layer in quantized_layers(loaded).values())


def test_config_file(saved):
    values = json.loads((saved[0] / "config.json").read_text())["quantization_config"]
    assert values["quant_method"] == 'lrqdit: run "import lrqdit" first' and values["format_version"] == 1
    assert QuantizationConfig.from_dict(values["settings"]).preset == "w4a8"
    assert set(values["layers"]) == set(quantized_layers(saved[1]))
    assert set(values) == {"quant_method", "format_version", "settings", "layers"}


def test_saving_a_loaded_model_gives_the_same_bytes(saved, tmp_path):
    load(saved[0]).save_pretrained(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (saved[0] / name).read_bytes()
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (saved[0], tmp_path))
    assert one["quantization_config"] == two["quantization_config"]


@pytest.fixture(scope="module")
def sharded(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    saved[1].save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_shards(saved, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(run_model(load(sharded)), saved[2])


def test_parallel_loading(saved, sharded, monkeypatch):
    monkeypatch.setattr(diffusers.models.modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    assert torch.equal(run_model(load(sharded)), saved[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_in_another_dtype(saved, dtype):
    model = load(saved[0], torch_dtype=dtype)
    assert model.dtype == dtype and model.proj_out.weight.dtype == dtype
    stored = load_file(saved[0] / "diffusion_pytorch_model.safetensors")
    for name, layer in quantized_layers(model).items():
        assert layer.weight.dtype == dtype
        assert all(torch.equal(v, stored[f"{name}.{k}"]) for k, v in stored_tensors(layer.state_dict()).items())
    y = run_model(model)
    assert y.dtype == dtype and (y.float() - saved[2]).norm() < 0.05 * saved[2].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_after_loading(saved, dtype):
    model = load(saved[0]).to(dtype)
    assert model.dtype == dtype and (run_model(model).float() - saved[2]).norm() < 0.05 * saved[2].norm()
    back = load(saved[0]).half().float()
    assert all(
        torch.equal(back.state_dict()[k], v) for k, v in saved[1].state_dict().items() if not v.is_floating_point()
    )


def test_half_of_the_model_that_was_quantized_in_place(saved):
    model = build_model(PIXART)
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    assert run_model(model.half()).dtype == torch.float16


def test_modules_kept_in_float32(tmp_path):
    """Wan keeps some parameters in float32 whatever dtype is asked for."""
    model = build_model("WanTransformer3DModel")
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, "WanTransformer3DModel", torch_dtype=torch.bfloat16)
    assert torch.equal(loaded.scale_shift_table, model.scale_shift_table)
    assert loaded.scale_shift_table.dtype == torch.float32
    assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments",
    [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}, {"disable_mmap": True}],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ways_to_load(saved, arguments):
    model = load(saved[0], **arguments)
    assert torch.equal(run_model(model), saved[2])
    assert not any(t.is_meta for t in [*model.buffers(), *model.parameters()])


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # it is a parameter
def test_device_map_of_several_parts(saved):
    parts = {name: "cpu" for name, _ in saved[1].named_children()} | {"scale_shift_table": "cpu"}
    assert torch.equal(run_model(load(saved[0], device_map=parts)), saved[2])


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
def test_offload_to_disk(saved, tmp_path):
    parts = {name: "cpu" for name, _ in saved[1].named_children()} | {"scale_shift_table": "cpu", "proj_out": "disk"}
    model = load(saved[0], device_map=parts, offload_folder=tmp_path)
    assert torch.equal(run_model(model), saved[2])


def test_group_offload(saved):
    model = load(saved[0])
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(run_model(model), saved[2])


def test_a_fresh_process_needs_our_import_only(saved, tmp_path):
    torch.save(saved[2], tmp_path / "expected.pt")
    code = (
        "import sys, torch, lrqdit\n"
        "from diffusers import PixArtTransformer2DModel\n"
        "from tiny_transformers import run_model\n"
        "torch.set_num_threads(1)\n"
        "model = PixArtTransformer2DModel.from_pretrained(sys.argv[1])\n"
        "assert torch.equal(run_model(model), torch.load(sys.argv[2]))\n"
    )
    paths = [str(Path(lrqdit.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(saved[0]), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_quantize_on_load(original, tmp_path):
    config = LRQDiTConfig("w4a8")
    model = load(original[0], quantization_config=config)
    y = run_model(model)
    assert 0 < (y - original[1]).norm() < 0.15 * original[1].norm()
    expected = build_model(PIXART)
    lrqdit.quantize(expected, "w4a8", is_calibrated=False, show_progress=False)
    assert quantized_layers(model).keys() == quantized_layers(expected).keys()
    assert all(type(p) is nn.Parameter and not p.is_meta for p in model.parameters())
    assert {k for k, v in model.state_dict().items() if v.dtype == torch.uint8}
    # a configuration may be used for several models
    assert config.layers == {} and torch.equal(run_model(load(original[0], quantization_config=config)), y)
    model.save_pretrained(tmp_path)
    assert torch.equal(run_model(load(tmp_path)), y)


def test_quantize_on_load_equals_quantize_without_data(original):
    loaded = load(original[0], quantization_config=LRQDiTConfig("w4a8"))
    expected = build_model(PIXART)
    lrqdit.quantize(expected, "w4a8", is_calibrated=False, show_progress=False)
    one, two = loaded.state_dict(), expected.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_quantize_shards_on_load(original, tmp_path):
    build_model(PIXART).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    one = load(tmp_path, quantization_config=LRQDiTConfig("w4a8"))
    two = load(original[0], quantization_config=LRQDiTConfig("w4a8"))
    assert torch.equal(run_model(one), run_model(two))


def test_quantize_on_load_from_the_original_dtype(original):
    """The weights are read before diffusers rounds them to the dtype of the model."""
    one = load(original[0], quantization_config=LRQDiTConfig("w4a8"), torch_dtype=torch.bfloat16)
    two = load(original[0], quantization_config=LRQDiTConfig("w4a8"))
    layer = one.transformer_blocks[0].attn1.to_q
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.packed, two.transformer_blocks[0].attn1.to_q.packed)
    assert run_model(one).dtype == torch.bfloat16


def test_quantize_on_load_with_settings(original):
    config = LRQDiTConfig("w3a4", seed=3, keep_bits=16, exclude=[r"attn2"], table_scope="row")
    model = load(original[0], quantization_config=config)
    layers = quantized_layers(model)
    assert layers and not any("attn2" in name for name in layers) and type(model.proj_out) is nn.Linear
    assert all(layer.format.table_rows == layer.out_features for layer in layers.values())


def test_quantize_a_pipeline_on_load(tiny_pipeline_folder, tmp_path):
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": LRQDiTConfig("w4a8")})
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipeline_folder, quantization_config=mapping)
    assert quantized_layers(pipeline.transformer) and not quantized_layers(pipeline.vae)
    call = {"prompt": "a fox", "num_inference_steps": 2, "use_resolution_binning": False, "clean_caption": False}
    pipeline.set_progress_bar_config(disable=True)
    one = pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="np").images
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    two = again(**call, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert (one == two).all()


def test_a_quantized_pipeline(tmp_path):
    pipeline = build_tiny_pipeline()
    lrqdit.quantize(pipeline, "w4a8", prompts=["a fox"], steps=2, **FAST)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    one, two = pipeline.transformer.state_dict(), again.transformer.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_quantized_already(saved):
    with pytest.raises(ModelError, match="is quantized already"):
        lrqdit.quantize(load(saved[0]), "w4a8", is_calibrated=False)
    with pytest.warns(UserWarning, match="quantization_config. from the model will be used"):
        model = load(saved[0], quantization_config=LRQDiTConfig("w3a4"))
    assert model.config.quantization_config.quantization.preset == "w4a8"


def test_dequantize(saved, tmp_path):
    model = load(saved[0])
    weight = model.transformer_blocks[0].attn1.to_q.dequantize()
    model.dequantize()
    assert not quantized_layers(model) and not hasattr(model, "hf_quantizer")
    assert torch.equal(model.transformer_blocks[0].attn1.to_q.weight, weight)
    assert (run_model(model) - saved[2]).norm() < 0.03 * saved[2].norm()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(run_model(load(tmp_path)), run_model(model))
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)  # and once more


def test_lora(tmp_path):
    """On FLUX: diffusers' PixArt takes no adapters."""
    name = "FluxTransformer2DModel"
    base = build_model(name)
    lrqdit.quantize(base, "w4a8", is_calibrated=False, show_progress=False)
    base.save_pretrained(tmp_path)
    expected, model = run_model(base), load(tmp_path, name)
    model.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_v"], r=2, lora_alpha=2, init_lora_weights=False))
    y = run_model(model)
    assert not torch.equal(y, expected)
    model.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    other = load(tmp_path, name)
    other.load_lora_adapter(tmp_path / "lora.safetensors", prefix=None)
    assert torch.equal(run_model(other), y)
    other.disable_lora()
    assert torch.equal(run_model(other), expected)
    other.enable_lora()
    with pytest.raises(ModelError, match="lrqdit.fuse_lora"):
        other.fuse_lora()
    other.unload_lora()
    assert torch.equal(run_model(other), expected)


def shards_of(folder):
    return sorted(folder.glob("*.safetensors"))


def test_truncated_shard(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    path = shards_of(folder)[1]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=f"{path.name}.*its header describes"):
        load(folder)


def test_shard_with_another_dtype(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    path = next(p for p in shards_of(folder) if any(k.endswith("row_scale_bits") for k in load_file(p)))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(b'"I32"', b'"F32"')
    path.write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises(CheckpointError, match="is stored as F32, not as torch.int32"):
        load(folder)


def test_missing_tensor(copy):
    path = copy / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if k.endswith("table"))
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors, the first is {name}"):
        load(copy)


def test_tensor_missing_from_a_shard(sharded, tmp_path):
    """The index lists it, the shard lacks it."""
    folder = shutil.copytree(sharded, tmp_path / "copy")
    path = shards_of(folder)[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors, the first is {name}"):
        load(folder)


def test_missing_weight_on_load(tmp_path):
    model = build_model(PIXART)
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["transformer_blocks.0.attn1.to_q.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weight of transformer_blocks\.0\.attn1\.to_q"):
        load(tmp_path, quantization_config=LRQDiTConfig("w4a8"))


def test_bad_weight_on_load(tmp_path):
    model = build_model(PIXART)
    model.transformer_blocks[1].ff.net[2].weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericalError, match=r"transformer_blocks\.1\.ff\.net\.2\.weight contains NaN"):
        load(tmp_path, quantization_config=LRQDiTConfig("w4a8"))


CONFIG_DAMAGE = {
    "unknown key": (lambda q: q.update(colour="red"), "unknown keys: colour"),
    "unknown setting": (lambda q: q["settings"].update(colour="red"), "unknown setting.* colour"),
    "newer version": (lambda q: q.update(format_version=2), "upgrade lrqdit"),
    "no layers": (lambda q: q.update(layers={}), "lists no layers"),
    "layers of another kind": (lambda q: q.update(layers=[1]), "layers"),
    "layer of another model": (
        lambda q: q["layers"].update(nobody=next(iter(q["layers"].values()))),
        "nobody .* belongs to another model",
    ),
    "other shape": (lambda q: next(iter(q["layers"].values())).update(in_features=5), "layer format|another model"),
    "settings of another kind": (lambda q: q.update(settings=[1]), "settings"),
}


@pytest.mark.parametrize("kind", CONFIG_DAMAGE)
def test_damaged_config(copy, kind):
    damage, message = CONFIG_DAMAGE[kind]
    edit_config(copy, lambda values: damage(values["quantization_config"]))
    with pytest.raises(LrqditError, match=message):
        load(copy)


def test_config_objects():
    with pytest.raises(ConfigError, match="pass a preset such as 'w4a8'"):
        LRQDiTConfig()
    with pytest.raises(ConfigError, match="unknown setting.* colour"):
        LRQDiTConfig("w4a8", colour="red")
    with pytest.raises(ConfigError, match="quant_method='gguf'"):
        LRQDiTConfig("w4a8", quant_method="gguf")
    config = LRQDiTConfig("w3a6", mode="paper")
    assert config.quantization == QuantizationConfig.from_name("w3a6", "paper")
    again = LRQDiTConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict() == config.to_diff_dict()
    assert config.quant_method == "lrqdit" and "lrqdit" in repr(config)


def test_registration():
    assert AUTO_QUANTIZER_MAPPING["lrqdit"] is LRQDiTQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lrqdit"] is LRQDiTConfig
    quantizer = LRQDiTQuantizer(LRQDiTConfig("w4a8"), pre_quantized=False)
    assert quantizer.is_serializable and quantizer.is_trainable and quantizer.is_compileable
    assert quantizer.get_cuda_warm_up_factor() == 4


def test_compile(saved):
    model = load(saved[0])
    compiled = torch.compile(model.transformer_blocks[0].ff, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(compiled(x), model.transformer_blocks[0].ff(x))


def test_pixart_is_what_is_loaded(saved):
    assert isinstance(load(saved[0]), PixArtTransformer2DModel)
