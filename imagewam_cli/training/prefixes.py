"""Sources of prefixes. The trainer asks a source for rows and does not know whether they were stored or computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from imagewam_cli.data.dataset_files import DatasetFiles
from imagewam_cli.kvcache.format.frame_table import FrameTable, Indices
from imagewam_cli.kvcache.format.manifest import TABLE, DatasetEntry
from imagewam_cli.kvcache.format.provenance import fingerprint_digest
from imagewam_cli.kvcache.format.shard import LoadMethod
from imagewam_cli.kvcache.reading.reader import CacheReader, RowIndex
from imagewam_cli.kvcache.storage.dataset_record import recorded_files
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import KVSpec


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """Location, number of rows and provenance of a source's prefixes."""

    kind: Literal["cache", "online"]
    location: str
    """Folder or URL of the cache, or folder of the dataset."""
    fingerprint: Mapping[str, object]
    """Fingerprint of the editor and its settings."""
    spec: KVSpec
    codec: str
    """Name of the codec; `none` for prefixes that are not stored."""
    dataset: DatasetEntry
    table_checksum: str
    """Checksum of all states and actions."""
    rows: int
    instructions: tuple[str, ...]
    """Distinct instructions; `RowIndex.instruction` counts them."""

    @property
    def digest(self) -> str:
        """Digest of the fingerprint, as a cache has it. Equal digests mean interchangeable prefixes."""
        return fingerprint_digest(self.fingerprint)


class PrefixSource(Protocol):
    """Prefixes of rows numbered 0 .. info.rows - 1, in dataset order."""

    @property
    def info(self) -> SourceInfo:
        """Description of the prefixes and their rows."""
        ...

    @property
    def index(self) -> RowIndex:
        """Dataset frame of each row."""
        ...

    @property
    def table(self) -> FrameTable:
        """States and actions of every dataset frame."""
        ...

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Number of rows in each shard, in row order. A source without shards has one entry."""
        ...

    def dataset_files(self) -> DatasetFiles | None:
        """Return the files of the dataset that the prefixes were computed from; None if unknown."""
        ...

    def samples(self) -> bytes | None:
        """Return a samples file (`imagewam_cli.data.samples`) for the policy to keep, or None."""
        ...

    def scratch_bytes(self, rows: int) -> int:
        """Return the disk space in bytes that `prepare` needs for this many rows."""
        ...

    def prepare(self, indices: Indices, folder: Path) -> AbstractContextManager[None]:
        """Announce the rows that `begin_read` will be asked for inside `with`. folder: folder for temporary files."""
        ...

    def begin_read(self, indices: Indices) -> Callable[[], PrefixKV]:
        """Start reading in a background thread.

        Returns a function that finishes the read and returns the prefixes, float32 on the CPU.
        """
        ...


class CachedPrefixes:
    """Prefixes that are stored in a cache."""

    def __init__(self, cache: CacheReader | Location, load: LoadMethod = "mmap") -> None:
        """Open the cache, or use an open reader. load: how shards are read; it does not change the result.

        Raises:
            CacheError: there is no cache, it is damaged, or it has no rows.
        """
        self.reader = cache if isinstance(cache, CacheReader) else CacheReader(cache, load)
        manifest, location = self.reader.manifest, self.reader.address
        self.info = SourceInfo(
            kind="cache",
            location=str(location.resolve()) if isinstance(location, Path) else location,
            fingerprint=manifest.fingerprint,
            spec=manifest.spec,
            codec=manifest.codec,
            dataset=manifest.dataset,
            table_checksum=manifest.files.get(TABLE, ""),
            rows=manifest.rows,
            instructions=manifest.instructions,
        )

    @property
    def index(self) -> RowIndex:
        return self.reader.index

    @property
    def table(self) -> FrameTable:
        return self.reader.table

    @property
    def shard_rows(self) -> tuple[int, ...]:
        return self.reader.shard_rows

    def dataset_files(self) -> DatasetFiles | None:
        return recorded_files(self.reader.storage, self.reader.manifest)

    def samples(self) -> bytes | None:
        return self.reader.samples()

    def scratch_bytes(self, rows: int) -> int:
        return 0

    def prepare(self, indices: Indices, folder: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def begin_read(self, indices: Indices) -> Callable[[], PrefixKV]:
        prefix = self.reader.read(indices)
        return lambda: prefix
