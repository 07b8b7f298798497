"""`imagewam cache merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.options import FormatName, FormatOption, existing
from imagewam_cli.cli.output import output


def merge_command(
    cache: Annotated[Path, typer.Argument(help="The folder that the parts were built into.")],
    others: Annotated[list[Path] | None, typer.Argument(help="More folders with parts: they are copied.")] = None,
    format: FormatOption = FormatName.human,
) -> None:
    """Unite the parts of a cache that several workers built with --part.

    A cache can be read before: readers unite the parts on the fly.

    Example: imagewam cache merge caches/tiny-tabletop
    """
    from imagewam_cli.kvcache.merge import merge_cache

    folders = [existing("folder", path, "name the --out of the parts") for path in others or []]
    if not folders:
        existing("folder", cache, "name the --out of the parts")
    manifest = merge_cache(cache, folders)
    values = {"cache": str(cache), "rows": manifest.rows, "of": manifest.total_rows, "shards": len(manifest.shards)}
    missing = "" if manifest.complete else f"; {manifest.total_rows - manifest.rows} rows are missing"
    text = f"{cache}: {manifest.rows} rows in {len(manifest.shards)} shards{missing}"
    output.result(values, text, format.value)
