"""Test what `import imagewam_cli` exports: the type checker sees the same names, and torch is not imported."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import imagewam_cli
from imagewam_cli import plugin

FACADES = [imagewam_cli, plugin]


@pytest.mark.parametrize("module", FACADES, ids=lambda module: module.__name__)
def test_every_export_exists_and_is_declared_to_the_type_checker(module: Any) -> None:
    exports = vars(module)["_EXPORTS"]
    declared = {
        (node.module, name.name)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for name in node.names
        if name.asname == name.name
    }
    assert declared == {(origin, name) for origin, names in exports.items() for name in names}
    for origin, name in declared:
        assert getattr(module, name) is getattr(importlib.import_module(str(origin)), name)
        assert name in dir(module)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'imagewam_cli' has no attribute 'load_robot'"):
        _ = imagewam_cli.load_robot  # type: ignore[attr-defined]


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, imagewam_cli, imagewam_cli.plugin;"
        "print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_export_has_the_name_of_a_submodule() -> None:
    """Importing a submodule would replace an export of the same name."""
    modules = {path.stem for path in Path(imagewam_cli.__file__).parent.iterdir()}
    exported = {name for names in vars(imagewam_cli)["_EXPORTS"].values() for name in names}
    assert not exported & modules
