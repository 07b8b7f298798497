"""`imagewam list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.options import FormatName, FormatOption, from_home, require_existing
from imagewam_cli.cli.output import bytes_text, output
from imagewam_cli.cli.tables import table


def list_command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Folders to search; by default the working folder."),
    ] = None,
    delete: Annotated[
        Path | None,
        typer.Option(
            "--delete",
            metavar="FOLDER",
            callback=from_home,
            help="Delete this dataset, cache, run or export after confirmation.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Skip the confirmation.")] = False,
    format: FormatOption = FormatName.human,
) -> None:
    """List datasets, caches, runs and exports, or delete one.

    Searches each folder and its datasets/, caches/, runs/ and exports/. --delete asks before it deletes.

    Examples:
        imagewam list
        imagewam list --delete caches/tiny-tabletop
    """
    import shutil

    from imagewam_cli.errors import UsageError
    from imagewam_cli.workspace import items

    found = items(
        *(require_existing("the folder", folder, "`imagewam list` shows what exists") for folder in folders or ())
    )
    if delete is not None:
        item = next((i for i in found if i.path.resolve() == delete.resolve()), None)
        if item is None:
            raise UsageError(
                f"{delete} is not a dataset, cache, run or export listed here",
                "`imagewam list` shows what can be deleted",
            )
        if not yes:
            _confirm(f"delete the {item.kind} {item.path} ({bytes_text(item.bytes)})?")
        shutil.rmtree(item.path)
        output.say(f"deleted {item.path}")
        return
    values = [{"kind": i.kind, "path": str(i.path), "bytes": i.bytes} for i in found]
    text = table([["kind", "path", "size"], *([i.kind, str(i.path), bytes_text(i.bytes)] for i in found)])
    output.result(
        values,
        text if found else f"nothing in {_places(folders)} yet; start with `imagewam cache --editor tiny`",
        format.value,
    )


def _places(folders: list[Path] | None) -> str:
    if not folders:
        return "this folder, its datasets/, caches/, runs/ and exports/"
    return ", ".join(str(folder) for folder in folders)


def _confirm(question: str) -> None:
    """Ask, and abort unless the answer is yes.

    Raises:
        UsageError: nobody can answer, as in the job of a batch system.
    """
    from imagewam_cli.errors import UsageError

    try:
        typer.confirm(question, abort=True, err=True)
    except typer.Abort as aborted:
        if isinstance(aborted.__context__, EOFError):
            raise UsageError("nothing is deleted: nobody answered the question", "pass --yes") from None
        raise
