"""`imagewam cache verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagewam_cli.cli.cache_source import needs_every_episode, open_cache_source
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
    existing_dataset,
    from_home,
)
from imagewam_cli.cli.output import output

if TYPE_CHECKING:
    from imagewam_cli.kvcache.format.manifest import Manifest
    from imagewam_cli.kvcache.storage.contract import Storage


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
            help="The dataset, if it was moved since the cache was built.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "none",
    format: FormatOption = FormatName.human,
) -> None:
    """Verify every byte of a cache, and of the dataset that it was built from, against their checksums.

    Exits with code 1 if a file is damaged and was not repaired, or if a file of the dataset was replaced. With
    --repair, only the batches that contain damaged rows go through the editor again.

    A dataset that is no longer where it was is not compared. Comparing takes as long as reading all its files.

    Examples:
        imagewam cache verify --cache caches/tiny-tabletop
        imagewam cache verify --cache caches/tiny-tabletop --repair
    """
    from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
    from imagewam_cli.kvcache.storage.manifests import manifest_at, storage_at

    address = chosen_cache(cache)
    storage = storage_at(address)
    manifest = manifest_at(storage)
    with output.progress(manifest.rows, "row") as bar:
        damages = verify_cache(address, on_rows=bar.update)
    text = "\n".join(f"{address}/{damage.file}: {damage.what}" for damage in damages)
    built = f"{manifest.rows} of {manifest.total_rows} planned rows are built"
    unfinished = "" if manifest.complete else f"; the build is unfinished: {built}"
    changed: list[str] = []
    if damages and repair:
        output.say(text)
        hardware = chosen_hardware(device, offload, False)
        with needs_every_episode():
            source, editor = open_cache_source(storage, manifest, dataset, weights, hardware)
        with needs_every_episode(), output.progress(sum(e.rows for e in manifest.shards), "row") as bar:
            changed = repair_cache(address, damages, source, editor, on_rows=bar.update)
        text = f"{address}: repaired {', '.join(damage.file for damage in damages)}" + "".join(
            f"\n{name}: intact, but its bytes differ from before (different machine or library version)"
            for name in changed
        )
    compared = _compared_dataset(storage, manifest, dataset)
    values = {
        "cache": str(address),
        "rows": manifest.rows,
        "damaged": [{"file": d.file, "what": d.what, "rows": d.rows} for d in damages],
        "repaired": bool(damages) and repair,
        "changed": changed,
        "dataset": compared,
    }
    text = text or f"{address}: {manifest.rows} rows, all checksums match{unfinished}"
    output.result(values, f"{text}\n{_dataset_text(compared)}", format.value)
    if damages and not repair:
        output.say(f"repair it with `imagewam cache verify --cache {address} --repair`")
    if compared["changed"]:
        output.say(f"the prefixes of {address} belong to the files as they were: build a cache in another folder")
    if compared["changed"] or (damages and not repair):
        raise typer.Exit(1)


def _compared_dataset(storage: Storage, manifest: Manifest, moved: Path | None) -> dict[str, Any]:
    """Compare the dataset with the files that the cache was built from. Returns the JSON values of the result.

    moved: the folder of the dataset; None: the one that the manifest records.
    """
    from imagewam_cli.data.episodes import EpisodeSelection
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.errors import DatasetError
    from imagewam_cli.kvcache.building.dataset_checksums import changed_dataset_files
    from imagewam_cli.kvcache.storage.dataset_record import recorded_checksums, recorded_files

    root = Path(manifest.dataset.path) if moved is None else existing_dataset(moved)
    values: dict[str, Any] = {"path": str(root), "files": 0, "by_ends": 0, "changed": [], "not_compared": None}
    files = recorded_files(storage, manifest)
    if files is None:
        return values | {"not_compared": "the cache has no record of its files"}
    if not root.is_dir():
        return values | {"not_compared": f"{root} does not exist; pass its folder with --dataset"}
    with output.progress(len(files.entries), "file") as bar:
        changes = changed_dataset_files(storage, manifest, root, bar.update)
    changed = [{"file": change.file, "what": change.how} for change in changes]
    try:
        selection = EpisodeSelection.of(manifest.dataset.selected)
        if open_dataset(root, manifest.dataset.keys, selection).info.identity != manifest.dataset.identity:
            changed.insert(0, {"file": "the metadata", "what": "was changed"})
    except DatasetError as error:
        changed.insert(0, {"file": "the metadata", "what": f"cannot be read: {error.message}"})
    by_ends = len(files.entries.keys() - recorded_checksums(storage, manifest.files).keys())
    return values | {"files": len(files.entries), "by_ends": by_ends, "changed": changed}


def _dataset_text(compared: dict[str, Any]) -> str:
    if compared["not_compared"] is not None:
        return f"the dataset was not compared: {compared['not_compared']}"
    if not compared["changed"]:
        short = f" ({compared['by_ends']} compared by size and ends only)" if compared["by_ends"] else ""
        return f"{compared['path']}: {compared['files']} files of the dataset, all as they were{short}"
    return "\n".join(f"{compared['path']}: {change['file']} {change['what']}" for change in compared["changed"])
