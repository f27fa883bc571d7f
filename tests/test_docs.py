import re

import diffusers
import pytest
import torch
from tiny_transformers import build_model

import lrqdit
from benchmarks import chart, models_table
from benchmarks import update_readme as script

DOCUMENTS = script.documents()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(path):
    is_current = path.read_text(encoding="utf-8") == DOCUMENTS[path]
    assert is_current, f"{path} is out of date; run python -m benchmarks.update_readme"


@pytest.mark.parametrize("name", script.CHARTS)
def test_charts_show_these_results(name):
    text = (script.ROOT / name).read_text(encoding="utf-8")
    expected = chart.fingerprint(script.chart_rows(script.CHARTS[name]))
    assert expected in text, f"{name} was drawn from other results; run python -m benchmarks.update_readme"


def test_every_speed_names_its_machine():
    for name in ("linear", "step", "attention", "quantize"):
        assert script.read(name)["machine"]["processor"]


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
def test_table_of_models_is_up_to_date():
    text = models_table.DOCUMENT.read_text(encoding="utf-8")
    if f"-->{diffusers.__version__}<!--" not in text:
        pytest.skip(f"docs/MODELS.md was made with another diffusers than {diffusers.__version__}")
    assert text == models_table.document(), "docs/MODELS.md is out of date; run python -m benchmarks.models_table"


@pytest.mark.parametrize("preset", models_table.PRESETS)
def test_true_bits_of_the_table(preset):
    model = build_model("QwenImageTransformer2DModel").to(torch.bfloat16)
    expected = models_table.true_bits(model, preset)
    assert lrqdit.quantize(model, preset, is_calibrated=False, show_progress=False).size.true_bits == expected


def test_a_missing_marker_is_an_error():
    assert script.fill("a <!-- x -->old<!-- /x --> b", "x", "new") == "a <!-- x -->new<!-- /x --> b"
    with pytest.raises(ValueError, match="stands 0 times"):
        script.fill("nothing to fill", "x", "new")


def test_labels_of_a_chart_keep_apart():
    places = chart._spread([0.0, 0.1, 0.15, 3.0], 0.5, -10.0, 10.0)
    assert all(b - a >= 0.5 - 1e-9 for a, b in zip(places, places[1:], strict=False)) and places[3] == 3.0
    assert chart._spread([0.0, 0.1], 0.5, 1.0, 10.0) == [1.0, 1.5]
    assert chart._spread([0.0, 0.1], 0.5, -10.0, 0.0) == [-0.5, 0.0]


def test_a_chart_has_a_panel_for_each_setting(tmp_path):
    rows = [
        {"preset": preset, "bits": bits, "true_bits": 4.0, "image_mse": 1e-3, "image_mse_interval": [9e-4, 2e-3]}
        for bits in ("w4a8", "w3a8")
        for preset in ("lrqdit", "rtn")
    ]
    chart.draw(rows, tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert chart.fingerprint(rows) in text and len(re.findall(r'id="axes_\d+"', text)) == 2


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/RESULTS.md",
        "docs/ARCHITECTURE.md",
        "docs/GLOSSARY.md",
        "docs/MODELS.md",
    ],
)
def test_links_lead_to_files(name):
    path = script.ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing
