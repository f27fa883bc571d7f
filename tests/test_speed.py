import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

import lrqdit
from lrqdit.app import doctor, memory, speed
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ConfigError
from lrqdit.kernels import gpu
from lrqdit.packed.linear import QuantLinear

BENCH_GPU = Path(__file__).parents[1] / "benchmarks" / "speed" / "bench_gpu.py"


def test_time_calls_takes_turns():
    order = []
    times = speed.time_calls([lambda: order.append("a"), lambda: order.append("b")], torch.device("cpu"), 0.0)
    assert order == ["a", "b"] * (1 + speed.MIN_RUNS) and len(times) == 2


def test_random_layers_keep_their_inputs_size():
    layer = speed.random_layer(96, 64, 4, 8)
    y = layer(torch.randn(16, 96))
    assert 0.05 < y.std() < 5 and torch.equal(layer.input_transform.input_scale, torch.ones(96, dtype=torch.float16))


def test_measured_layers(monkeypatch):
    monkeypatch.setattr(speed, "SHAPES", ((4, 48, 96), (1, 48, 32)))
    rows = speed.measure_layers(torch.device("cpu"), 0.0)
    assert [(row["tokens"], row["in_features"], row["out_features"]) for row in rows] == list(speed.SHAPES)
    assert all(row["speedup"] == pytest.approx(row["float_ms"] / row["packed_ms"]) for row in rows)


@pytest.mark.parametrize(("model", "billions"), [("flux", 11.9), ("pixart", 0.611), ("wan", 14.3)])
def test_memory_of_known_models(model, billions):
    w4, w3 = memory.expected_memory(model)
    assert w4["parameters"] == pytest.approx(billions * 1e9, rel=0.01)
    assert 4.0 < w4["true_bits"] < 4.3 and w3["packed_bytes"] < w4["packed_bytes"] < 0.27 * w4["bfloat16_bytes"]


def test_expected_memory_is_that_of_a_quantized_model(tiny_pipeline_folder):
    """Calibration may leave out rotations and offsets, so without it: then nothing is chosen."""
    folder = tiny_pipeline_folder / "transformer"
    (expected,) = memory.expected_memory(str(tiny_pipeline_folder), ["w4a8"])
    model = PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    lrqdit.quantize(model, "w4a8", is_calibrated=False)
    assert expected["packed_bytes"] == pytest.approx(lrqdit.measure_size(model).size_bytes, rel=0.03)


def test_layers_that_share_their_input():
    model = memory.replace_layers(memory.build_model("flux"), QuantizationConfig.from_name("w3a8"))
    single = model.single_transformer_blocks[0]
    assert single.attn.to_k.format.input_from == "single_transformer_blocks.0.proj_mlp"
    assert single.proj_mlp.shared_input is single.attn.to_q.shared_input
    assert single.proj_out.format.input_from is None
    assert single.norm.linear.format.input.activation_bits == 16 and single.norm.linear.format.weight_bits == 4
    assert isinstance(model.x_embedder, QuantLinear) and model.x_embedder.format.weight_bits == 8


def test_unknown_models(tmp_path):
    with pytest.raises(ConfigError, match="neither"):
        memory.build_model("sd")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(ConfigError, match="NoSuchModel"):
        memory.build_model(str(tmp_path))


def test_doctor_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert doctor.describe_devices() == []
    assert "no GPU" in doctor.describe()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert doctor.describe_devices()[0]["kernels"] == "reference"


@pytest.mark.parametrize(("kernels", "ratio"), [("triton", 1.9), ("triton", 0.3), ("reference", 1.9)])
def test_doctor_with_a_gpu(monkeypatch, kernels, ratio):
    class Properties:
        name, major, minor, total_memory = "Some GPU", 9, 0, 141 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(gpu, "choose_kernels", lambda device: gpu.Choice(kernels, "because"))
    monkeypatch.setattr(doctor, "measure_int8", lambda device: ratio)
    text = "\n".join(doctor.describe(measure=True))
    assert "cuda:0: Some GPU, compute capability 9.0, 141 GiB" in text and f"kernels: {kernels} (because)" in text
    assert ("int8 is slow here" in text) == (ratio < 1) and ("each call decodes" in text) == (kernels == "reference")


def test_doctor_says_when_int8_cannot_be_measured(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "Some GPU", 7, 0, 16 * 2**30

    def refuse(device):
        raise RuntimeError("no int8 here")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(gpu, "choose_kernels", lambda device: gpu.Choice("reference", "too old"))
    monkeypatch.setattr(doctor, "measure_int8", refuse)
    facts = doctor._describe_cuda(torch.device("cuda", 0), True)
    assert "no int8 here" in facts["notes"][-1] and "int8_over_bfloat16" not in facts


def test_gpu_benchmark_checks_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCH_GPU), "--self-check"])
    monkeypatch.setattr(speed, "MAX_RUNS", 2)
    runpy.run_path(str(BENCH_GPU), run_name="__main__")
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(results["layers"]) == 1 and [row["model"] for row in results["models"]] == ["bf16", "w4a8", "w3a8"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_benchmark_without_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(BENCH_GPU)])
    with pytest.raises(SystemExit, match="no CUDA device"):
        runpy.run_path(str(BENCH_GPU), run_name="__main__")
