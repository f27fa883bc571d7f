import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny_pipeline
from PIL import Image
from torch import nn

import lrqdit
from benchmarks.methods.recipes import RECIPES, Recipe
from benchmarks.methods.simulate import simulate
from benchmarks.quality import bench_quality
from lrqdit.calibration.statistics import ActivationStats, InputGroup


@pytest.fixture(scope="module")
def bench():
    return bench_quality


def test_kernel_distance(bench):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 16, generator=generator).double() for _ in range(2))
    assert bench.kernel_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert abs(bench.kernel_distance(a, b)) < 0.3 < bench.kernel_distance(a, b + 1)


def test_interval(bench):
    values = [float(v) for v in range(1, 65)]
    low, high = bench.interval(values)
    assert low < sum(values) / 64 < high and high - low == pytest.approx(2 * 1.96 * 18.5 / 8, rel=0.1)
    low, high = bench.interval(values, [2 * v for v in values])
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_ratios(bench):
    rows = [
        {"preset": name, "bits": bits, "image_mse": sum(e) / 3, "squared_errors": e}
        for name, bits, e in (
            ("lrqdit", "w4a8", [1.0, 2.0, 3.0]), ("lrq-dit-paper", "w4a8", [2.0, 4.0, 6.0]), ("rtn", "w3a8", [1.0] * 3)
        )
    ]  # fmt: skip
    bench.add_ratios(rows)
    assert rows[0]["over_paper"] == pytest.approx(0.5) and rows[1]["over_paper"] == 1
    assert "over_paper" not in rows[2]


def test_calibration_and_evaluation_prompts_are_apart(bench):
    entries, _ = bench.bench_captions.load_reference()
    names = {entries[i]["name"] for i in bench.bench_captions.choose_captions(entries)}
    assert len(names) == 64
    assert not names & set(bench.demo.captions("calibration"))
    assert not set(bench.demo.captions("shown")) & set(bench.demo.captions("calibration"))
    trained = {entry["name"] for entry in entries if entry["is_trained"]}
    assert set(bench.demo.captions("calibration")) <= trained


def test_every_method_runs_on_a_layer(bench):
    rows = bench.run_layers(("w4a4",), 64, 24)
    assert {row["preset"] for row in rows} == set(bench.LAYER_PRESETS)
    error = {(row["input"], row["preset"]): row["error"] for row in rows}
    assert error["offset", "lrqdit"] < 0.1 < error["offset", "quarot"]
    assert all(row["true_bits"] > 4 for row in rows)


def test_layer_inputs_are_what_they_say(bench):
    weight = torch.randn(96, 1152, generator=torch.Generator().manual_seed(0))

    def measure(name):
        """The largest entry of a token over the usual one, and the share of the output's variation outside the loud."""
        x = bench.synthetic_inputs(1152)[name](5)
        x, count = x[:500], {"salient": 6, "offset": 3}.get(name, 40)
        quiet = x.clone()
        loud = x.square().mean(0).argsort(descending=True)[:count]
        quiet[:, loud] = x[:, loud].mean(0)
        varying = [float((y - y.mean(0)).square().sum()) for y in (x @ weight.T, quiet @ weight.T)]
        return float(x.abs().amax(1).median() / x.abs().median()), varying[1] / varying[0]

    peak, rest = measure("salient")
    assert peak > 25 and 0.2 < rest < 0.6
    peak, rest = measure("offset")
    assert peak > 100 and rest > 0.95
    peak, rest = measure("heavy tails")
    assert peak > 15 and 0.2 < rest < 0.8
    assert measure("heavy spectrum")[0] < 10


def test_layer_table(bench, capsys):
    rows = [
        {"input": "salient", "preset": preset, "bits": bits, "true_bits": 4.25, "error": error}
        for preset, bits, error in (("a", "w4a8", 0.4), ("a", "w4a4", 0.9), ("b", "w4a8", 0.1), ("b", "w4a4", 0.4))
    ]
    bench.print_layers(rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [["b", "4.25", "0.2000"], ["a", "4.25", "0.6000"]]


class FakeBench:
    """A model that answers every prompt with one colour."""

    def __init__(self, args):
        self.prompts, self.original, self.folder, self.calibration = [f"caption {i}" for i in range(20)], 0, "", {}

    def setup(self):
        return {"pictures": 20}

    def budget(self, preset, bits, rows):
        return None

    def run(self, preset, bits, count):
        return {"image_mse": 2.0, "true_bits": 4.5}


def test_seeds_follow_the_places(bench):
    class Scheduler:
        def set_timesteps(self, count):
            pass

        def step(self, model_output):
            return (model_output,)

    class Pipeline:
        scheduler, components = Scheduler(), {}

        def set_progress_bar_config(self, disable):
            pass

        def __call__(self, prompt, generator, num_inference_steps, guidance_scale):
            self.scheduler.step(torch.zeros(len(prompt), 1))
            return SimpleNamespace(images=[torch.randn(3, generator=g) for g in generator])

    every = bench.generate(Pipeline(), [f"caption {i}" for i in range(40)], 1, 1.0)
    some = bench.generate(Pipeline(), ["caption 7", "caption 33"], 1, 1.0, (7, 33))
    assert [sample.seed for sample in some] == [1007, 1033]
    for sample, place in zip(some, (7, 33), strict=True):
        assert torch.equal(sample.picture, every[place].picture) and sample.prompt == every[place].prompt


def test_pictures(bench, monkeypatch, tmp_path, capsys):
    def generate(pipeline, prompts, steps, guidance, places):
        assert prompts == [f"caption {place}" for place in places]
        return [SimpleNamespace(picture=Image.new("RGB", (8, 8), (pipeline, 10 * place, 0))) for place in places]

    monkeypatch.setattr(bench, "Bench", FakeBench)
    monkeypatch.setattr(bench, "generate", generate)
    monkeypatch.setattr(bench, "load", lambda folder: 200)
    monkeypatch.setattr(bench, "quantize", lambda *_: 3.456)
    monkeypatch.setattr(bench.evaluate, "compare", lambda a, b: {"metrics": {"psnr": 21.04}})
    args = SimpleNamespace(presets=["rtn"], bits=["w3a4"], steps=1, guidance_scale=1.0, pictures=tmp_path / "grid.png")
    bench.draw_pictures(args)
    assert capsys.readouterr().out.strip() == "rtn w3a4: 3.46 bits, 21.0 dB"
    grid = Image.open(args.pictures).convert("RGB")
    colours = {colour for _, colour in grid.getcolors(100_000)}
    assert {(red, 10 * i, 0) for red in (0, 200) for i in (0, 4, 8, 12, 16)} <= colours


@pytest.mark.parametrize(
    ("errors", "true_bits", "setup", "message"),
    [
        ([2.0] * 20, 4.5, 20, ""),
        ([2.2] * 20, 4.504, 20, ""),
        ([2.0] * 16 + [9.0] * 4, 4.5, 20, ""),  # only the first pictures are drawn again
        ([2.5] * 20, 4.5, 20, "not as committed: rtn w4a4"),
        ([1.5] * 20, 4.5, 20, "not as committed: rtn w4a4"),
        ([2.0] * 20, 4.6, 20, "not as committed: rtn w4a4"),
        ([2.0] * 20, 4.5, 21, "another setup"),
    ],
)
def test_check(bench, monkeypatch, tmp_path, errors, true_bits, setup, message):
    monkeypatch.setattr(bench, "Bench", FakeBench)
    monkeypatch.setattr(bench, "CHECKED", (("rtn", "w4a4"),))
    row = {"preset": "rtn", "bits": "w4a4", "true_bits": true_bits, "squared_errors": errors}
    out = tmp_path / "results.json"
    out.write_text(json.dumps({"setup": {"pictures": setup}, "rows": [row]}))
    args = SimpleNamespace(out=out, presets=None, bits=None)
    if not message:
        return bench.check(args)
    with pytest.raises(SystemExit, match=message):
        bench.check(args)


def test_check_of_named_rows(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "Bench", FakeBench)
    out = tmp_path / "results.json"
    row = {"preset": "gptq", "bits": "w3a8", "true_bits": 4.5, "squared_errors": [2.0] * 20}
    out.write_text(json.dumps({"setup": {"pictures": 20}, "rows": [row]}))
    bench.check(SimpleNamespace(out=out, presets=["gptq"], bits=["w3a8"]))
    assert "gptq w3a8: error +0.0%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no rtn w3a8"):
        bench.check(SimpleNamespace(out=out, presets=["rtn"], bits=["w3a8"]))


def test_packages_that_are_left_out(bench, monkeypatch, capsys):
    assert not set(bench.PACKAGES) & set(bench.PRESETS)
    monkeypatch.setattr(bench.packages.importlib.util, "find_spec", lambda name: None)
    assert bench.measurable(["rtn", "package:torchao"], "w4a8") == ["rtn"]
    assert "left out, torchao is not installed" in capsys.readouterr().out
    monkeypatch.setattr(bench.packages.importlib.util, "find_spec", lambda name: name)
    assert bench.measurable(["package:torchao"], "w4a8") == ["package:torchao"]
    assert bench.measurable(["package:torchao"], "w4a4") == []
    assert "it has no w4a4" in capsys.readouterr().out


MATCHING = {
    "optimum-quanto": (Recipe("", group=96), 4, 16, 0.15),
    "torchao": (Recipe("", group=32, levels="symmetric", tokens="affine"), 4, 8, 0.15),
    "sdnq": (Recipe("", group=96), 4, 8, 0.15),
    "orbitquant": (RECIPES["orbitquant"], 4, 4, 0.15),
    "orbitquant+gptq": (RECIPES["orbitquant+gptq"], 3, 4, 0.15),
}


@pytest.mark.parametrize("name", MATCHING)
def test_a_package_and_its_recipe_agree(bench, name):
    """The error of a layer by the package itself, and what it stores, beside the recipe of the same parts."""
    recipe, weight_bits, activation_bits, tolerance = MATCHING[name]
    if reason := bench.packages.why_missing(name, weight_bits, activation_bits):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(288) + 0.2 * torch.randn(288, 288, generator=generator)
    stats = ActivationStats(288, 512, 0, has_moment=True)
    stats.update(torch.randn(2000, 288, generator=generator) @ mixing)
    x = torch.randn(300, 288, generator=generator) @ mixing
    torch.manual_seed(0)
    layer, found = nn.Linear(288, 96), []
    with torch.no_grad():
        for quantize, method in ((bench.packages.quantize, name), (None, recipe)):
            model = nn.Sequential(copy.deepcopy(layer))
            groups = [InputGroup(["0"], stats)]
            if quantize is None:
                report = simulate(model, method, groups, weight_bits, activation_bits)
            else:
                report = quantize(method, model, groups, weight_bits, activation_bits)
            found.append((float((model(x) - layer(x)).square().sum()), report.true_bits))
    (error, bits), (expected, _) = found
    assert error == pytest.approx(expected, rel=tolerance)
    # torchao keeps its 4-bit codes in bytes on this kind of processor
    assert weight_bits < bits < (9 if name == "torchao" else weight_bits + 1)


def test_stored_bits_of_subclasses(bench):
    """What is inside a tensor subclass counts, not what it looks like."""

    class Packed(torch.Tensor):
        @staticmethod
        def __new__(cls, codes):
            return torch.Tensor._make_wrapper_subclass(cls, (codes.numel(), 2), dtype=torch.float32)

        def __init__(self, codes):
            self.codes = codes

        def __tensor_flatten__(self):
            return ["codes"], None

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return args[0]

    module = nn.Linear(4, 3).half()
    assert bench.packages.stored_bits(module) == 16 * 15
    module.weight = nn.Parameter(Packed(torch.zeros(6, dtype=torch.uint8)), requires_grad=False)
    assert bench.packages.stored_bits(module) == 16 * 3 + 8 * 6


def test_equal_bits(bench):
    """The budget is the true bits of the paper's row, or of the paper's method itself where there is no row."""
    pipeline = build_tiny_pipeline()
    calibration = lrqdit.observe(pipeline, prompts=["a fox", "a boat"], steps=2, show_progress=False)
    measured = bench.quantize(build_tiny_pipeline(), "lrq-dit-paper", "w4a8", calibration)
    found = bench.quantize(build_tiny_pipeline(), "lrqdit-equal-bits", "w4a8", calibration, measured)
    assert 9.5 < found <= measured  # 8 bits everywhere, and more is not to be had
    rows = [{"preset": "lrqdit", "bits": "w4a8", "true_bits": 1.0}]
    rows.append({"preset": "lrq-dit-paper", "bits": "w4a8", "true_bits": 7.0})
    assert bench.Bench.budget(None, "lrqdit-equal-bits", "w4a8", rows) == 7.0
    assert bench.Bench.budget(None, "lrqdit-measured", "w4a8", rows) == 1.0
    assert bench.Bench.budget(None, "lrqdit", "w4a8", rows) is None
