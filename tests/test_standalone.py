"""A quantized module runs without diffusers; diffusers learns of the format whichever is imported first."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import lrqdit

BLOCKED = (
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "huggingface_hub",
    "tqdm",
    "rich",
    "typer",
    "PIL",
    "benchmarks",
)
SCRIPT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import torch, lrqdit
model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.GELU(), torch.nn.Linear(32, 24))
lrqdit.load_checkpoint(model, sys.argv[1])
assert isinstance(model[0], lrqdit.QuantLinear)
with torch.no_grad():
    y = model(torch.load(sys.argv[2], weights_only=True))
torch.save(y, sys.argv[3])
print(sorted(name for name in BLOCKED if name in sys.modules))
"""


def run(script, *arguments):
    paths = [str(Path(lrqdit.__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_a_quantized_module_runs_without_diffusers_and_transformers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 24))
    x = torch.randn(5, 48)
    lrqdit.quantize(model, "w4a8", forward_loop=lambda m: m(x), show_progress=False)
    lrqdit.save_checkpoint(model, tmp_path / "model")
    torch.save(x, tmp_path / "x")
    found = run(f"BLOCKED = {BLOCKED!r}\n{SCRIPT}", tmp_path / "model", tmp_path / "x", tmp_path / "y")
    assert found == "[]"
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y", weights_only=True), model(x))


def test_import_brings_nothing():
    heavy = "[name for name in ('torch', 'numpy', 'diffusers', 'transformers') if name in sys.modules]"
    assert run(f"import sys, lrqdit\nprint({heavy})") == "[]"


def test_diffusers_knows_the_format_whoever_is_imported_first():
    known = "print('lrqdit' in AUTO_QUANTIZER_MAPPING, 'lrqdit' in AUTO_QUANTIZATION_CONFIG_MAPPING)"
    mapping = "from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING"
    for script in (
        f"import lrqdit\n{mapping}",
        f"{mapping}\nimport lrqdit",
        f"import lrqdit.integrations.diffusers\n{mapping}",
    ):
        assert run(f"{script}\n{known}") == "True True", script
