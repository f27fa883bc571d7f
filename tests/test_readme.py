"""The README's code, run as it stands there."""

import re
import warnings
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import lrqdit
from lrqdit.app.demo import find_model
from lrqdit.errors import ModelError

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CODE = re.search(r"```python\n(.*?)```", README, re.DOTALL)


def save_flux(folder: Path, dtype: torch.dtype) -> str:
    tiny.flux().to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model", ["demo", "bfloat16", "float32"])
def test_the_lines_run_as_written(model, tmp_path, monkeypatch, capsys):
    assert CODE is not None
    monkeypatch.chdir(tmp_path)
    tiny.make_flux_small(monkeypatch)
    (tmp_path / "prompts.txt").write_text("snowman\n")
    source = str(find_model()) if model == "demo" else save_flux(tmp_path / "model", getattr(torch, model))
    code = CODE[1].replace('"MODEL"', repr(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch_dtype, whose new name older diffusers do not know
        warnings.simplefilter("ignore", ResourceWarning)
        exec(code, found := {})
    assert any(isinstance(layer, lrqdit.QuantLinear) for layer in found["pipe"].transformer.modules())
    assert 4 < float(capsys.readouterr().out.split()[0]) < 8
    with Image.open(tmp_path / "lighthouse.png") as picture:
        low, high = zip(*picture.convert("RGB").getextrema(), strict=True)
    assert min(low) < max(high)


def test_a_pipeline_in_several_dtypes_says_how_to_load_it(tmp_path):
    """Without a dtype, transformers' parts come in that of their files and diffusers' in float32."""
    pipeline = DiffusionPipeline.from_pretrained(save_flux(tmp_path / "model", torch.bfloat16))
    message = r"text_encoder bfloat16, .*transformer float32.* from_pretrained\(\.\.\., torch_dtype=torch\.bfloat16\)"
    with pytest.raises(ModelError, match=message):
        lrqdit.quantize(pipeline, "w4a8", prompts=["a"], steps=2, arguments=tiny.FLUX_CALL, show_progress=False)
    pipeline.to(torch.bfloat16)
    lrqdit.quantize(pipeline, "w4a8", prompts=["a"], steps=2, arguments=tiny.FLUX_CALL, show_progress=False)
