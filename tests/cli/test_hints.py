"""Walk every hint: the options and commands that it names exist where it is printed."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from imagewam_cli.cli import app
from imagewam_cli.cli.hints import Invoked, fitting, invoked, options_in
from imagewam_cli.errors import UsageError

ROOT = Path(__file__).parents[2]
COMMAND: Any = typer.main.get_command(app.app)
EVERY = invoked(COMMAND, []).others
OWN_PROGRAMS = (
    "imagewam_cli/runtime/",
    "plugins/imagewam_tiny/train.py",
    "plugins/imagewam_tiny/edit.py",
)
"""Files and folders with a command line of their own."""


def texts() -> Iterator[tuple[str, str]]:
    """Yield "file:line" and every text in the code, with {} for the parts that are computed, except docstrings."""
    for path in (*ROOT.glob("imagewam_cli/**/*.py"), *ROOT.glob("plugins/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(OWN_PROGRAMS):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if alone:
                inner.add(id(node.value))
            if isinstance(node, ast.JoinedStr):
                parts = (str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
                yield f"{name}:{node.lineno}", "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                yield f"{name}:{node.lineno}", node.value


def test_every_option_in_a_text_exists_in_some_command() -> None:
    known = set().union(*EVERY.values())
    unknown = [f"{where}: {text}" for where, text in texts() if not options_in(text) <= known | {"--x"}]
    assert unknown == []


def test_every_command_in_a_text_parses() -> None:
    wrong = []
    for where, text in texts():
        for quoted in re.findall(r"`imagewam ([^`]*)`", text):
            words = shlex.split(quoted.replace("{}", "x"))
            command = invoked(COMMAND, words)
            typed = [w for w in words if not w.startswith("-")]
            options = {w.partition("=")[0] for w in words if w.startswith("--")}
            named = typed[:1] == ["COMMAND"] or not typed or command.name.split()[:1] == typed[:1] or typed == ["x"]
            if not named or not options <= command.options | {"--debug"}:
                wrong.append(f"{where}: {text}")
    assert wrong == []


ONE = Invoked(name="one", options=frozenset({"--in", "--out"}), others={"two": frozenset({"--far"})})


@pytest.mark.parametrize(
    ("hint", "printed"),
    [
        ("use --in", "use --in"),
        ("no option at all", "no option at all"),
        ("use --far, or --in", "use --in"),
        ("use --in, or --far; or wait", "use --in; or wait"),
        ("use --far", "use --far (of `imagewam two`)"),
        ("run `imagewam two --far`", "run `imagewam two --far`"),
        ("use --nowhere", None),
    ],
)
def test_a_hint_keeps_what_fits_the_command(hint: str, printed: str | None) -> None:
    assert fitting(hint, ONE) == printed


def test_an_option_of_another_command_is_not_proposed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: list[str]) -> None:
        raise UsageError("wrong", "free some space, or choose another folder with --out")

    monkeypatch.setattr(app, "_invoke", fail)
    assert app.run(["cache", "--stride", "2"]) == 2
    assert capsys.readouterr().err == "error: wrong\nhint: free some space, or choose another folder with --out\n"
    assert app.run(["info", "x"]) == 2
    assert capsys.readouterr().err == "error: wrong\nhint: free some space\n"


def test_the_command_is_found_behind_options() -> None:
    assert invoked(COMMAND, ["-q", "cache", "plan", "--dataset", "x"]).name == "cache plan"
    assert invoked(COMMAND, ["--debug", "info", "cache"]).name == "info"
    assert invoked(COMMAND, []).name == ""
