import ast
from pathlib import Path

import pytest

import lrqdit

SOURCE = Path(lrqdit.__file__).parent
FLOORS = [
    {"errors", "config", "native", "presets"},
    {"codebook", "hadamard", "rotation", "principal", "activation", "packing", "trellis"},
    {"ops", "gpu", "triton_prologue", "triton_gemm"},
    {"linear", "kernels", "attention"},
    {
        "models",
        "calibrate",
        "moments",
        "recording",
        "fit",
        "accounting",
        "checkpoint",
        "compensate",
        "allocate",
        "sensitivity",
    },
    {"diffusers_plugin", "inspection"},
    {"quantize", "pipelines", "simulate"},
    {"evaluate", "report", "demo", "speed", "doctor"},
    {"cli"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS, 1) for name in names} | {"__main__": 9}
FILES = {path.stem: path for path in SOURCE.glob("*.py") if path.stem != "__init__"}


def find_imports(path):
    """Modules of this package that a file imports, inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lrqdit.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "lrqdit":
                found |= {alias.name for alias in node.names if alias.name in FLOOR}
            elif (node.module or "").startswith("lrqdit."):
                found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_floors(name):
    assert name in FLOOR, f"{name}.py has no floor; add it to FLOORS"
    for imported in sorted(find_imports(FILES[name])):
        assert FLOOR[imported] <= FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {imported} from above"


def test_no_cycles():
    graph = {name: find_imports(path) for name, path in FILES.items()}

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        for imported in graph.get(name, ()):
            visit(imported, [*trail, name])

    for name in graph:
        visit(name, [])


def test_imports_are_found():
    assert {"packing", "rotation", "activation"} <= find_imports(FILES["ops"])
    assert FLOOR["quantize"] > FLOOR["fit"] > FLOOR["linear"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_only_safe_formats_are_read(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save", "np.load", "numpy.load", "torch.jit.load")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec")


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_says_what_it_is(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert "from __future__ import annotations" not in text
