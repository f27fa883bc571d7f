import hashlib
import importlib

import pytest
import torch
from conftest import build_tiny_pipeline
from safetensors.torch import save as save_bytes
from torch import nn

import lrqdit
from lrqdit.config import QuantizationConfig
from lrqdit.errors import CheckpointError, ConfigError, ModelError, NumericalError
from lrqdit.fitting import job
from lrqdit.fitting import layer as fit
from lrqdit.packed.linear import QuantLinear

quantize_module = importlib.import_module("lrqdit.api")
FAST = {"rotation": "hadamard", "smoothing": "never", "show_progress": False}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mixer(nn.Module):
    """A block of a transformer nobody has seen: odd names, odd sizes, layers without bias, one shared input."""

    def __init__(self, width=48):
        super().__init__()
        self.wq, self.wkv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.mend = nn.Linear(width, width)
        self.narrow, self.widen = nn.Linear(width, 13), nn.Linear(13, width)
        self.ada_norm = nn.Linear(width, width)

    def forward(self, x):
        q, (k, v) = self.wq(x), self.wkv(x).chunk(2, -1)
        x = x + self.mend(torch.tanh(q @ k.transpose(-1, -2) / 7) @ v)
        return x * torch.tanh(self.ada_norm(x)) + self.widen(torch.relu(self.narrow(x)))


class Unusual(nn.Module):
    def __init__(self, stages):
        super().__init__()
        self.inlet = nn.Linear(8, 48)
        self.stages = nn.ModuleList([Mixer() for _ in range(stages)])
        self.proj_out = nn.Linear(48, 96)

    def forward(self, x):
        x = self.inlet(x)
        for stage in self.stages:
            x = stage(x)
        return self.proj_out(x)


def build(seed=0, stages=2):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Unusual(stages).eval()


def run(model):
    with torch.no_grad():
        return model(random(4, 10, 8, seed=5))


def state_digest(module):
    tensors = {k: v.contiguous() for k, v in module.state_dict().items()}
    return hashlib.sha256(save_bytes(tensors)).hexdigest()


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}, [type(layer) for layer in module.modules()]


def assert_untouched(module, before):
    tensors, kinds = before
    assert [type(layer) for layer in module.modules()] == kinds
    assert all(torch.equal(v, tensors[k]) or v.isnan().any() or v.isinf().any() for k, v in module.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    assert not hasattr(module, "lrqdit_settings")


@pytest.mark.parametrize(("preset", "limit"), [("w4a8", 0.15), ("w8a8", 0.02), ("w3a16", 0.3), ("w2a4", 0.8)])
def test_a_module_nobody_has_seen(preset, limit):
    model = build()
    y = run(model)
    settings = {"show_progress": False} if preset == "w4a8" else FAST
    report = lrqdit.quantize(model, preset, forward_loop=run, **settings)
    assert (run(model) - y).norm() < limit * y.norm()
    packed = {name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    assert {"stages.0.wq", "stages.0.wkv", "stages.1.narrow", "stages.1.widen"} <= packed
    assert model.stages[0].wkv.format.input_from == "stages.0.wq"
    assert model.stages[0].wkv.shared_input is model.stages[0].wq.shared_input
    assert model.stages[0].wkv.format.weight_bits == report.config.weight_bits
    assert type(model.inlet) is nn.Linear  # embeds, and is small
    assert model.proj_out.format.weight_bits == 8 and model.proj_out.format.input.activation_bits == 16
    assert report.config.preset == preset and report.bytes_before == 4 * report.parameters_before
    assert [g.names for g in report.groups][0] == ["stages.0.wq", "stages.0.wkv"]
    assert report.to_dict()["layers"][0]["names"] == ["stages.0.wq", "stages.0.wkv"]
    assert report.size.parameters == report.parameters_before


def test_sequential():
    model = nn.Sequential(nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, 13, bias=False))
    x = random(50, 13)
    y = model(x)
    lrqdit.quantize(model, "w4a8", forward_loop=lambda m: m(x), show_progress=False)
    assert all(isinstance(model[i], QuantLinear) for i in (0, 2))
    assert (model(x) - y).norm() < 0.25 * y.norm()


def test_layers_without_weights_and_with_one_sign():
    model = build()
    model.stages[0].mend.weight.data.zero_()
    model.stages[1].wq.weight.data.abs_()
    y = run(model)
    lrqdit.quantize(model, "w4a8", forward_loop=run, **FAST)
    assert not model.stages[0].mend.dequantize().any()
    assert (run(model) - y).norm() < 0.2 * y.norm()


def test_dtype_device_and_mode_are_kept():
    model = build().bfloat16()
    model.stages[0].train()
    lrqdit.quantize(model, "w4a8", forward_loop=lambda m: m(random(4, 10, 8).bfloat16()), **FAST)
    layer = model.stages[0].wq
    assert layer.weight.dtype == torch.bfloat16 and layer.training and not model.stages[1].wq.training
    assert model(random(2, 10, 8).bfloat16()).dtype == torch.bfloat16


def test_without_data():
    model = build()
    y = run(model)
    report = lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    assert (run(model) - y).norm() < 0.15 * y.norm()
    assert all(group.rms is None and group.rotation == "hadamard" for group in report.groups)


def test_paper_mode():
    model = build()
    y = run(model)
    lrqdit.quantize(model, "w4a8", mode="paper", forward_loop=run, show_progress=False, rotation_threshold=9.0)
    layer = model.stages[0].mend
    assert layer.format.table_rows == 48 and layer.format.input.has_scale and not layer.format.input.has_offset
    assert layer.format.input.clip == 1 and type(model.proj_out) is nn.Linear
    assert (run(model) - y).norm() < 0.2 * y.norm()


def test_exclude():
    model = build()
    lrqdit.quantize(model, "w4a8", forward_loop=run, exclude=[r"\.mend$"], keep_bits=16, **FAST)
    assert type(model.stages[0].mend) is nn.Linear and isinstance(model.stages[0].wq, QuantLinear)
    with pytest.raises(ModelError, match="exclude='nothing' matches no linear layer of Unusual"):
        lrqdit.quantize(build(), "w4a8", forward_loop=run, exclude=["nothing"])


def test_twice_is_an_error():
    model = build()
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    digest = state_digest(model)
    with pytest.raises(ModelError, match="Unusual is quantized already"):
        lrqdit.quantize(model, "w4a8", is_calibrated=False)
    assert state_digest(model) == digest


@pytest.mark.parametrize("target", [nn.Linear(4, 4), nn.Sequential(nn.Conv2d(1, 1, 1)), "model", 3])
def test_targets_that_cannot_be_quantized(target):
    with pytest.raises(ModelError):
        lrqdit.quantize(target, "w4a8", is_calibrated=False)


def test_bad_settings_fail_before_anything_runs():
    def never(_):
        raise AssertionError

    for settings in ({"codebook": "morse"}, {"weight_bits": 7}, {"colour": "red"}, {"seed": "x"}):
        with pytest.raises(ConfigError):
            lrqdit.quantize(build(), QuantizationConfig(), forward_loop=never, **settings)
    with pytest.raises(ModelError, match="pass forward_loop"):
        lrqdit.quantize(build(), "w4a8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["stages.0.wkv", "stages.1.widen", "proj_out"])
@pytest.mark.parametrize("is_calibrated", [True, False])
def test_bad_weights(bad, name, is_calibrated):
    model = build()
    model.get_submodule(name).weight.data[3, 5] = bad
    before = snapshot(model)
    with pytest.raises(NumericalError, match=rf"{name}\.weight contains NaN or Inf"):
        lrqdit.quantize(model, "w4a8", forward_loop=run, is_calibrated=is_calibrated, **FAST)
    assert_untouched(model, before)


def test_bad_activations():
    model = build()
    before = snapshot(model)
    with pytest.raises(NumericalError, match=r"the input of stages\.0\.wq contains NaN"):
        lrqdit.quantize(model, "w4a8", forward_loop=lambda m: m(torch.full((1, 4, 8), torch.nan)), **FAST)
    assert_untouched(model, before)


def test_error_in_the_loop():
    model = build()
    before = snapshot(model)

    def loop(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lrqdit.quantize(model, "w4a8", forward_loop=loop, **FAST)
    assert_untouched(model, before)


def test_error_in_the_middle(monkeypatch):
    model = build()
    before, original, calls = snapshot(model), fit.quantize_linear, []

    def failing(*arguments, **keywords):
        calls.append(arguments[0])
        if len(calls) == 5:
            raise MemoryError
        return original(*arguments, **keywords)

    monkeypatch.setattr(job, "quantize_linear", failing)
    with pytest.raises(MemoryError):
        lrqdit.quantize(model, "w4a8", forward_loop=run, **FAST)
    assert_untouched(model, before)


def test_a_layer_that_never_ran():
    model = build()
    model.stages.append(Mixer())
    part = random(9, 48)
    report = lrqdit.quantize(model, "w4a8", forward_loop=lambda m: m.stages[1](m.stages[0](part)), **FAST)
    assert report.without_data and all(name.startswith("stages.2.") for name in report.without_data)
    assert report.to_dict()["without_data"] == report.without_data
    assert all(isinstance(model.get_submodule(name), QuantLinear) for name in report.without_data)

    model = build()
    before = snapshot(model)
    with pytest.raises(ModelError, match="no layer of Unusual ran; run the whole model"):
        lrqdit.quantize(model, "w4a8", forward_loop=lambda m: None, **FAST)
    assert_untouched(model, before)


class Conditioned(nn.Module):
    """Layers that modulate under names that say nothing."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"work": nn.Linear(64, 64), "turn": nn.Linear(64, 128)})])

    def forward(self, x, condition):
        for block in self.blocks:
            scale, shift = block["turn"](condition)[:, None].chunk(2, -1)
            x = x + block["work"](x * scale + shift)
        return x


@pytest.mark.parametrize("preset", ["w3a8", "w4a16"])
def test_what_reads_one_token_a_picture_is_weight_only(preset, tmp_path):
    calls = [(random(2, 9, 64, seed=seed), random(2, 64, seed=50 + seed)) for seed in range(3)]
    states = []
    for _ in range(2):  # the second reads what the first kept
        torch.manual_seed(0)
        model, folder = Conditioned(), tmp_path
        with torch.no_grad():
            lrqdit.quantize(model, preset, forward_loop=lambda m: [m(*call) for call in calls], sensitivity="none",
                            resume_folder=folder, **FAST)  # fmt: skip
        work, turn = model.blocks[0]["work"].format, model.blocks[0]["turn"].format
        assert (turn.weight_bits, turn.input.activation_bits) == (4, 16)
        assert f"w{work.weight_bits}a{work.input.activation_bits}" == preset
        states.append(state_digest(model))
    assert states[0] == states[1]


def test_rows_of_a_plain_module_are_tokens():
    """Where every layer reads as many rows as the call has, they are no pictures of one token."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    lrqdit.quantize(model, "w4a8", forward_loop=lambda m: m(random(30, 64)), **FAST)
    assert model[0].format.input.activation_bits == model[2].format.input.activation_bits == 8


def test_runs_are_identical():
    digests, threads = [], torch.get_num_threads()
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            model = build(stages=1)
            lrqdit.quantize(model, "w3a4", forward_loop=run, show_progress=False)
            digests.append(state_digest(model))
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1] == digests[2]


def test_seeds_differ():
    digests = []
    for seed in (0, 1):
        model = build(stages=1)
        lrqdit.quantize(model, "w3a4", is_calibrated=False, seed=seed, show_progress=False)
        digests.append(state_digest(model))
    assert digests[0] != digests[1]


def count_fits(monkeypatch, stop_after=None):
    """Layers quantized from here on; with ``stop_after``, killed after so many."""
    names, original = [], fit.quantize_linear

    def counted(*arguments, **keywords):
        if len(names) == stop_after:
            raise KeyboardInterrupt
        names.append(arguments[0])
        return original(*arguments, **keywords)

    monkeypatch.setattr(job, "quantize_linear", counted)
    return names


def test_resume(monkeypatch, tmp_path):
    reference = build()
    reference_report = lrqdit.quantize(reference, "w4a8", forward_loop=run, **FAST)

    first = count_fits(monkeypatch, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        lrqdit.quantize(build(), "w4a8", forward_loop=run, resume_folder=tmp_path, **FAST)
    assert first == ["stages.0.wq", "stages.0.wkv", "stages.0.mend", "stages.0.narrow"]

    second, model, runs = count_fits(monkeypatch), build(), []
    report = lrqdit.quantize(model, "w4a8", forward_loop=lambda m: runs.append(run(m)), resume_folder=tmp_path, **FAST)
    assert not runs  # the calibration is not repeated
    assert second[0] == "stages.0.widen" and not set(first) & set(second)
    assert state_digest(model) == state_digest(reference)
    assert torch.equal(run(model), run(reference))
    assert report.groups == reference_report.groups
    assert (tmp_path / "Unusual").exists()  # the caller removes it when the result is saved


@pytest.mark.parametrize("change", [{"seed": 1}, {"weight_bits": 3}, {"calibration_tokens": 100}])
def test_resume_with_another_configuration(monkeypatch, tmp_path, change):
    count_fits(monkeypatch, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        lrqdit.quantize(build(), QuantizationConfig(), forward_loop=run, resume_folder=tmp_path, **FAST)
    names, model, runs = count_fits(monkeypatch), build(), []
    lrqdit.quantize(
        model,
        QuantizationConfig(),
        forward_loop=lambda m: runs.append(run(m)),
        resume_folder=tmp_path,
        **FAST,
        **change,
    )
    assert len(runs) == 1 and names[0] == "stages.0.wq"
    reference = build()
    lrqdit.quantize(reference, QuantizationConfig(), forward_loop=run, **FAST, **change)
    assert state_digest(model) == state_digest(reference)


def test_resume_of_another_model(monkeypatch, tmp_path):
    count_fits(monkeypatch, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        lrqdit.quantize(build(), "w4a8", is_calibrated=False, resume_folder=tmp_path, show_progress=False)
    names = count_fits(monkeypatch)
    lrqdit.quantize(build(seed=1), "w4a8", is_calibrated=False, resume_folder=tmp_path, show_progress=False)
    assert names[0] == "stages.0.wq"


def test_resume_folder_of_something_else(tmp_path):
    """A run's folder is emptied: one that holds other files must be refused."""
    (tmp_path / "Unusual").mkdir()
    (tmp_path / "Unusual" / "weights.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="holds files of something else"):
        lrqdit.quantize(build(), "w4a8", forward_loop=run, resume_folder=tmp_path, **FAST)
    assert (tmp_path / "Unusual" / "weights.safetensors").read_text() == "precious"


@pytest.fixture(scope="module")
def quantized_pipeline():
    pipeline = build_tiny_pipeline()
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    report = lrqdit.quantize(pipeline, "w4a8", prompts=["a fox", "a boat"], steps=2, **FAST)
    return pipeline, report, len(calls)


def test_pipeline(quantized_pipeline):
    pipeline, report, calls = quantized_pipeline
    assert calls == 6  # two prompts, two steps, and every second call again for its derivatives
    layers = [layer for layer in pipeline.transformer.modules() if isinstance(layer, QuantLinear)]
    assert len(layers) > 20 and not any(isinstance(layer, QuantLinear) for layer in pipeline.text_encoder.modules())
    assert [
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn1.to_k",
        "transformer_blocks.0.attn1.to_v",
    ] in [group.names for group in report.groups]
    assert pipeline.transformer.config.quantization_config.quant_method == "lrqdit"
    assert "disable" not in pipeline._progress_bar_config or not pipeline._progress_bar_config["disable"]


def test_empty_prompts():
    with pytest.raises(ConfigError, match="list of calibration prompts is empty"):
        lrqdit.quantize(build_tiny_pipeline(), "w4a8", prompts=[])


def test_pipeline_without_a_transformer():
    pipeline = build_tiny_pipeline()
    pipeline.transformer = None
    with pytest.raises(ModelError, match="has no diffusion transformer"):
        lrqdit.quantize(pipeline, "w4a8")


def test_true_bits_are_those_of_the_file(tmp_path):
    """The header of a file is not counted: it is below 2 % once the layers have some size."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    x = random(64, 512)
    report = lrqdit.quantize(model, "w3a8", forward_loop=lambda m: m(x), **FAST)
    lrqdit.save_checkpoint(model, tmp_path)
    file_bits = 8 * (tmp_path / "model.safetensors").stat().st_size / report.parameters_before
    assert report.size.true_bits == pytest.approx(file_bits, rel=0.02)
    assert 3 < report.size.true_bits < 3.3
    parts = report.size.code_bits + report.size.side_bits + report.size.kept_bits
    assert parts == pytest.approx(report.size.true_bits)
    assert report.size == lrqdit.measure_size(model)
    assert report.size.low_bit_share > 0.99


def test_one_calibration_for_several_settings():
    """The same bytes as with a calibration of its own, and the observed model stays as it was."""
    model = build()
    before = state_digest(model)
    calibration = lrqdit.observe(model, forward_loop=run, calibration_tokens=64)
    assert state_digest(model) == before
    for preset in ("w3a8", "w4a4"):
        shared, own = build(), build()
        lrqdit.quantize(shared, preset, calibration=calibration, calibration_tokens=64, **FAST)
        lrqdit.quantize(own, preset, forward_loop=run, calibration_tokens=64, **FAST)
        assert state_digest(shared) == state_digest(own)


def test_compensation_is_the_default_and_wins():
    def loop(model):
        for seed in range(16):
            with torch.no_grad():
                model(random(4, 10, 8, seed=100 + seed))

    x, errors = random(4, 10, 8, seed=5), {}
    for rounding in ("nearest", "compensated"):
        model = build()
        wanted = run(model)
        report = lrqdit.quantize(model, "w3a8", forward_loop=loop, rounding=rounding, **FAST)
        with torch.no_grad():
            errors[rounding] = float((model(x) - wanted).square().sum())
    assert errors["compensated"] < 0.8 * errors["nearest"]
    assert QuantizationConfig().rounding == "compensated"
    assert all(set(errors) == {"nearest", "gptq"} for group in report.groups for errors in group.rounding.values())


def test_prompts_are_held_out_whole(monkeypatch):
    """Of nine prompts the eighth fills the reservoirs, at any batch size of one; few prompts are not spared."""
    seen = []
    original = quantize_module.Observer._observe

    def observe(self, name, x):
        seen.append(self.is_held_out)
        original(self, name, x)

    monkeypatch.setattr(quantize_module.Observer, "_observe", observe)
    pipeline = build_tiny_pipeline()
    for count, expected in ((9, 1 / 9), (4, 1 / 4), (3, 0)):
        seen.clear()
        prompts = [f"prompt {i}" for i in range(count)]
        lrqdit.observe(pipeline, prompts=prompts, steps=2, show_progress=False)
        assert sum(seen) / len(seen) == expected
    seen.clear()
    lrqdit.observe(pipeline, prompts=[f"prompt {i}" for i in range(16)], steps=2, batch_size=2, show_progress=False)
    assert sum(seen) / len(seen) == 1 / 8


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("w4a8", {}),
        ("w4a4", {"rotation": "outlier"}),
        ("w3a8", {"mode": "paper"}),
        ("w4a8", {"sensitivity": "measured"}),
        ("w4a8", {"is_calibrated": False}),
    ],
)
def test_default_dtype_does_not_matter(preset, settings):
    """torch.set_default_dtype is the user's: neither what is stored nor what a layer computes may depend on it."""
    x, results = random(4, 10, 8, seed=5), []
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        model = build()
        torch.set_default_dtype(dtype)
        try:
            loop = {"forward_loop": lambda m: m(x)} if settings.get("is_calibrated", True) else {}
            lrqdit.quantize(model, preset, show_progress=False, **loop, **settings)
            with torch.no_grad():
                results.append((state_digest(model), model(x), model.stages[0].wq.to_linear().weight))
        finally:
            torch.set_default_dtype(torch.float32)
    for digest, y, weight in results[1:]:
        assert digest == results[0][0] and torch.equal(y, results[0][1]) and torch.equal(weight, results[0][2])


def test_a_variable_at_fault_is_an_error_before_anything_is_changed(monkeypatch):
    monkeypatch.setenv("LRQDIT_ATTENTION", "foo")
    model = build()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="LRQDIT_ATTENTION='foo' is not one of native, torch; set one"):
        lrqdit.quantize(model, "w4a8", is_calibrated=False)
    assert_untouched(model, before)
