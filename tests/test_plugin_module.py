"""Test `imagewam_cli.plugin`, the one module for plugin authors, which imports torch only for names that need it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from imagewam_cli import plugin

ROOT = Path(plugin.__file__).parents[1]


def test_editor_entries_need_no_torch() -> None:
    code = (
        "import sys; from imagewam_cli.registry import Registry; found = list(Registry.installed().editors);"
        "assert found; heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["plugins", "examples/imagewam_plugin_template/imagewam_template"])
def test_plugins_import_only_the_public_module(folder: str) -> None:
    """The training code of first-party plugins may also use the expert, the simulator and atomic writes."""
    allowed = ("imagewam_cli.plugin", "imagewam_cli.expert.", "imagewam_cli.sim.tabletop.", "imagewam_cli.files")
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("imagewam_cli"):
                assert str(node.module).startswith(allowed), f"{path}: {node.module}"
