"""Write the reference of the command line from its own help: `python -m imagewam_cli.cli.reference`.

Run it in the root of the repository after changing a command; a test compares docs/reference/cli.md with `page()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer
from typer.core import TyperGroup

from imagewam_cli.cli.app import app
from imagewam_cli.cli.help import rank

if TYPE_CHECKING:
    from typer._click import Command, Context

PATH: Final = Path("docs") / "reference" / "cli.md"
REFRESH: Final = "python -m imagewam_cli.cli.reference"
_WIDTH: Final = 78
"""Width of the help text on a terminal of 80 columns."""


def page() -> str:
    """Return the reference as Markdown: the help of each command, in the order of `imagewam --help`."""
    root = typer.main.get_command(app)
    context = root.make_context("imagewam", [], resilient_parsing=True, terminal_width=_WIDTH)
    sections = [f"## {name}\n\n```text\n{text}\n```\n" for name, text in _helps(root, context)]
    head = f"# Command line\n\nWritten by `{REFRESH}`; do not edit it by hand.\n"
    return "\n".join([head, *sections])


def _helps(command: Command, context: Context) -> Iterator[tuple[str, str]]:
    """Yield the name and the help of a command and of all commands below it."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, TyperGroup):
        for name, child in _in_order(command, context):
            yield from _helps(child, child.make_context(name, [], parent=context, resilient_parsing=True))


def _in_order(group: TyperGroup, context: Context) -> list[tuple[str, Command]]:
    """Return the commands of a group by panel, as its help lists them."""
    commands = [(name, child) for name in group.list_commands(context) if (child := group.get_command(context, name))]
    return sorted(commands, key=lambda named: rank(getattr(named[1], "rich_help_panel", None) or ""))


def main() -> None:
    """Write the page into the working folder."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
