"""Test that the modules of the runtime become one file that stands alone."""

from __future__ import annotations

import ast
from pathlib import Path

from imagewam_cli import runtime
from imagewam_cli.export.runtime_script import MODULES, runtime_script


def test_every_module_of_the_runtime_is_in_the_file() -> None:
    modules = {path.stem for path in Path(runtime.__path__[0]).glob("*.py")} - {"__init__"}
    assert {module.__name__.rpartition(".")[2] for module in MODULES} == modules


def test_the_file_imports_neither_torch_nor_imagewam() -> None:
    tree = ast.parse(runtime_script())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.startswith(("torch", "imagewam"))}


def test_no_name_is_defined_twice() -> None:
    """A second definition would replace the first one silently."""
    defined: list[str] = []
    for node in ast.parse(runtime_script()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.Assign):
            defined += [target.id for target in node.targets if isinstance(target, ast.Name)]
    assert sorted(set(defined)) == sorted(defined)
