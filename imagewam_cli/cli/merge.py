"""`imagewam cache merge`."""

from __future__ import annotations

from typing import Annotated

import typer

from imagewam_cli.cli.options import FormatName, FormatOption, existing_place
from imagewam_cli.cli.output import output


def merge_command(
    cache: Annotated[str, typer.Argument(help="The folder or URL that the parts were built into.")],
    others: Annotated[list[str] | None, typer.Argument(help="More of them with parts: they are copied.")] = None,
    format: FormatOption = FormatName.human,
) -> None:
    """Unite the parts of a cache that several workers built with --part.

    A cache can be read before: readers unite the parts on the fly.

    Example: imagewam cache merge caches/tiny-tabletop
    """
    from imagewam_cli.kvcache.building.merge import merge_cache
    from imagewam_cli.kvcache.storage.location import location

    places = [existing_place("folder", text, "name the --out of the parts") for text in others or []]
    # where parts come from elsewhere, the folder they are brought to need not be there yet
    target = location(cache) if places else existing_place("folder", cache, "name the --out of the parts")
    manifest = merge_cache(target, places)
    values = {"cache": str(cache), "rows": manifest.rows, "of": manifest.total_rows, "shards": len(manifest.shards)}
    missing = "" if manifest.complete else f"; {manifest.total_rows - manifest.rows} rows are missing"
    text = f"{cache}: {manifest.rows} rows in {len(manifest.shards)} shards{missing}"
    output.result(values, text, format.value)
