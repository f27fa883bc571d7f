import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lrqdit
from lrqdit import native
from lrqdit.app import OPTIONAL, cli, demo, main
from lrqdit.errors import ModelError

ROOT = Path(__file__).parents[1]
BASE = {"numpy", "safetensors", "torch"}
MODULES = {"huggingface-hub": "huggingface_hub", "pillow": "PIL"}  # where a distribution's module has another name
MISSING = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name in {}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing)
"""

needs_toml = pytest.mark.skipif(importlib.util.find_spec("tomllib") is None, reason="tomllib came with Python 3.11")


def read_project() -> dict:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def modules_of(requirements: list[str]) -> set[str]:
    names = {Requirement(line).name for line in requirements}
    return {MODULES.get(name, name) for name in names} - {"lrqdit"}


def run(code: str, missing: Sequence[str]) -> subprocess.CompletedProcess:
    """Run in a fresh process where some modules are not installed."""
    paths = [str(Path(folder).parent) for folder in sys.modules["lrqdit"].__path__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LRQDIT_KERNELS": ""}
    command = [sys.executable, "-c", MISSING.format(missing) + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@needs_toml
def test_the_base_is_three_packages_and_the_extras_bring_the_rest():
    project = read_project()
    extras = project["optional-dependencies"]
    assert modules_of(project["dependencies"]) == BASE
    assert modules_of([*extras["diffusers"], *extras["app"]]) == set(OPTIONAL)
    assert extras["all"] == ["lrqdit[app]"] and "lrqdit[diffusers]" in extras["app"]


def test_every_import_is_declared():
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    assert found - set(sys.stdlib_module_names) - BASE - set(OPTIONAL) == {"lrqdit", "triton"}  # torch brings Triton


@needs_toml
def test_every_development_tool_is_pinned():
    loose = [line for line in read_project()["optional-dependencies"]["dev"] if "==" not in line.split(";")[0]]
    assert loose == ["hypothesis; python_version < '3.11'", "lrqdit[all]"]


@pytest.mark.skipif(native.LIBRARY is None or sys.platform != "linux", reason="needs Linux and the native library")
def test_checkpoints_run_on_the_base_alone_and_on_one_openmp_runtime():
    code = f"import runpy; runpy.run_path({str(ROOT / 'scripts' / 'check_installed.py')!r}, run_name='__main__')"
    done = run(code, [*OPTIONAL, "triton"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OpenMP runtimes: /" in done.stdout


def test_quantizing_needs_no_triton():
    done = run("import lrqdit.api, lrqdit.app.demo, lrqdit.app.doctor, lrqdit.app.speed", ["triton"])
    assert done.returncode == 0, done.stderr


def test_the_command_line_says_what_is_missing():
    done = run("from lrqdit.app import main; sys.argv = ['lrqdit', 'doctor']; main()", ["typer"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == 'error: typer is not installed; pip install ".[all]" in a checkout brings it\n'


def test_the_console_script_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lrqdit", "--version"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and capsys.readouterr().out == f"lrqdit {lrqdit.__version__}\n"


def test_other_missing_modules_are_shown_as_bugs(monkeypatch):
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'diffusers.old'", name="diffusers.old")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ModuleNotFoundError):
        main()


def test_the_demo_without_its_model(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed: pip install \./demo"):
        demo.run_demo(tmp_path / "out", show_progress=False)


def test_the_demo_finds_its_model(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    assert (demo.find_model() / "model_index.json").is_file()
