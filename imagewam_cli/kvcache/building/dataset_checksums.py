"""Record the SHA-256 of a dataset's files in its cache, and compare a dataset with the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from imagewam_cli.data.dataset_files import FileChange, checksum_lines, checksums_of, files_of
from imagewam_cli.data.types import Dataset
from imagewam_cli.kvcache.format.manifest import DATASET_CHECKSUMS, BuildPart, Manifest
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.dataset_record import recorded_checksums, recorded_files


def checksums_name(part: BuildPart | None) -> str:
    """Return the file in which a part, or the build of a whole cache, records checksums."""
    return DATASET_CHECKSUMS if part is None else part.dataset_checksums


def dataset_checksums(
    storage: Storage,
    manifest: Manifest,
    dataset: Dataset,
    part: BuildPart | None,
    shards: Iterable[str],
    on_start: Callable[[int], None] = lambda files: None,
) -> bytes:
    """Return the content of `checksums_name(part)`: the SHA-256 of the files that hold the episodes built so far.

    Reads every byte of the files that are not in an intact record of the cache.

    Args:
        manifest: with the finished shards.
        shards: names of all shards of the cache, finished or not.
        on_start: called with the number of files, if any is read.
    """
    own = set(shards if part is None else part.shards_of(sorted(shards)))
    episodes = [episode for entry in manifest.shards if entry.file in own for episode in entry.episodes]
    names = files_of(dataset, manifest.spec.cameras, episodes) or ()
    known = recorded_checksums(storage, manifest.files)
    unknown = [name for name in names if name not in known]
    if unknown:
        on_start(len(unknown))
    new = checksums_of(dataset.info.root, unknown)
    return checksum_lines({name: known.get(name) or new[name] for name in sorted(names)})


def changed_dataset_files(
    storage: Storage, manifest: Manifest, root: Path, on_file: Callable[[], None] = lambda: None
) -> list[FileChange]:
    """Compare the files of the dataset in `root` with those that the cache was built from.

    Reads every byte of the files whose SHA-256 the cache has, and the ends of the others. Returns nothing if the cache
    has no record. on_file: called after each file.
    """
    files = recorded_files(storage, manifest)
    return [] if files is None else files.changes_at(root, recorded_checksums(storage, manifest.files), on_file)
