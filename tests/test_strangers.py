"""What somebody finds who gets a quantized folder: a card, and an error that says what to do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from huggingface_hub import ModelCard

import lrqdit
from lrqdit.errors import CheckpointError
from lrqdit.packed.format import FORMAT_NAMES


@pytest.fixture(scope="module")
def quantized():
    pipeline = tiny.flux().to(torch.bfloat16)
    lrqdit.quantize(pipeline, "w4a8", is_calibrated=False, show_progress=False)
    return pipeline


def without_lrqdit(code: str) -> str:
    """What a process prints on stderr that has not imported the package."""
    code = f"import sys, diffusers, torch; {code}; assert 'lrqdit' not in sys.modules"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr


def test_without_the_import_the_error_says_what_to_do(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    message = without_lrqdit(f"diffusers.DiffusionPipeline.from_pretrained({str(tmp_path)!r})").splitlines()[-1]
    assert re.search('Unknown quantization type, got lrqdit: run "import lrqdit" first', message)
    folder = str(tmp_path / "transformer")
    message = without_lrqdit(f"diffusers.FluxTransformer2DModel.from_pretrained({folder!r})").splitlines()[-1]
    assert 'run "import lrqdit" first' in message


def test_the_patch_that_is_outlined_for_diffusers_works(quantized, tmp_path):
    """docs/UPSTREAM.md: its code loads a folder, and quantizes while loading, without the import."""
    quantized.save_pretrained(tmp_path / "out")
    text = (Path(__file__).parents[1] / "docs" / "UPSTREAM.md").read_text(encoding="utf-8")
    patch = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    tiny.flux_transformer().save_pretrained(tmp_path / "float")
    code = f"""
import sys
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
{patch}
assert "lrqdit" not in sys.modules
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "out")!r})
print([type(layer).__name__ for layer in pipe.transformer.modules()].count("QuantLinear"))
model = FluxTransformer2DModel.from_pretrained({str(tmp_path / "float")!r}, quantization_config=LRQDiTConfig("w4a8"))
print([type(layer).__name__ for layer in model.modules()].count("QuantLinear"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    count = sum(isinstance(layer, lrqdit.QuantLinear) for layer in quantized.transformer.modules())
    assert result.stdout.split() == [str(count)] * 2


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_both_names_are_read(name, quantized, tmp_path):
    quantized.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = name
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert any(isinstance(layer, lrqdit.QuantLinear) for layer in loaded.modules())


def test_a_saved_pipeline_has_a_card(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers" and "lrqdit" in card.data.tags
    size = lrqdit.measure_size(quantized.transformer)
    row = f"| transformer | `FluxTransformer2DModel` | w4a8 | {size.true_bits:.2f} | {size.parameters:,} | "
    assert row + f"{size.size_bytes:,} |" in card.text
    # its code runs
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code is not None and "dtype=torch.bfloat16" in code[1]
    with pytest.warns(FutureWarning, match="torch_dtype"):
        exec(code[1].replace("this folder, or its hub id", str(tmp_path)), found := {})
    assert isinstance(found["pipe"], diffusers.FluxPipeline)
    assert any(isinstance(layer, lrqdit.QuantLinear) for layer in found["pipe"].transformer.modules())
    # what is loaded writes one, too, and nothing is written over
    found["pipe"].save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (tmp_path / "README.md").read_text()
    (tmp_path / "again" / "README.md").write_text("mine")
    found["pipe"].save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "mine"


def test_a_saved_model_has_a_card(quantized, tmp_path):
    quantized.transformer.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "FluxTransformer2DModel.from_pretrained(" in card.text and "| model |" in card.text


def test_other_models_are_saved_as_ever(tmp_path):
    tiny.flux().save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.rglob("README.md")) and list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("is_pipeline", [True, False])
def test_pickles_are_refused_before_anything_is_written(is_pipeline, quantized, tmp_path):
    target = quantized if is_pipeline else quantized.transformer
    with pytest.raises(CheckpointError, match="leave out safe_serialization=False"):
        target.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_a_mistyped_component_is_warned_of(tmp_path, caplog):
    tiny.flux().save_pretrained(tmp_path)
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"transformr": lrqdit.LRQDiTConfig("w4a8")})
    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    logging.enable_propagation()
    logging.set_verbosity_warning()  # the command line's tests have it at errors alone
    try:
        diffusers.FluxPipeline.from_pretrained(tmp_path, quantization_config=config)
    finally:
        logging.disable_propagation()
        logging.set_verbosity(before)
    assert "{'transformr'} will be ignored" in caplog.text
