"""Use the plugin template as an author would: installed in a separate environment, from the command line."""

from __future__ import annotations

import ast
import os
import shutil
import site
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from diffusers import WanTransformer3DModel

from imagewam_cli.kvcache.storage.manifests import read_manifest
from imagewam_cli.testing.checks import CHECKS
from tests.support.paths import EXAMPLES

TEMPLATE = EXAMPLES / "imagewam_plugin_template"
EDITOR = "lucy-edit"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`python(*arguments)` returns the stdout of a new environment's interpreter.

    It sees the packages of this environment; the template is installed only there.
    """
    root = tmp_path_factory.mktemp("plugin")
    venv.create(root / "venv", with_pip=False)
    (packages,) = (root / "venv").glob("lib/python*/site-packages")
    # A plain path entry would ignore .pth files, and imagewam itself may be installed through one.
    lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    (packages / "outer.pth").write_text("\n".join(lines) + "\n")
    interpreter = root / "venv" / "bin" / "python"

    def run(*arguments: object, cwd: Path = root) -> str:
        result = subprocess.run(
            [interpreter, *map(str, arguments)],
            cwd=cwd,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result.stdout

    source = shutil.copytree(TEMPLATE, root / "template")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", "--quiet", *offline, source)
    return run


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}


def test_the_installed_template_is_listed_and_adds_its_editor(python: Run) -> None:
    listed = python("-m", "imagewam_cli", "plugins", "--hook", "editors")
    assert f"template  (imagewam-template 0.1.0)\n  editor: {EDITOR}\n" in listed


@pytest.mark.slow
def test_the_template_editor_caches_a_dataset(python: Run, tabletop: Path, tmp_path: Path) -> None:
    python("-m", "imagewam_template.tiny", tmp_path / "tiny")
    cache = ("cache", "--editor", EDITOR, "--weights", tmp_path / "tiny", "--out", tmp_path / "cache")
    python("-m", "imagewam_cli", *cache, "--dataset", tabletop, "--stride", "20", "--image-size", "64x64")
    manifest = read_manifest(tmp_path / "cache")
    assert manifest.fingerprint["editor"] == EDITOR
    assert manifest.rows == manifest.total_rows > 0
    assert [layer.name for layer in manifest.spec.layers] == ["blocks.0.attn1", "blocks.1.attn1"]


@pytest.mark.slow
def test_the_tests_of_the_template_pass(python: Run, tmp_path: Path) -> None:
    tests = shutil.copytree(TEMPLATE / "tests", tmp_path / "tests")
    report = tmp_path / "report.xml"
    # Exit status 0 means that tests ran and none failed.
    python("-m", "pytest", "-q", "--rootdir", tmp_path, f"--junitxml={report}", tests, cwd=tmp_path)
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = {case.attrib["name"]: one.attrib["message"] for case in cases for one in case.iter("skipped")}
    checks = {f"test_promise[denoise-{check.__name__}]" for check in CHECKS}
    assert checks < {case.attrib["name"] for case in cases}  # the template has tests of its own too
    assert skipped == {
        "test_promise[denoise-prefix_mode_has_no_target]": "the mode is denoise",
        "test_promise[denoise-graph_equals_encode]": "it has no graph: exports of its policies need the live editor",
    }


def test_the_entry_describes_the_released_model(python: Run) -> None:
    code = "from imagewam_template import imagewam_editors; print(imagewam_editors()[0].{})"
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(ast.literal_eval(python("-c", code.format("config"))))
    assert sum(p.numel() for p in model.parameters()) == int(python("-c", code.format("parameters")))


def test_the_plugin_has_at_most_eighty_lines_of_code() -> None:
    assert sum(code_lines(TEMPLATE / "imagewam_template" / name) for name in ("__init__.py", "editor.py")) <= 80


def code_lines(path: Path) -> int:
    """Count lines of code, without empty lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    strings = [
        range(node.lineno, (node.end_lineno or 0) + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    lines = enumerate(text.splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and not any(i in string for string in strings)
        for i, line in lines
    )
