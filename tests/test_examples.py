"""Every script in examples/ runs, on a tiny pipeline where it takes one, and prints what it promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# script: what it prints last, and bounds of the numbers in that
EXPECTED = {
    "quantize_module.py": (r"loaded from \S+: relative error ([\d.]+)$", [(0.001, 0.1)]),
    "quantize_pipeline.py": (r"([\d.]+) bits per .*\n\S+: the picture is ([\d.]+) dB", [(4, 16), (20, 80)]),
    "quantize_while_loading.py": (r"w4a8: .* error ([\d.]+)\nw3a8: .* error ([\d.]+)$", [(0.001, 0.2), (0.001, 0.4)]),
    "train_lora.py": (r"step 0: loss ([\d.]+)\nstep 29: loss ([\d.]+)\n.* by (\S+)$", [(0.8, 9), (0, 0.3), (0, 0)]),
    "compare_presets.py": (r"w4a8: .* error ([\d.]+), .*\nw3a8: .* error ([\d.]+),", [(0.001, 0.2), (0.001, 0.4)]),
}


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    takes_model = "[MODEL]" in (EXAMPLES / name).read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [name, *([str(tiny_pipeline_folder)] if takes_model else [])])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    pattern, bounds = EXPECTED[name]
    found = re.search(pattern, printed := capsys.readouterr().out, re.MULTILINE)
    assert found, printed
    assert all(low <= float(value) <= high for value, (low, high) in zip(found.groups(), bounds, strict=True)), printed
