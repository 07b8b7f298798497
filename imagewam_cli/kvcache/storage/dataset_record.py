"""Read what a cache recorded about the files of its dataset."""

from __future__ import annotations

from collections.abc import Mapping

from imagewam_cli.data.dataset_files import DatasetFiles, changes_text, read_checksum_lines
from imagewam_cli.kvcache.format.manifest import DATASET_FILES, Manifest, is_dataset_checksums
from imagewam_cli.kvcache.storage.contract import Storage
from imagewam_cli.kvcache.storage.manifests import holds


def recorded_files(storage: Storage, manifest: Manifest) -> DatasetFiles | None:
    """Return the recorded files of the dataset; None if they were not recorded, or the record is damaged."""
    checksum = manifest.files.get(DATASET_FILES)
    if manifest.dataset.content is None or checksum is None or not holds(storage, DATASET_FILES, checksum):
        return None
    return DatasetFiles.from_bytes(storage.read(DATASET_FILES))


def recorded_checksums(storage: Storage, files: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of the dataset's files, by path, from the records of all parts.

    files: `Manifest.files`. Damaged records count as missing.
    """
    found: dict[str, str] = {}
    for name, checksum in files.items():
        if is_dataset_checksums(name) and holds(storage, name, checksum):
            found |= read_checksum_lines(storage.read(name))
    return found


def changed_files(storage: Storage, manifest: Manifest, here: DatasetFiles | None) -> str:
    """Name the files of the dataset that differ from the recorded ones."""
    return changes_text(recorded_files(storage, manifest), here)
