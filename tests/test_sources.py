"""What `lrqdit quantize` starts from: dtypes and variants of files, single files, float8 with scales, GGUF."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_cli import fail, succeed

import lrqdit
from lrqdit.errors import CheckpointError, ModelError
from lrqdit.integrations import pipelines, sources
from lrqdit.integrations.float8 import from_float8

FAST = ["--no-calibration", "--device", "cpu", "--json"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    """A FLUX folder in bfloat16."""
    folder = tmp_path_factory.mktemp("flux") / "pipeline"
    tiny.flux().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A Wan folder in bfloat16."""
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    tiny.wan().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(wan) -> dict[str, torch.Tensor]:
    """The transformer's weights under the names of Wan's own code, as ComfyUI's files have them."""
    names = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1", "attn1": "self_attn", "attn2": "cross_attn",
        "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v", "norm2": "norm3", "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2", "proj_out": "head.head", "scale_shift_table": "modulation",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors(wan / "transformer").items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found["head.modulation" if name == "modulation" else name] = tensor
    return found


def quantize(*arguments: object) -> dict:
    return json.loads(succeed("quantize", *arguments, *FAST))


def picture(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = tiny.FLUX_CALL if isinstance(pipeline, FluxPipeline) else tiny.WAN_CALL
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a fox", generator=generator, num_inference_steps=2, output_type="latent", return_dict=False, **call
    )[0]


def load(folder: Path, dtype: torch.dtype = torch.bfloat16):
    return pipelines.load_pipeline(folder, dtype, "cpu")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same(folder: Path, other: Path) -> None:
    one, two = tensors(folder), tensors(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_pipeline_runs_in_the_dtype_of_its_files(dtype, tmp_path):
    tiny.flux().to(dtype).save_pretrained(tmp_path / "model")
    pipeline = pipelines.load_pipeline(tmp_path / "model", device="cpu")
    expected = torch.float32 if dtype == torch.float16 else dtype
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {part.dtype for part in parts} == {expected} and picture(pipeline).isfinite().all()
    quantize(tmp_path / "model", "--out", tmp_path / "out")
    assert {t.dtype for t in tensors(tmp_path / "out" / "transformer").values() if t.is_floating_point()} == {dtype}
    loaded = pipelines.load_pipeline(tmp_path / "out", device="cpu")
    assert loaded.transformer.dtype == loaded.vae.dtype == expected and picture(loaded).isfinite().all()


@pytest.mark.parametrize(
    "stored, device, expected",
    [
        ("float8_e4m3fn", "cpu", "bfloat16"), ("float8_e5m2", "cuda", "bfloat16"), ("float16", "cuda", "float16"),
        ("float32", "cuda", "bfloat16"), ("bfloat16", "mps", "bfloat16"), ("float32", "cpu", "float32"),
    ],
)  # fmt: skip
def test_the_default_dtype(stored, device, expected):
    found = {"text_encoder": torch.float32, "transformer": getattr(torch, stored)}
    assert pipelines.default_dtype(found, torch.device(device)) == getattr(torch, expected)


def test_a_float8_pipeline(flux, tmp_path):
    pipeline = load(flux)
    pipeline.transformer.to(torch.float8_e4m3fn)
    pipeline.save_pretrained(tmp_path / "model")
    summary = quantize(tmp_path / "model", "--out", tmp_path / "out")
    assert 4 < summary["true_bits"] < 8
    stored = {t.dtype for t in tensors(tmp_path / "out" / "transformer").values() if t.is_floating_point()}
    assert stored == {torch.bfloat16}
    # the float8 weights themselves were quantized
    pipeline.transformer.to(torch.bfloat16)
    lrqdit.quantize(pipeline, "w4a8", is_calibrated=False, show_progress=False)
    loaded = load(tmp_path / "out")
    assert torch.equal(picture(loaded), picture(pipeline))


@pytest.mark.parametrize("is_named", [True, False])
def test_a_variant(is_named, flux, tmp_path):
    pipeline = load(flux)
    if is_named:
        wrong = load(flux, torch.float32)
        wrong.transformer.proj_out.weight.data.zero_()
        wrong.save_pretrained(tmp_path / "model")
    pipeline.save_pretrained(tmp_path / "model", variant="bf16", max_shard_size="300kB")
    assert list((tmp_path / "model" / "transformer").glob("*.bf16-00001-of-*.safetensors"))
    summary = quantize(tmp_path / "model", *(["--variant", "bf16"] if is_named else []), "--out", tmp_path / "out")
    plain = quantize(flux, "--out", tmp_path / "plain")
    assert summary["true_bits"] == plain["true_bits"]
    assert summary["bytes_before"] == pytest.approx(plain["bytes_before"], rel=0.05)
    assert_same(tmp_path / "out" / "transformer", tmp_path / "plain" / "transformer")


def test_a_transformer_by_itself(flux, tmp_path):
    message = fail("quantize", flux / "transformer", "--out", tmp_path / "out")
    assert "without a pipeline" in message and "--config" in message and "--no-calibration" in message
    summary = quantize(flux / "transformer", "--out", tmp_path / "out")
    whole = quantize(flux, "--out", tmp_path / "whole")
    assert summary["true_bits"] == whole["true_bits"] and summary["bytes_after"] == whole["bytes_after"]
    assert_same(tmp_path / "out", tmp_path / "whole" / "transformer")
    assert json.loads(succeed("inspect", tmp_path / "out", "--json"))["totals"]["true_bits"] == summary["true_bits"]
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert any(isinstance(layer, lrqdit.QuantLinear) for layer in model.modules())
    quantize(flux / "transformer", "--out", tmp_path / "out", "--overwrite")
    # both advices: a pipeline around it
    run = ["--steps", 2, "--device", "cpu", "--prompts", write_prompts(tmp_path)]
    succeed("quantize", flux / "transformer", "--config", flux, "--out", tmp_path / "run", *run)
    assert (tmp_path / "run" / "model_index.json").exists()


def write_prompts(folder: Path) -> Path:
    """Prompts at a size that the tiny pipeline runs in a moment."""
    lines = [json.dumps({"prompt": text, **tiny.FLUX_CALL}) for text in ("a fox", "a dog")]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder / "prompts.jsonl"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("has_weights", [True, False])
def test_a_single_file_of_the_original_code(prefix, has_weights, wan, original, tmp_path):
    save_file({prefix + name: tensor for name, tensor in original.items()}, tmp_path / "wan.safetensors")
    config = Path(shutil.copytree(wan, tmp_path / "config"))
    weights = config / "transformer" / "diffusion_pytorch_model.safetensors"
    if has_weights:  # of another training
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    else:
        weights.unlink()
    assert "pass --config" in fail("quantize", tmp_path / "wan.safetensors", "--out", tmp_path / "out")
    summary = quantize(tmp_path / "wan.safetensors", "--config", config, "--out", tmp_path / "out")
    assert summary["bytes_before"] == (tmp_path / "wan.safetensors").stat().st_size
    quantize(wan, "--out", tmp_path / "plain")
    assert_same(tmp_path / "out" / "transformer", tmp_path / "plain" / "transformer")
    quantize(tmp_path / "wan.safetensors", "--config", wan / "transformer", "--out", tmp_path / "alone")
    assert_same(tmp_path / "alone", tmp_path / "plain" / "transformer")


def scaled(state: dict[str, torch.Tensor], suffix: str, prefix: str, by_row: bool) -> dict[str, torch.Tensor]:
    """A state dict in ComfyUI's scaled float8: linear weights divided by a scale that stands beside them."""
    found = {}
    for name, tensor in state.items():
        if name.endswith(".weight") and tensor.ndim == 2:
            maxima = tensor.float().abs().amax(dim=1, keepdim=True) if by_row else tensor.float().abs().max()
            scale = maxima / 400 * (1.7 if ".q" in name else 1.0)
            found[f"{prefix}{name}"] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[f"{prefix}{name.removesuffix('.weight')}{suffix}"] = scale
            found[f"{prefix}{name.removesuffix('.weight')}{suffix.replace('weight', 'input')}"] = torch.ones(())
        else:
            found[f"{prefix}{name}"] = tensor
    return found | {f"{prefix}scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    "suffix, prefix, by_row",
    [(".scale_weight", "", False), (".weight_scale", "model.diffusion_model.", True), (".weight_scale", "", False)],
)
def test_scales_of_float8_files_are_applied(suffix, prefix, by_row, wan, original, tmp_path):
    save_file(scaled(original, suffix, prefix, by_row), tmp_path / "scaled.safetensors")
    summary = quantize(tmp_path / "scaled.safetensors", "--config", wan, "--out", tmp_path / "out")
    save_file(original, tmp_path / "plain.safetensors")
    plain = quantize(tmp_path / "plain.safetensors", "--config", wan, "--out", tmp_path / "plain")
    assert summary["true_bits"] == plain["true_bits"]
    exact = picture(load(wan)).float()
    found = picture(load(tmp_path / "out")).float()
    assert (found - exact).norm() < 0.2 * exact.norm()
    source = sources.find_source(tmp_path / "scaled.safetensors", wan)
    loaded = source.load(torch.float32, "cpu").transformer.state_dict()
    for name, tensor in tensors(wan / "transformer").items():
        assert (loaded[name] - tensor.float()).norm() <= 0.05 * tensor.float().norm(), name


def test_a_folder_of_scaled_float8(flux, tmp_path):
    folder = Path(shutil.copytree(flux, tmp_path / "model"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    linear = {name: tensor for name, tensor in state.items() if tensor.ndim == 2}
    save_file({**state, **scaled(linear, ".weight_scale", "", False)}, weights)
    loaded = sources.find_source(folder).load(torch.float32, "cpu").transformer.state_dict()
    assert all((loaded[name] - t.float()).norm() <= 0.05 * t.float().norm() for name, t in state.items())
    # quantizing while loading
    model = FluxTransformer2DModel.from_pretrained(
        folder / "transformer", quantization_config=lrqdit.LRQDiTConfig("w4a8"), torch_dtype=torch.bfloat16
    )
    expected = FluxTransformer2DModel.from_pretrained(
        flux / "transformer", quantization_config=lrqdit.LRQDiTConfig("w4a8"), torch_dtype=torch.bfloat16
    )
    name = "transformer_blocks.0.attn.to_q"
    one, two = (m.get_submodule(name).to_linear().weight.float() for m in (model, expected))
    assert (one - two).norm() < 0.2 * two.norm()


def test_scales_of_anything_else_are_refused():
    weight, scale = torch.zeros(4, 2, dtype=torch.uint8), torch.ones(())
    with pytest.raises(CheckpointError, match=r"a\.weight is torch\.uint8 .* only float8 weights"):
        from_float8({"a.weight": weight, "a.weight_scale": scale}, torch.float32)
    float8 = torch.zeros(4, 2).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="with a scale of shape"):
        from_float8({"a.weight": float8, "a.weight_scale": torch.ones(3)}, torch.float32)
    with pytest.raises(CheckpointError, match="only float8 weights"):
        from_float8({"a.weight": float8, "a.weight_scale": scale, "a.weight_scale_2": scale}, torch.float32)
    assert from_float8({"a": float8, "b": scale}, torch.float32)["a"].dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"b\.weight_scale is the scale of no weight"):
        from_float8({"a.weight": float8, "b.weight_scale": scale}, torch.float32)


def test_a_gguf_file(wan, original, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan")
    kinds = gguf.GGMLQuantizationType
    for name, tensor in original.items():
        kind = kinds.Q8_0 if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else kinds.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize(tmp_path / "wan.gguf", "--config", wan, "--out", tmp_path / "out")
    exact = picture(load(wan)).float()
    found = picture(load(tmp_path / "out")).float()
    assert (found - exact).norm() < 0.2 * exact.norm()
    # a model that diffusers keeps in GGUF: refused, and the advice works
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    model = WanTransformer3DModel.from_single_file(
        str(tmp_path / "wan.gguf"), config=str(wan / "transformer"), quantization_config=config,
        torch_dtype=torch.bfloat16,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"another backend; .* dequantize\(\)"):
        lrqdit.quantize(model, "w4a8", is_calibrated=False)
    model.dequantize()
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    model.save_pretrained(tmp_path / "again")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "again", torch_dtype=torch.bfloat16)
    assert any(isinstance(layer, lrqdit.QuantLinear) for layer in loaded.modules())
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        sources.read_state(tmp_path / "wan.gguf", torch.bfloat16)


def test_what_cannot_be_read(flux, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    message = fail("quantize", tmp_path / "model.ckpt", "--config", flux, "--out", tmp_path / "out")
    assert "neither .safetensors nor .gguf" in message
    (tmp_path / "half.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    assert "truncated" in fail(
        "quantize", tmp_path / "half.safetensors", "--config", flux, "--out", tmp_path / "out", "--no-calibration"
    )
    assert "leave out --config" in fail("quantize", flux, "--config", flux, "--out", tmp_path / "out")
    text_encoder = ["quantize", flux / "text_encoder", "--out", tmp_path / "out", "--no-calibration"]
    assert "names no model class of diffusers" in fail(*text_encoder)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    other = ["quantize", tmp_path / "other.safetensors", "--config", flux, "--out", tmp_path / "out"]
    assert "cannot be loaded as FluxTransformer2DModel" in fail(*other, "--no-calibration")
    assert not (tmp_path / "out").exists()
