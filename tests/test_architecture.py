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


# torch functions that make a tensor of the default dtype, or of one that depends on their arguments, if none is given
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "hamming_window", "hann_window",
    "linspace", "logspace", "normal", "ones", "rand", "randn", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
FACTORY_METHODS = {"new_tensor"}  # new_zeros and the like take the dtype of their tensor


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_tensor_has_the_default_dtype(name):
    """The default is the user's (torch.set_default_dtype): what is stored and what kernels read must not follow it."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        function, where = node.func.attr, f"{name}:{node.lineno}: {ast.unparse(node)}"
        is_torch = ast.unparse(node.func.value) == "torch"
        if (is_torch and function in FACTORIES) or function in FACTORY_METHODS:
            assert "dtype" in {keyword.arg for keyword in node.keywords}, f"{where} needs a dtype"
        if is_torch and function == "where":  # a Python float among the values becomes the default dtype
            values = [value.value for value in node.args[1:] if isinstance(value, ast.Constant)]
            assert not any(isinstance(value, float) for value in values), f"{where}: use masked_fill"
