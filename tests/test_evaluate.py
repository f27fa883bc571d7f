import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lrqdit.errors import ModelError
from lrqdit.evaluation import metrics as evaluate
from lrqdit.evaluation import pages
from lrqdit.integrations.generation import Sample


def make_sample(seed: int = 0, noise: float = 0.0, size: int = 32) -> Sample:
    """A random picture, with noise of the given standard deviation in units of 255."""
    base = np.random.default_rng(seed).integers(40, 200, (size, size, 3)).astype(np.float64)
    base += np.random.default_rng(seed + 1000).normal(0, noise * 255 + 1e-9, base.shape)
    picture = Image.fromarray(base.clip(0, 255).round().astype(np.uint8))
    latents = torch.arange(16.0).reshape(1, 1, 4, 4) + noise
    return Sample("a prompt", seed, (picture,), latents)


def test_psnr_follows_its_equation():
    a, b = make_sample(), make_sample(noise=0.05)
    x, y = (np.asarray(s.picture, dtype=np.float64) / 255 for s in (a, b))
    assert evaluate.psnr(a, b) == pytest.approx(-10 * math.log10(((x - y) ** 2).mean()), rel=1e-4)


def test_equal_pictures_give_the_best_finite_values():
    a = make_sample()
    assert evaluate.psnr(a, a) == evaluate.PSNR_OF_EQUAL_PICTURES
    assert evaluate.ssim(a, a) == pytest.approx(1.0)
    assert evaluate.latent_error(a, a) == 0.0


@pytest.mark.parametrize("metric, sign", [("psnr", -1), ("ssim", -1), ("latent_error", 1)])
def test_metrics_get_worse_with_noise(metric, sign):
    function = evaluate.METRICS[metric]
    values = [function(make_sample(), make_sample(noise=noise)) for noise in (0.01, 0.05, 0.2)]
    assert [sign * v for v in values] == sorted(sign * v for v in values)


def test_latent_error_follows_its_equation():
    a = make_sample()
    b = Sample(a.prompt, a.seed, a.frames, a.latents * 1.25)
    assert evaluate.latent_error(a, b) == pytest.approx(0.25)


def test_lpips_absence_is_stated_and_nothing_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads weights"))
    results = evaluate.compare([make_sample()], [make_sample(noise=0.1)])
    assert results["metrics"]["lpips"] is None
    assert "not installed" in results["notes"]["lpips"] or "not downloaded" in results["notes"]["lpips"]


def test_damaged_lpips_weights_are_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "not downloaded" in evaluate.missing_for_lpips()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / evaluate._LPIPS_BACKBONE).write_bytes(b"no weights")
    assert "damaged" in evaluate.missing_for_lpips()


def test_compare_means_and_json():
    references = [make_sample(seed) for seed in range(3)]
    candidates = [make_sample(seed, noise=0.02 * (seed + 1)) for seed in range(3)]
    results = evaluate.compare(references, candidates)
    assert [p["seed"] for p in results["pictures"]] == [0, 1, 2]
    assert results["metrics"]["psnr"] == pytest.approx(np.mean([p["psnr"] for p in results["pictures"]]))
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_nan_latents_become_null():
    broken = Sample("p", 0, make_sample().frames, torch.full((1, 1, 4, 4), torch.nan))
    results = evaluate.compare([make_sample()], [broken])
    assert results["metrics"]["latent_error"] is None


def test_pictures_of_other_sizes_are_refused():
    with pytest.raises(ModelError, match="two models of one kind"):
        evaluate.compare([make_sample()], [make_sample(size=48)])
    with pytest.raises(ModelError, match="two models of one kind"):
        evaluate.compare([make_sample()], [])


def test_a_video_counts_as_its_frames():
    a, b = make_sample(0), make_sample(1)
    video = Sample("p", 0, a.frames + b.frames, a.latents)
    half = Sample("p", 0, a.frames + make_sample(1, noise=0.1).frames, a.latents)
    assert evaluate.psnr(video, half) == pytest.approx(evaluate.psnr(b, make_sample(1, noise=0.1)) + 10 * math.log10(2))


@pytest.mark.parametrize("size, cell, expected", [(64, 192, 192), (64, 200, 192), (32, 192, 192), (512, 192, 192)])
def test_picture_grid_size_and_cells(size, cell, expected):
    red = Image.new("RGB", (size, size), (255, 0, 0))
    grid = pages.picture_grid([("original", [red] * 3), ("w4a8", [red] * 3)], ["a", "b", "c"], cell)
    assert (np.asarray(grid) == (255, 0, 0)).all(axis=-1).sum() == 6 * expected**2
    assert grid.width > 3 * cell and grid.height > 2 * cell


def test_picture_grid_labels_are_drawn():
    white = Image.new("RGB", (64, 64), "white")
    bare = pages.picture_grid([("", [white])], [""])
    labelled = pages.picture_grid([("original", [white])], ["a very long prompt that has to be wrapped to be read"])
    assert labelled.width > bare.width and labelled.height > bare.height
    assert (np.asarray(labelled) < 128).sum() > 200


def test_html_page_is_self_contained_and_escaped():
    page = pages.html_page(
        "<b>", [{"a": "<script>", "b_c": 1.23456}, {"a": None, "b_c": 2}], Image.new("RGB", (8, 8)), ["x & y"]
    )
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page and "x &amp; y" in page
    assert "<th>a</th><th>b c</th>" in page and "<td>1.235</td>" in page and "<td>-</td>" in page
    assert "data:image/png;base64," in page and "http" not in page
