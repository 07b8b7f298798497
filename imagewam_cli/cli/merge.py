"""`imagewam cache merge`."""

from __future__ import annotations

from typing import Annotated

import typer

from imagewam_cli.cli.options import FormatName, FormatOption, existing_location
from imagewam_cli.cli.output import output


def merge_command(
    cache: Annotated[
        str, typer.Argument(metavar="FOLDER|URL", help="Folder or URL that the parts were built into with --out.")
    ],
    others: Annotated[
        list[str] | None, typer.Argument(metavar="OTHER", help="Other folders or URLs to copy parts from.")
    ] = None,
    format: FormatOption = FormatName.human,
) -> None:
    """Join the parts of a cache that were built with --part.

    Merging is optional: readers also accept the parts of an unmerged cache.

    Examples:
        imagewam cache merge caches/tiny-tabletop
    """
    from imagewam_cli.kvcache.building.merge import merge_cache
    from imagewam_cli.kvcache.storage.location import location

    parts = [
        existing_location("folder", text, "pass the folder into which `imagewam cache --out` built the parts")
        for text in others or []
    ]
    # if parts are copied from elsewhere, the target may not exist yet
    target = (
        location(cache)
        if parts
        else existing_location("folder", cache, "pass the folder into which `imagewam cache --out` built the parts")
    )
    manifest = merge_cache(target, parts)
    values = {"cache": str(cache), "rows": manifest.rows, "of": manifest.total_rows, "shards": len(manifest.shards)}
    missing = "" if manifest.complete else f"; {manifest.total_rows - manifest.rows} rows are missing"
    text = f"{cache}: {manifest.rows} rows in {len(manifest.shards)} shards{missing}"
    output.result(values, text, format.value)
