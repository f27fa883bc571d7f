import json

import pytest
import torch
from conftest import build_tiny_pipeline, linear_format
from diffusers import DiffusionPipeline
from test_quantize import FAST, assert_untouched, build, count_fits, random, run, snapshot, state_digest
from tiny_transformers import build_model, run_model
from torch import nn
from typer.testing import CliRunner

import lrqdit
from lrqdit.app import cli, inspection
from lrqdit.calibration.statistics import ActivationStats
from lrqdit.config import QuantizationConfig
from lrqdit.errors import ConfigError, ModelError, NumericalError
from lrqdit.fitting.bits import Probe, estimate
from lrqdit.integrations import generation, pipelines
from lrqdit.packed.linear import QuantLinear

MEASURED = {"sensitivity": "measured", **FAST}


def loop(model):
    for seed in range(9):
        with torch.no_grad():
            model(random(4, 10, 8, seed=seed))


def widths(module):
    return {name: m.format.weight_bits for name, m in module.named_modules() if isinstance(m, QuantLinear)}


@pytest.fixture(scope="module")
def calibration():
    return lrqdit.observe(build(), forward_loop=loop)


def quantize(calibration, average_bits, preset="w3a8", **settings):
    model = build()
    report = lrqdit.quantize(
        model, preset, average_bits=average_bits, calibration=calibration, **{**MEASURED, **settings}
    )
    return model, report


def predicted_error(report):
    return sum(g.predicted[name][str(g.chosen_bits[name])] for g in report.groups for name in g.names)


def test_the_budget_is_kept_and_more_of_it_is_never_worse(calibration):
    before, changes = float("inf"), []
    for budget in (9.5, 10, 11, 12, 16):
        model, report = quantize(calibration, budget)
        assert report.size.true_bits == lrqdit.measure_size(model).true_bits <= budget
        error = predicted_error(report)
        assert error <= before
        before = error
        with torch.no_grad():
            x = random(4, 10, 8, seed=99)
            changes.append(float((model(x) - build()(x)).square().mean()))
    assert changes[-1] < changes[2] < changes[0]
    assert set(widths(model).values()) == {8} and quantize(calibration, 32)[1].size == report.size


def test_better_than_the_same_bits_everywhere(calibration):
    uniform = build()
    report = lrqdit.quantize(uniform, "w3a16", calibration=calibration, sensitivity="none", **FAST)
    model, mixed = quantize(calibration, report.size.true_bits, "w3a16")
    assert mixed.size.true_bits <= report.size.true_bits
    x, errors = random(32, 10, 8, seed=99), {}
    for name, candidate in (("uniform", uniform), ("mixed", model)):
        with torch.no_grad():
            errors[name] = float((candidate(x) - build()(x)).square().mean())
    assert errors["mixed"] < 0.8 * errors["uniform"]
    assert len({bits for name, bits in widths(model).items() if name != "proj_out"}) > 1


def test_what_is_reported(calibration):
    model, report = quantize(calibration, 11.0)
    found = widths(model)
    assert found["proj_out"] == 8
    for group in json.loads(json.dumps(report.to_dict()))["layers"]:
        assert group["weight_bits"] == 3  # where it was measured
        for name in group["names"]:
            assert group["chosen_bits"][name] == found[name]
            assert list(group["predicted"][name]) == ["2", "3", "4", "5", "6", "8"]
    assert model.lrqdit_settings["average_bits"] == 11.0
    assert {g.bits_of(n) for g in report.groups for n in g.names} == {found[n] for n in found if n != "proj_out"}


@pytest.mark.parametrize("budget", [0.5, 8.5])
def test_a_budget_that_cannot_be_reached(calibration, budget):
    def never(_):
        raise AssertionError

    model = build()
    before = snapshot(model)
    with pytest.raises(
        ConfigError, match=rf"average_bits={budget:g} cannot be reached: Unusual takes at least"
    ) as error:
        lrqdit.quantize(model, "w3a8", average_bits=budget, forward_loop=never, **FAST)
    assert_untouched(model, before)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert quantize(calibration, least)[1].size.true_bits <= least


def test_the_smallest_budget_is_named_exactly(calibration):
    """Between what layers without input transforms take and what they take with them, only the fitted ones tell."""
    model, report = quantize(calibration, 9.5)
    smallest = 9.5
    with pytest.raises(ConfigError, match="takes at least") as error:
        for _ in range(20):
            smallest -= 0.005
            model, report = quantize(calibration, smallest)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert smallest < least <= smallest + 0.011
    assert set(widths(quantize(calibration, least)[0]).values()) == {2, 8}


def test_bad_budgets():
    for value in (0, -1, float("nan"), float("inf"), True, "3.5"):
        with pytest.raises(ConfigError, match="average_bits="):
            QuantizationConfig(average_bits=value)
    with pytest.raises(ConfigError, match="average_bits needs calibration"):
        lrqdit.quantize(build(), "w4a8", average_bits=9.0, is_calibrated=False)
    with pytest.raises(ConfigError, match="average_bits needs calibration"):
        lrqdit.LRQDiTConfig("w4a8", average_bits=4.0)


def test_arguments_that_cannot_be_kept():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()

        def forward(self, x, token):
            return self.inner(x)

    model = Picky()
    with pytest.raises(ModelError, match="no call of Picky could be kept"):
        lrqdit.quantize(
            model, "w3a8", average_bits=9.0, forward_loop=lambda m: m(random(4, 10, 8), object()), **MEASURED
        )


def test_estimated_from_gradients(calibration):
    """By default no layer is run: the size is that of the same bits everywhere, the error smaller."""
    x, errors, sizes = random(32, 10, 8, seed=99), {}, {}
    for sensitivity in ("none", "gradient"):
        model = build()
        report = lrqdit.quantize(model, "w3a16", calibration=calibration, sensitivity=sensitivity, **FAST)
        sizes[sensitivity] = report.size.size_bytes
        with torch.no_grad():
            errors[sensitivity] = float((model(x) - build()(x)).square().mean())
    assert sizes["gradient"] <= sizes["none"] and errors["gradient"] < 0.9 * errors["none"]
    assert report.config.average_bits is None and len({b for g in report.groups for b in g.chosen_bits.values()}) > 1
    budget = quantize(calibration, 10.0, sensitivity="gradient")[1]
    assert budget.size.true_bits <= 10


def test_estimates_are_of_the_measured_order(calibration):
    measured, estimated = (quantize(calibration, 12.0, "w3a16", sensitivity=s)[1] for s in ("measured", "gradient"))
    logs = torch.tensor(
        [
            [changes[name]["3"] for g in report.groups for name, changes in [(n, g.predicted) for n in g.names]]
            for report in (measured, estimated)
        ]
    ).log()
    assert torch.corrcoef(logs)[0, 1] > 0.7


def test_an_exact_estimate():
    """One layer, one token, one picture: <M, D>^2 is the squared change of the output."""
    weight, x, gradient = random(6, 8), random(1, 1, 8, seed=1), random(1, 1, 6, seed=2)
    stats = ActivationStats(8, 16, seed=0, has_moment=True)
    stats.update(torch.zeros(1, 8))
    stats.add_gradient("layer", gradient, x, 1)
    changes = []
    for seed in range(200):
        layer = QuantLinear(linear_format(8, 6, 8, 16, table_rows=0, has_bias=False, has_original_bias=False))
        layer.row_scale_bits.copy_(torch.ones(6).view(torch.int32))
        change = 0.5 * random(6, 8, seed=seed)
        layer.dequantize = lambda change=change: weight + change  # type: ignore[method-assign]
        moment, energy = stats.output_moment(torch.zeros(8)), stats.gradient_energy("layer")
        exact = float((gradient[0] @ change @ x[0].T).square())
        changes.append((estimate(layer, weight, moment, energy), exact))
    assert energy == pytest.approx(float(gradient.square().sum() * x.square().sum()), rel=1e-4)
    assert float(torch.tensor(changes).mean(0).log().diff().abs()) < 0.3  # on average over directions of D


def test_without_gradients_every_layer_has_its_bits():
    model = build()
    lrqdit.quantize(model, "w3a8", forward_loop=loop, hessian="input", **FAST)
    assert set(widths(model).values()) == {3, 8}
    with pytest.raises(ModelError, match="saw no gradients of Unusual"):
        lrqdit.quantize(build(), "w3a8", average_bits=11.0, forward_loop=loop, hessian="input", **FAST)
    with pytest.raises(ConfigError, match="sensitivity='none'"):
        lrqdit.quantize(build(), "w3a8", average_bits=11.0, mode="paper", forward_loop=loop)


def test_the_probe_leaves_the_model_as_it_was(calibration):
    model = build().train()
    before = snapshot(model)
    layer = quantize(calibration, 11.0)[0].stages[0].mend
    with Probe(model, calibration["Unusual"].steps) as probe:
        assert not model.training
        assert probe.measure("stages.0.mend", layer) > 0
    assert model.training
    assert_untouched(model, before)


def test_shared_calibration_and_threads():
    digests, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model = build()
            lrqdit.quantize(model, "w3a8", average_bits=11.0, forward_loop=loop, **MEASURED)
            digests.append(state_digest(model))
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1] == state_digest(quantize(lrqdit.observe(build(), forward_loop=loop), 11.0)[0])


@pytest.mark.parametrize("stop_after", [4, 14])
def test_resume(monkeypatch, tmp_path, calibration, stop_after):
    """Killed while sensitivities are measured, and while layers are fitted at the chosen bits."""
    reference, reference_report = quantize(calibration, 11.0)
    settings = {"average_bits": 11.0, "forward_loop": loop, "resume_folder": tmp_path, **MEASURED}
    with monkeypatch.context() as patch:
        first = count_fits(patch, stop_after)
        with pytest.raises(KeyboardInterrupt):
            lrqdit.quantize(build(), "w3a8", **settings)
    measured, original = [], Probe.measure
    monkeypatch.setattr(
        Probe, "measure", lambda self, name, layer: measured.append(name) or original(self, name, layer)
    )
    second, model = count_fits(monkeypatch), build()
    report = lrqdit.quantize(model, "w3a8", **{**settings, "forward_loop": lambda m: pytest.fail("calibrates again")})
    assert not set(measured) & set(first[:10]) and len(measured) == max(0, 10 - stop_after)
    assert len(first) + len(second) == 10 + sum(g.bits_of(n) != 3 for g in report.groups for n in g.names)
    assert state_digest(model) == state_digest(reference) and report.groups == reference_report.groups
    # another budget is another run
    again = count_fits(monkeypatch)
    lrqdit.quantize(build(), "w3a8", **{**settings, "average_bits": 11.5})
    assert again[0] == "stages.0.wq"


def test_generic_module_save_and_load(calibration, tmp_path):
    model, _ = quantize(calibration, 11.0)
    lrqdit.save_checkpoint(model, tmp_path)
    loaded = lrqdit.load_checkpoint(build(seed=1), tmp_path)
    assert widths(loaded) == widths(model) and len(set(widths(model).values())) > 2
    assert torch.equal(run(loaded), run(model))
    totals = inspection.describe_folder(tmp_path)["totals"]
    assert totals["true_bits"] == pytest.approx(lrqdit.measure_size(model).true_bits)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_modulation_layers_keep_four_bits(name):
    model = build_model(name)
    report = lrqdit.quantize(model, "w3a8", average_bits=9.5, forward_loop=run_model, **MEASURED)
    assert report.size.true_bits <= 9.5
    modulation = [g for g in report.groups if g.activation_bits == 16]
    assert modulation and all(set(g.chosen_bits.values()) <= {4, 5, 6, 8} for g in modulation)
    run_model(model)


def test_pipeline_in_the_dtype_of_its_files(tmp_path):
    """The budget holds for what is saved: float16, though the pipeline runs in float32."""
    build_tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "source")
    pipeline = pipelines.load_pipeline(tmp_path / "source", torch.float32, "cpu")
    settings = {"average_bits": 7.0, "prompts": ["a fox", "a boat"], "steps": 2, **FAST}
    with pytest.raises(ConfigError, match="takes at least"):
        lrqdit.quantize(pipeline, "w3a8", **{**settings, "average_bits": 5.5})
    stored = pipelines.stored_dtypes(tmp_path / "source")
    report = lrqdit.quantize(pipeline, "w3a8", stored_dtypes=stored, **settings)
    pipelines.save_quantized(pipeline, report, tmp_path / "source", tmp_path / "out")
    described = inspection.describe_folder(tmp_path / "out")
    assert described["totals"]["true_bits"] == pytest.approx(report.size.true_bits)
    assert 6.8 < report.size.true_bits <= 7.0
    found = {layer["name"]: layer["weight_bits"] for layer in described["layers"]}
    assert found == widths(pipeline.transformer) and len(set(found.values())) > 2
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert widths(loaded.transformer) == found
    one, two = (
        generation.generate_images(p.to(torch.float32), ["a fox"], steps=2, show_progress=False)[0].latents
        for p in (pipeline, loaded)
    )
    assert (one - two).norm() < 0.01 * one.norm()  # buffers that no file holds went through float16 in one of them


def test_command_line(tmp_path, tiny_pipeline_folder):
    def succeed(*arguments):
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na boat\n")
    command = ["quantize", tiny_pipeline_folder, "--prompts", prompts, "--steps", 2, "--out", tmp_path / "out"]
    summary = json.loads(succeed(*command, "--bits", "w3a8", "--average-bits", 8.5, "--json"))
    assert summary["true_bits"] <= summary["average_bits"] == 8.5 and len(summary["weight_bits"]) > 1
    described = succeed("inspect", tmp_path / "out")
    assert "layers by weight bits: " in described and "a budget of 8.5 bits per parameter" in described
    result = CliRunner().invoke(cli.app, [str(a) for a in [*command, "--average-bits", 3, "--overwrite"]])
    assert result.exit_code == 2 and "takes at least" in result.stderr


def test_an_output_that_overflows(calibration):
    model = build()
    layer = quantize(calibration, 11.0)[0].stages[0].mend
    layer.row_scale_bits.copy_(torch.full((48,), float("inf")).view(torch.int32))
    with Probe(model, calibration["Unusual"].steps) as probe, pytest.raises(NumericalError, match="NaN or Inf once"):
        probe.measure("stages.0.mend", layer)
