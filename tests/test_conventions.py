"""Conventions of the repository that no linter checks."""

from __future__ import annotations

import ast
import configparser
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT


def test_tests_share_code_through_support_only() -> None:
    """A test module that others import could not be changed or run on its own."""
    foreign = re.compile(r"^ *(?:from|import) tests\.(?!support\b)", re.MULTILINE)
    files = (ROOT / "tests").rglob("*.py")
    assert [str(path.relative_to(ROOT)) for path in files if foreign.search(path.read_text(encoding="utf-8"))] == []


def test_every_first_party_plugin_is_packaged_and_kept_out_of_the_core() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    points = set(project["project"]["entry-points"]["imagewam"].values()) - {"imagewam_cli.builtin"}
    wheel = {Path(path).name for path in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    layers = configparser.ConfigParser()
    layers.read(ROOT / ".importlinter", encoding="utf-8")
    folders = {path.name for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").exists()}
    assert points == folders
    assert wheel == {"imagewam_cli", *folders}
    assert set(layers["importlinter"]["root_packages"].split()) == {"imagewam_cli", *folders}
    assert set(layers["importlinter:contract:core"]["forbidden_modules"].split()) == folders


def test_no_conflict_of_a_merge_is_left() -> None:
    marks = re.compile(r"^(?:<{7}|>{7})( |$)", re.MULTILINE)
    folders = ("docs", "imagewam_cli", "plugins", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in (".md", ".py")]
    files += ROOT.glob("*.md")
    assert [str(path.relative_to(ROOT)) for path in files if marks.search(path.read_text(encoding="utf-8"))] == []


def test_every_text_file_is_read_and_written_as_utf_8() -> None:
    """Without an encoding, Python takes that of the locale, which differs between machines."""
    folders = ("imagewam_cli", "plugins", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in _texts_without_encoding(path)]
    assert found == []


def _texts_without_encoding(path: Path) -> Iterator[int]:
    """Yield the lines of a module that open a file or a pipe as text without naming its encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and set(str(a.value)) <= set("rwxabt+")]
        of_text = not any("b" in str(mode) for mode in modes) and ast.unparse(node.func) != "av.open"
        opens = name in ("open", "fdopen") and of_text and (isinstance(node.func, ast.Name) or bool(modes))
        whole = name in ("read_text", "write_text") and ast.unparse(node.func) != "formatter.write_text"
        pipes = any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords)
        if opens or whole or (pipes and name in ("run", "Popen", "check_output")):
            yield node.lineno
