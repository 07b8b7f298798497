"""`imagewam cache verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.cache_source import open_cache_source
from imagewam_cli.cli.help import INPUT
from imagewam_cli.cli.options import (
    CacheOption,
    DeviceOption,
    FormatName,
    FormatOption,
    OffloadOption,
    WeightsOption,
    chosen_cache,
    chosen_hardware,
    from_home,
)
from imagewam_cli.cli.output import output


def verify_command(
    cache: CacheOption = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Recompute the damaged batches."),
    ] = False,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            metavar="FOLDER",
            callback=from_home,
            help="With --repair: the dataset, if it was moved since the cache was built.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "none",
    format: FormatOption = FormatName.human,
) -> None:
    """Verify every byte of a cache against its checksums.

    Exits with code 1 if a file is damaged and was not repaired. With --repair, only the batches that contain damaged
    rows go through the editor again.

    Examples:
        imagewam cache verify --cache caches/tiny-tabletop
        imagewam cache verify --cache caches/tiny-tabletop --repair
    """
    from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
    from imagewam_cli.kvcache.storage.manifests import manifest_at, storage_at

    address = chosen_cache(cache)
    manifest = manifest_at(storage_at(address))
    with output.progress(manifest.rows, "row") as bar:
        damages = verify_cache(address, on_rows=bar.update)
    text = "\n".join(f"{address}/{damage.file}: {damage.what}" for damage in damages)
    built = f"{manifest.rows} of {manifest.total_rows} planned rows are built"
    unfinished = "" if manifest.complete else f"; the build is unfinished: {built}"
    changed: list[str] = []
    if damages and repair:
        output.say(text)
        source, editor = open_cache_source(manifest, dataset, weights, chosen_hardware(device, offload, False))
        with output.progress(sum(e.rows for e in manifest.shards), "row") as bar:
            changed = repair_cache(address, damages, source, editor, on_rows=bar.update)
        text = f"{address}: repaired {', '.join(damage.file for damage in damages)}" + "".join(
            f"\n{name}: intact, but its bytes differ from before (different machine or library version)"
            for name in changed
        )
    values = {
        "cache": str(address),
        "rows": manifest.rows,
        "damaged": [{"file": d.file, "what": d.what, "rows": d.rows} for d in damages],
        "repaired": bool(damages) and repair,
        "changed": changed,
    }
    output.result(values, text or f"{address}: {manifest.rows} rows, all checksums match{unfinished}", format.value)
    if damages and not repair:
        output.say(f"repair it with `imagewam cache verify --cache {address} --repair`")
        raise typer.Exit(1)
