"""Format `--help`: panels of options and commands, and examples that can be copied.

Plain text, equal on a terminal and in a pipe, 80 columns wide. A command's docstring is its help: the first sentence is
the summary that lists show, and the lines below `Examples:` are printed as they are, one command each. The panel of an
option or a command is the `rich_help_panel` that typer already has; rich itself is not imported.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from typer import echo
from typer.core import TyperCommand, TyperGroup

from imagewam_cli.errors import UnknownNameError

if TYPE_CHECKING:
    from typer._click import Command, Context, HelpFormatter

ARGUMENTS, OPTIONS = "Arguments", "Options"
INPUT = "Input"
KEEP = "What to keep"
RECIPE = "Recipe"
COMPUTE = "Where it computes"
OUTPUT = "Output"
ADVANCED = "Advanced"

GET, BUILD, TRAIN, JUDGE, SHIP, LOOK = "Get", "Build", "Train", "Judge", "Ship", "Look"
"""Panels of commands, in the order of use: from weights and demonstrations to an exported policy."""

_ORDER = (GET, BUILD, TRAIN, JUDGE, SHIP, LOOK, ARGUMENTS, INPUT, RECIPE, KEEP, COMPUTE, OUTPUT, ADVANCED)
"""Other panels follow in the order in which the command declares them, and options without a panel come last."""

CONDITION = ", with "
"""Text between the name of a panel and the option that its options require, as in "Input, with --online"."""

_EXAMPLES = "\n\nExamples:\n"
_MAX_COLUMN = 26


class HelpCommand(TyperCommand):
    """A command whose help has panels and examples. Without the arguments that it needs, it prints its help."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing and any(p.required for p in self.get_params(ctx)):
            echo(ctx.get_help())
        return super().parse_args(ctx, args)

    def format_help_text(self, ctx: Context, formatter: HelpFormatter) -> None:
        _write_description(self, formatter)

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        _write_panels(_options(self, ctx), formatter)


class HelpGroup(TyperGroup):
    """A group whose help lists its commands by panel, above its own options."""

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        if args and not ctx.resilient_parsing and not args[0].startswith("-") and not self.get_command(ctx, args[0]):
            raise UnknownNameError(f"command of `{ctx.command_path}`", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def format_help_text(self, ctx: Context, formatter: HelpFormatter) -> None:
        _write_description(self, formatter)

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        _write_panels(_options(self, ctx), formatter)

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None) or "Commands"
                panels.setdefault(panel, []).append((name, summary(command)))
        _write_panels(panels, formatter)


def summary(command: Command) -> str:
    """Return the first sentence of a command's help, on one line."""
    first = inspect.cleandoc(command.help or "").partition("\n\n")[0]
    sentence, stop, _ = " ".join(first.split()).partition(". ")
    return sentence + stop.rstrip()


def _write_description(command: Command, formatter: HelpFormatter) -> None:
    text, _, examples = inspect.cleandoc(command.help or "").partition(_EXAMPLES)
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text(text)
    if examples:
        with formatter.section("Examples"):
            indent = " " * formatter.current_indent
            for line in inspect.cleandoc(examples).splitlines():
                formatter.write(f"{indent}{line}\n")  # not wrapped, so that it can be copied


def _options(command: Command, ctx: Context) -> dict[str, list[tuple[str, str]]]:
    """Return the (name, help) pairs of a command's parameters by panel."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            name, text = record
            is_argument = parameter.param_type_name == "argument"
            panel = getattr(parameter, "rich_help_panel", None) or (ARGUMENTS if is_argument else OPTIONS)
            if is_argument:
                name = name.partition(" <")[0]  # without its type: "EDITOR <str>"
            panels.setdefault(panel, []).append((name, text))
    return panels


def rank(panel: str) -> tuple[int, int]:
    """Return the sort key of a panel: "Input, with --online" follows all panels without a condition."""
    name, condition, _ = panel.partition(CONDITION)
    position = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    return (2 if name == OPTIONS else 1 if condition else 0, position)


def _write_panels(panels: dict[str, list[tuple[str, str]]], formatter: HelpFormatter) -> None:
    """Write one section for each panel, in order, with their second columns aligned."""
    names = [name for rows in panels.values() for name, _ in rows]
    width = max((len(name) for name in names if len(name) <= _MAX_COLUMN), default=0)
    for panel in sorted(panels, key=rank):
        rows = panels[panel]
        with formatter.section(panel):
            formatter.write_dl([(name.ljust(width), text) for name, text in rows], col_max=width)
