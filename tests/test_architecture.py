import ast
from pathlib import Path

import pytest

import lrqdit

SOURCE = Path(lrqdit.__file__).parent
FILES = {str(path.relative_to(SOURCE)): path for path in SOURCE.rglob("*.py")}


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
