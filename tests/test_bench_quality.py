import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline

import lrqdit

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("bench_quality", FOLDER / "bench_quality.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


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
    assert not names & set(bench.demo.CALIBRATION_PROMPTS)
    assert not set(bench.demo.SHOWN_PROMPTS) & set(bench.demo.CALIBRATION_PROMPTS)
    trained = {entry["name"] for entry in entries if entry["is_trained"]}
    assert set(bench.demo.CALIBRATION_PROMPTS) <= trained


def test_every_method_runs_on_a_layer(bench):
    rows = bench.run_layers(("w4a4",), 64, 24)
    assert {row["preset"] for row in rows} == set(bench.PRESETS) - {bench.EQUAL_BITS}
    error = {(row["input"], row["preset"]): row["error"] for row in rows}
    assert error["offset", "lrqdit"] < 0.1 < error["offset", "quarot"]


def test_equal_bits(bench):
    """The budget is the true bits of the paper's row, or of the paper's method itself where there is no row."""
    pipeline = build_tiny_pipeline()
    calibration = lrqdit.observe(pipeline, prompts=["a fox", "a boat"], steps=2, show_progress=False)
    measured = bench.quantize(build_tiny_pipeline(), "lrq-dit-paper", "w4a8", calibration)
    found = bench.quantize(build_tiny_pipeline(), bench.EQUAL_BITS, "w4a8", calibration, measured)
    assert 9.5 < found <= measured  # 8 bits everywhere, and more is not to be had
    rows = [{"preset": "lrqdit", "bits": "w4a8", "true_bits": 1.0}]
    rows.append({"preset": "lrq-dit-paper", "bits": "w4a8", "true_bits": 7.0})
    assert bench.Bench.paper_bits(None, "w4a8", rows) == 7.0
