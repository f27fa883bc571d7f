"""Does the lrqdit of this environment run? The golden checkpoints of a plain torch module against their stored outputs,
on two threads, and how many OpenMP runtimes the process then holds (Linux tells). Needs torch, numpy and safetensors.

    python scripts/check_installed.py
"""

import ctypes
import re
import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import lrqdit
from lrqdit import native

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
OPENMP = re.compile(r"/.*/(?:libgomp|libi?omp)[^/\n]*$", re.MULTILINE)


def check_golden() -> int:
    """Load and run every golden checkpoint; how many there are."""
    module = runpy.run_path(str(GOLDEN / "make.py"))["Block"]
    folders = sorted(file.parent for file in GOLDEN.glob("v*/*/expected.safetensors"))
    for folder in folders:
        expected = load_file(folder / "expected.safetensors")
        with torch.no_grad():
            found = lrqdit.load_checkpoint(module(), folder)(expected["x"])
        torch.testing.assert_close(found, expected["y"], rtol=1e-4, atol=1e-4)
    return len(folders)


def openmp_runtimes() -> list[str]:
    """The files of the OpenMP runtimes in this process, after torch and the native kernels have both used theirs."""
    a = torch.ones(512, 512)
    torch.mm(a, a)
    native.call("lrq_repeat_dots", 1000, torch.get_num_threads(), ctypes.c_int64())
    return sorted(set(OPENMP.findall(Path("/proc/self/maps").read_text())))


def main() -> None:
    torch.set_num_threads(2)
    print(f"lrqdit {lrqdit.__version__} in {Path(lrqdit.__file__).parent}, torch {torch.__version__}")
    print(native.describe()[0])
    if native.LIBRARY is None and sys.platform != "win32":
        sys.exit("failed: the native library is missing")
    print(f"golden checkpoints: {check_golden()} run as stored")
    if sys.platform == "linux":
        runtimes = openmp_runtimes()
        print(f"OpenMP runtimes: {', '.join(runtimes)}")
        if len(runtimes) != 1:
            sys.exit("failed: not exactly one OpenMP runtime; torch brings GCC's, so build the library by GCC")


if __name__ == "__main__":
    main()
