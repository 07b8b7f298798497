"""`--help` as a user sees it: 80 columns, nothing cut off, commands in the order of use, examples that parse."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import typer
from typer.core import TyperGroup

from imagewam_cli.cli.app import app, run
from imagewam_cli.cli.help import ADVANCED, COMPUTE, CONDITION, INPUT, KEEP, OPTIONS, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typer._click import Command

JOURNEY = {
    "Get": ["fetch", "import", "record"],
    "Build": ["cache"],
    "Train": ["train-expert"],
    "Judge": ["eval", "attention"],
    "Ship": ["export"],
    "Look": ["demo", "info", "list", "editors", "plugins"],
}


def commands() -> dict[tuple[str, ...], Command]:
    """Map the words that call a command to the command; () is `imagewam` itself."""

    def below(words: tuple[str, ...], command: Command) -> Iterator[tuple[tuple[str, ...], Command]]:
        yield words, command
        if isinstance(command, TyperGroup):
            for name, child in command.commands.items():
                yield from below((*words, name), child)

    return dict(below((), typer.main.get_command(app)))


COMMANDS = commands()
EVERY = pytest.mark.parametrize("words", list(COMMANDS), ids=lambda words: " ".join(words) or "imagewam")


def panels(text: str) -> dict[str, list[str]]:
    """Map each heading to the lines below it."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            heading = line.rstrip(":")
            found[heading] = []
        elif line:
            found[heading].append(line)
    return found


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run([*words, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_help_groups_commands_in_80_columns_and_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "imagewam_cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"})
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert not [mark for mark in ("...", "…", "\x1b") if mark in done.stdout]
    found = panels(done.stdout)
    assert {name: [line.split()[0] for line in found[name]] for name in JOURNEY} == JOURNEY
    assert [name for name in found if name in JOURNEY] == list(JOURNEY)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "numpy", "diffusers", "pyarrow", "rich"} & imported


@EVERY
def test_help_fits_80_columns_and_cuts_nothing_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, *words)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert not [line for line in text.splitlines()[1:] if line.rstrip().endswith("...")]


@EVERY
def test_every_example_is_a_command_that_parses(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    if not words:
        return
    examples = panels(help_of(capsys, *words))["Examples"]
    assert examples[0].split()[:2] == ["imagewam", words[0]]
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "imagewam"
        command: Command = COMMANDS[()]
        name = ""
        while arguments and isinstance(command, TyperGroup) and arguments[0] in command.commands:
            name = arguments.pop(0)
            command = command.commands[name]
        command.make_context(name, arguments)  # raises for an option that does not exist


@EVERY
def test_every_option_has_help_and_a_panel(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    names = [INPUT, "Recipe", KEEP, COMPUTE, OUTPUT, ADVANCED, OPTIONS, None]
    for parameter in command.params:
        text = getattr(parameter, "help", None)
        assert text, parameter.name
        assert text.endswith((".", "]")), text
        panel = getattr(parameter, "rich_help_panel", None)
        assert panel in names or panel.partition(CONDITION)[0] in names


def test_options_that_need_another_option_come_last(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(panels(help_of(capsys, "train-expert")))
    conditional = [name for name in found if CONDITION in name]
    assert conditional == [f"{name}{CONDITION}--online" for name in (INPUT, KEEP, COMPUTE, ADVANCED)]
    assert found[-len(conditional) - 1 : -1] == conditional
    assert found[-1] == OPTIONS


def test_a_bare_command_prints_its_help_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code = run([])
    captured = capsys.readouterr()
    assert (code, captured.err) == (2, "")
    assert captured.out == help_of(capsys)
