"""The public names: found lazily, and the same in the stub that type checkers read."""

import ast
from pathlib import Path

import pytest

import lrqdit

STUB = ast.parse(Path(lrqdit.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))


def test_the_stub_names_what_is_public():
    imported = {alias.asname or alias.name for n in STUB.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert imported == set(lrqdit.__all__)
    for node in STUB.body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            module = lrqdit._PUBLIC[alias.asname or alias.name]
            assert module in (node.module, f"{node.module}.{alias.name}")


@pytest.mark.parametrize("name", lrqdit.__all__)
def test_every_public_name_is_there(name):
    assert getattr(lrqdit, name) is not None and name in dir(lrqdit)


def test_no_other_name():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        lrqdit.quantise  # noqa: B018
