"""`imagewam list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.options import FormatName, FormatOption, existing, from_home
from imagewam_cli.cli.output import bytes_text, output, table


def list_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Look in these folders; by default in the working folder.")
    ] = None,
    delete: Annotated[
        Path | None, typer.Option("--delete", callback=from_home, help="Delete this one, after asking.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    format: FormatOption = FormatName.human,
) -> None:
    """List datasets, caches, runs and exports in a folder and in its datasets/, caches/, runs/ and exports/.

    Deleting one asks first.

    Example: imagewam list --delete caches/tiny-tabletop
    """
    import shutil

    from imagewam_cli.errors import UsageError
    from imagewam_cli.workspace import items

    found = items(*(existing("the folder", folder, "see `imagewam list`") for folder in folders or ()))
    if delete is not None:
        item = next((i for i in found if i.path.resolve() == delete.resolve()), None)
        if item is None:
            raise UsageError(f"{delete} is not a dataset, cache, run or export of this folder", "see `imagewam list`")
        if not yes:
            typer.confirm(f"delete the {item.kind} {item.path} ({bytes_text(item.bytes)})?", abort=True, err=True)
        shutil.rmtree(item.path)
        output.say(f"deleted {item.path}")
        return
    values = [{"kind": i.kind, "path": str(i.path), "bytes": i.bytes} for i in found]
    text = table(["kind", "path", "size"], [[i.kind, str(i.path), bytes_text(i.bytes)] for i in found])
    output.result(
        values,
        text if found else f"nothing {_places(folders)}; try `imagewam cache --editor tiny`",
        format.value,
    )


def _places(folders: list[Path] | None) -> str:
    if not folders:
        return "in this folder, its datasets/, caches/, runs/ and exports/ yet"
    return "of imagewam's in " + ", ".join(str(folder) for folder in folders)
