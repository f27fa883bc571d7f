import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from typer.testing import CliRunner

import lrqdit
import lrqdit.calibration.observer
from lrqdit.app import demo, speed
from lrqdit.app.cli import app
from lrqdit.calibration.runs import locked
from lrqdit.fitting import job
from lrqdit.integrations import generation, pipelines
from lrqdit.packed import files

FAST = ["--set", "rotation=none", "--set", "smoothing=never", "--steps", "2"]

RESULT_KEYS = {"preset", "true_bits", "bytes_before", "bytes_after", "psnr", "ssim", "latent_error", "seconds"}


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `lrqdit` with these arguments."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def succeed(*arguments: object) -> str:
    status, stdout, stderr = run(*arguments)
    assert status == 0, stderr
    return stdout


def fail(*arguments: object) -> str:
    """The one line of the error."""
    status, stdout, stderr = run(*arguments)
    assert status == 2 and stdout == ""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr
    return lines[0]


def picture_size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("# two of them\na cat\n\n  a dog  \n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def quantized(tiny_pipeline_folder, prompts, tmp_path_factory) -> tuple[Path, dict]:
    """A folder written by `lrqdit quantize --json`, and what that printed."""
    out = tmp_path_factory.mktemp("quantized") / "w4a4"
    command = ["quantize", tiny_pipeline_folder, "--bits", "w4a4", "--prompts", prompts, "--out", out, "--steps", 2]
    return out, json.loads(succeed(*command, "--json"))


def test_quantize_summary(quantized, tiny_pipeline_folder):
    out, summary = quantized
    assert summary["preset"] == "w4a4" and summary["folder"] == str(out)
    assert (
        summary["bytes_before"]
        == (tiny_pipeline_folder / "transformer").joinpath("diffusion_pytorch_model.safetensors").stat().st_size
    )
    assert summary["bytes_after"] < summary["bytes_before"]
    assert 4 < summary["true_bits"] < 32
    assert sum(summary["choices"].values()) == 20
    saved = json.loads((out / "lrqdit_report.json").read_text())
    assert saved["size"]["true_bits"] == summary["true_bits"]
    assert not out.with_name("w4a4.partial").exists() and not out.with_name("w4a4.writing").exists()


def test_folder_loads_with_diffusers_and_has_the_stated_bits(quantized):
    out, summary = quantized
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert lrqdit.measure_size(pipeline.transformer).true_bits == pytest.approx(summary["true_bits"])


def test_inspect(quantized):
    out, summary = quantized
    description = json.loads(succeed("inspect", out, "--json"))
    assert description["totals"]["true_bits"] == pytest.approx(summary["true_bits"])
    assert description["totals"]["claimed_true_bits"] == pytest.approx(summary["true_bits"])
    assert description["totals"]["file_bytes"] == summary["bytes_after"] > description["totals"]["tensor_bytes"]
    layers = {layer["name"]: layer for layer in description["layers"]}
    key = layers["transformer_blocks.0.attn1.to_k"]
    assert key["input_from"] == "transformer_blocks.0.attn1.to_q" and key["rms"] > 0 and key["gain"] is not None
    text = succeed("inspect", out)
    assert "transformer_blocks.1.ff.net.2" in text and f"{summary['true_bits']:.3f} bits" in text
    single = json.loads(succeed("inspect", out / "transformer", "--json"))
    assert single["totals"]["parameters"] == description["totals"]["parameters"]


def test_generate_is_reproducible_and_depends_on_the_seed(quantized, tmp_path):
    out, _ = quantized
    files = [tmp_path / "new folder" / f"{name}.png" for name in "abc"]
    for file, seed in zip(files, (3, 3, 4), strict=True):
        assert succeed("generate", out, "a cat", "--out", file, "--steps", 2, "--seed", seed).strip() == str(file)
    assert picture_size(files[0]) == (32, 32)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_a_picture_does_not_depend_on_the_others(tiny_pipeline_folder):
    pipeline = pipelines.load_pipeline(tiny_pipeline_folder, device="cpu")
    options = {"steps": 2, "show_progress": False}
    together = generation.generate_images(pipeline, ["a", "b"], 5, **options)
    alone = generation.generate_images(pipeline, ["b"], [6], **options)
    assert torch.equal(together[1].latents, alone[0].latents)
    assert together[1].picture.tobytes() == alone[0].picture.tobytes()
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler


def test_evaluate(quantized, tiny_pipeline_folder, prompts, tmp_path):
    out, summary = quantized
    command = ["evaluate", tiny_pipeline_folder, out, "--prompts", prompts, "--steps", 2, "--out", tmp_path]
    results = json.loads(succeed(*command, "--images", 3, "--json"))
    assert [picture["prompt"] for picture in results["pictures"]] == ["a cat", "a dog", "a cat"]
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["true_bits"]["candidate"] == pytest.approx(summary["true_bits"])
    assert results["true_bits"]["reference"] == 32
    assert 0 < results["metrics"]["latent_error"] < 2 and 0 < results["metrics"]["psnr"] < 100
    assert picture_size(tmp_path / "comparison.png")[0] > 3 * 192
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    if results["metrics"]["lpips"] is None:
        assert results["notes"]["lpips"]


def test_a_model_equals_itself(tiny_pipeline_folder, tmp_path):
    text = succeed(
        "evaluate", tiny_pipeline_folder, tiny_pipeline_folder, "--images", 1, "--steps", 2, "--out", tmp_path
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"]["psnr"] == 100 and results["metrics"]["latent_error"] == 0
    assert "psnr" in text and "lpips" in text


def test_killed_run_continues_to_the_same_bytes(tiny_pipeline_folder, prompts, tmp_path, monkeypatch):
    command = ["quantize", tiny_pipeline_folder, "--bits", "w3a8", "--prompts", prompts, *FAST, "--out"]
    succeed(*command, tmp_path / "whole")

    fitted: list[str] = []
    original = job.Job._quantize

    def killed(self, part):
        if len(fitted) == 5:
            raise KeyboardInterrupt
        fitted.append(part.names[0])
        return original(self, part)

    monkeypatch.setattr(job.Job, "_quantize", killed)
    assert run(*command, tmp_path / "killed")[0] != 0
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.partial").is_dir()

    resumed: list[str] = []

    def counted(self, part):
        resumed.append(part.names[0])
        return original(self, part)

    def forbidden(*_):
        pytest.fail("calibrates again")

    monkeypatch.setattr(job.Job, "_quantize", counted)
    monkeypatch.setattr(lrqdit.calibration.observer.Observer, "__enter__", forbidden)
    succeed(*command, tmp_path / "killed")
    assert resumed and not set(resumed) & set(fitted)
    assert not (tmp_path / "killed.partial").exists()
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file() and file.name != "lrqdit_report.json":  # that has the seconds it took
            assert file.read_bytes() == (tmp_path / "killed" / file.relative_to(tmp_path / "whole")).read_bytes(), file


def test_without_calibration_kept_tensors_get_the_dtype_of_the_files(copy_of_pipeline, tmp_path):
    DiffusionPipeline.from_pretrained(copy_of_pipeline).to(torch.float16).save_pretrained(copy_of_pipeline)
    out = tmp_path / "out"
    text = succeed("quantize", copy_of_pipeline, "--bits", "w4a16", "--no-calibration", "--out", out)
    assert "bits per parameter" in text and "J >= 1 at 0 of 20 layers" in text
    kinds = {dtype for part in ("transformer", "vae") for _, dtype, _ in files.tensor_headers(out / part)}
    assert "F16" in kinds and "F32" not in kinds
    assert len(generation.generate_images(pipelines.load_pipeline(out, device="cpu"), ["a"], steps=2)) == 1


def test_overwrite(quantized, tiny_pipeline_folder, tmp_path):
    out = Path(shutil.copytree(quantized[0], tmp_path / "out"))
    command = ["quantize", tiny_pipeline_folder, "--no-calibration", "--bits", "w2a16", "--out", out]
    assert "not empty" in fail(*command)
    succeed(*command, "--overwrite")
    assert json.loads(succeed("inspect", out, "--json"))["preset"] == "w2a16"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]
    (out / "model_index.json").unlink()
    assert "is not a pipeline folder" in fail(*command, "--overwrite")


def test_quantize_errors(tiny_pipeline_folder, quantized, prompts, tmp_path):
    def quantize(*arguments: object, model: Path | str = tiny_pipeline_folder) -> str:
        return fail("quantize", model, "--out", tmp_path / "out", *arguments)

    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    assert "weight_bits=7" in quantize("--bits", "w7a4")
    assert "not of the form" in quantize("--bits", "int4")
    assert "mode='best'" in quantize("--mode", "best")
    assert "cannot be read" in quantize("--prompts", tmp_path / "none.txt")
    assert "has no prompt" in quantize("--prompts", empty)
    assert "neither an existing folder" in quantize(model="no-such-folder")
    assert "no model_index.json" in quantize(model=tmp_path)
    assert "matches no linear layer" in quantize("--exclude", "no_such_layer", "--prompts", prompts)
    assert "not a regular expression" in quantize("--exclude", "(", "--prompts", prompts)
    assert "is not key=value" in quantize("--set", "colour=red")
    assert "is not true or false" in quantize("--set", "is_clipped=perhaps")
    assert "is not a number" in quantize("--set", "smoothing_alpha=much")
    assert "is not a whole number" in quantize("--set", "seed=1.5")
    assert "dtype='int8'" in quantize("--dtype", "int8")
    assert "is not a device" in quantize("--device", "abacus")
    assert "quantized already" in quantize(model=quantized[0])
    assert "is the model itself" in fail("quantize", quantized[0], "--out", quantized[0], "--overwrite")
    assert "is a file" in fail("quantize", tiny_pipeline_folder, "--out", empty)
    assert not (tmp_path / "out").exists()


def test_damaged_folders(copy_of_pipeline, tmp_path, edit_json):
    weights = copy_of_pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    generate = ("generate", copy_of_pipeline, "a cat", "--out", tmp_path / "x.png")
    weights.write_bytes(whole[:-10])
    assert "copy it again" in fail(*generate)
    weights.write_bytes(whole[:5])
    assert "truncated" in fail(*generate)
    weights.unlink()
    assert "error: " in fail(*generate)
    weights.write_bytes(whole)
    (copy_of_pipeline / "model_index.json").write_text("{")
    assert "not readable JSON" in fail(*generate)


def test_inspect_errors(copy_of_pipeline, quantized, tmp_path, edit_json):
    assert "not a folder" in fail("inspect", tmp_path / "none")
    assert "no model quantized by lrqdit" in fail("inspect", copy_of_pipeline)
    changed = Path(shutil.copytree(quantized[0], tmp_path / "changed")) / "transformer" / "config.json"
    values = json.loads(changed.read_text())["quantization_config"]
    edit_json(changed, quantization_config={**values, "format_version": 99})
    assert "version 99" in fail("inspect", changed.parent)
    layers = {
        name: {**layer, "weight_bits": {2: 3, 3: 4, 4: 3}.get(layer["weight_bits"], 8)}
        for name, layer in values["layers"].items()
    }
    edit_json(changed, quantization_config={**values, "layers": layers})
    assert "should be" in fail("inspect", changed.parent)


def test_generate_errors(tiny_pipeline_folder, tmp_path):
    assert "refuses its input" in fail(
        "generate", tiny_pipeline_folder, "a", "--height", 33, "--out", tmp_path / "a.png"
    )
    assert "unknown file extension" in fail(
        "generate", tiny_pipeline_folder, "a", "--steps", 2, "--out", tmp_path / "a.xyz"
    )
    # PixArt takes a single step only from a scheduler made for it, and fails with an IndexError
    assert "refuses its input" in fail("generate", tiny_pipeline_folder, "a", "--steps", 1, "--out", tmp_path / "a.png")


def test_demo(copy_of_pipeline, tmp_path):
    # in float16, as the embedded model is
    DiffusionPipeline.from_pretrained(copy_of_pipeline).to(torch.float16).save_pretrained(copy_of_pipeline)
    results = demo.run_demo(tmp_path, ("w4a16",), model_folder=copy_of_pipeline, steps=2, show_progress=False)
    assert results == json.loads((tmp_path / "results.json").read_text())
    (row,) = results["rows"]
    assert set(row) == RESULT_KEYS and row["preset"] == "w4a16"
    assert row["bytes_after"] < row["bytes_before"] and 0 < row["ssim"] <= 1
    assert picture_size(tmp_path / "comparison.png")[1] > 2 * 192
    assert (tmp_path / "w4a16" / "model_index.json").is_file()
    assert not set(demo.captions("calibration")) & set(demo.captions("shown"))


def test_demo_of_an_unknown_preset(tmp_path):
    assert "weight_bits=7" in fail("demo", "--bits", "w7a8", "--out", tmp_path)


QUICK = """
import sys
import lrqdit
heavy = {"diffusers", "numpy", "torch", "transformers"}
assert not {"typer", *heavy} & set(sys.modules)
from lrqdit.app.cli import app
try:
    app(sys.argv[1:])
finally:
    print(heavy & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["--help", "--version", "bench --help", "inspect"])
def test_what_answers_at_once_imports_nothing_heavy(command, quantized):
    folder = [str(quantized[0])] if command == "inspect" else []
    command = [sys.executable, "-c", QUICK, *command.split(), *folder]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert child.stderr == "set()\n"
    shown = {"--help": "quantize", "--version": lrqdit.__version__, "inspect": "bits per parameter"}
    assert shown.get(command[3], "pixart") in child.stdout  # older typers wrap the list of models


def test_doctor():
    assert "torch" in succeed("doctor")


def test_bench(monkeypatch, tiny_pipeline_folder):
    monkeypatch.setattr(speed, "SHAPES", ((4, 48, 96),))
    results = json.loads(succeed("bench", tiny_pipeline_folder, "--seconds", "0.01", "--device", "cpu", "--json"))
    assert [row["preset"] for row in results["memory"]] == ["w4a8", "w3a8"] and len(results["speed"]) == 1
    assert "GB packed" in succeed("bench", tiny_pipeline_folder, "--seconds", "0.01", "--device", "cpu")
    assert "neither" in fail("bench", "nowhere")


def test_one_quantize_at_a_time(tiny_pipeline_folder, prompts, tmp_path):
    """The folder is kept from the first look at the model to the last file written."""
    with locked(tmp_path / "out"):
        assert "in use by another run; wait for it to end" in fail(
            "quantize", tiny_pipeline_folder, "--prompts", prompts, *FAST, "--out", tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
