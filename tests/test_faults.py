"""What is at fault with the native library or a variable is told by doctor and by the first use, never by an import."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lrqdit
from lrqdit import native
from lrqdit.errors import KernelError

SCRIPT = """
import sys
import lrqdit
lrqdit.__path__.insert(0, sys.argv[1])  # where the library is looked for first
import torch
from lrqdit.app import doctor
from lrqdit.kernels import ops
from lrqdit.numerics.codebook import fit
from lrqdit.numerics.packing import pack
from lrqdit.packed.dummy import random_layer

print("doctor:", *doctor.describe(), sep="\\n")
x, weight = torch.ones(3, 64), torch.ones(16, 64)
uses = {
    "forward": lambda: random_layer(64, 16, 4, 8)(x),
    "weight-only": lambda: random_layer(64, 16, 4, 16)(x),
    "operator": lambda: ops.quantize_tokens(x, None, None, "none", [], None, None, None, 8, 1.0),
    "pack": lambda: pack(torch.zeros(16, 64, dtype=torch.uint8), 4),
    "fit": lambda: fit(weight, 4),
    "attention": lambda: lrqdit.attention.start(),
}
for name, use in uses.items():
    try:
        use()
        print(f"{name}: ran")
    except lrqdit.LrqditError as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, str]:
    """What the script prints, by what is at fault; all processes run at once."""
    folder = tmp_path_factory.mktemp("libraries")
    for name in ("good", "truncated", "other"):
        (folder / name).mkdir()
    cases = {
        "nonsense": ("good", {"LRQDIT_KERNELS": "nonsense"}),
        "others": ("good", {"LRQDIT_ATTENTION": "flash", "LRQDIT_GPU_KERNELS": "cuda"}),
    }
    if (library := native.find_library()) is not None:
        (folder / "truncated" / native.LIBRARY_NAME).write_bytes(library.read_bytes()[:100_000])
        cases |= {"truncated": ("truncated", {}), "advice": ("truncated", {"LRQDIT_KERNELS": "reference"})}
    if compiler := shutil.which("cc"):
        source = "".join(f"int {name}(void) {{ return 99; }}\n" for name in native._FUNCTIONS)
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", folder / "other" / native.LIBRARY_NAME]
        subprocess.run(command, input=source, text=True, check=True)
        cases["version"] = ("other", {})
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LRQDIT_")}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lrqdit.__file__).parents[1])}
    processes = {}
    for case, (name, variables) in cases.items():
        command = [sys.executable, "-c", SCRIPT, str(folder / name)]
        processes[case] = subprocess.Popen(command, env=clean | variables, stdout=-1, stderr=-1, text=True)
    results = {case: (*process.communicate(timeout=300), process.returncode) for case, process in processes.items()}
    assert all(status == 0 for *_, status in results.values()), results
    return {case: output for case, (output, *_) in results.items()}


ADVICE = "reinstall lrqdit, or set LRQDIT_KERNELS=reference to run on torch, slower"
FAULTS = {
    "truncated": rf"\S+ cannot be loaded \(the file is truncated\); {ADVICE}",
    "version": rf"\S+ has interface version 99, this package needs \d+; {ADVICE}",
    "nonsense": "LRQDIT_KERNELS=nonsense: unknown instruction set nonsense; set reference, .*, or unset it",
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_raised_by_the_first_use(outputs, case):
    if case not in outputs or (case == "nonsense" and native.find_library() is None):
        pytest.skip("no library to damage, or no compiler")
    fault, lines = FAULTS[case], outputs[case].splitlines()
    assert any(re.fullmatch(rf"CPU kernels: none \({fault}\)", line) for line in lines)
    assert any(re.fullmatch(rf"CPU attention: torch \({fault}\)", line) for line in lines)
    for use in ("forward", "weight-only", "operator", "pack", "fit"):
        assert any(re.fullmatch(f"{use}: KernelError: {fault}", line) for line in lines), lines
    assert "attention: ran" in lines  # a model may be loaded


def test_the_advice_helps(outputs):
    if "advice" not in outputs:
        pytest.skip("no library to damage")
    assert "CPU kernels: torch reference (LRQDIT_KERNELS=reference)" in outputs["advice"]
    assert "Error" not in outputs["advice"] and "forward: ran" in outputs["advice"]


def test_misspelt_choices_of_attention_and_gpu_kernels(outputs):
    lines, advice = outputs["others"].splitlines(), "set one of them, or unset it"
    attention = f"LRQDIT_ATTENTION='flash' is not one of native, torch; {advice}"
    assert {f"CPU attention: {attention}", f"attention: ConfigError: {attention}", "forward: ran"} < {*lines}
    assert f"GPU kernels: LRQDIT_GPU_KERNELS='cuda' is not one of triton, reference; {advice}" in lines


def test_a_choice_for_gpus_is_not_one_for_the_cpu(monkeypatch):
    monkeypatch.setenv("LRQDIT_KERNELS", "triton")
    with pytest.raises(KernelError, match="for the CPU; unset it and set LRQDIT_GPU_KERNELS=triton"):
        native._start()
