"""Where a trainer's prefixes come from. A trainer asks for rows and does not know whether they were stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from imagewam_cli.kvcache.format.frame_table import FrameTable, Indices
from imagewam_cli.kvcache.format.manifest import TABLE, DatasetEntry
from imagewam_cli.kvcache.format.provenance import fingerprint_digest
from imagewam_cli.kvcache.format.shard import LoadMethod
from imagewam_cli.kvcache.reading.reader import CacheReader, RowIndex
from imagewam_cli.kvcache.storage.location import Location
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.prefix.spec import KVSpec


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """Where prefixes are stored or computed, how many there are, and what they are made of."""

    kind: Literal["cache", "online"]
    location: str
    """Folder or URL of the cache, or folder of the dataset."""
    fingerprint: Mapping[str, Any]
    """Fingerprint of the editor and its settings."""
    spec: KVSpec
    codec: str
    """Name of the codec; `none` for prefixes that are not stored."""
    dataset: DatasetEntry
    table_checksum: str
    """Checksum of all states and actions."""
    rows: int

    @property
    def digest(self) -> str:
        """Digest of the fingerprint, as a cache has it. Equal digests mean interchangeable prefixes."""
        return fingerprint_digest(self.fingerprint)


class PrefixSource(Protocol):
    """Rows numbered 0 .. info.rows - 1, in the dataset's order."""

    @property
    def info(self) -> SourceInfo:
        """What the prefixes are, and of which rows."""
        ...

    @property
    def index(self) -> RowIndex:
        """Which dataset frame each row is."""
        ...

    @property
    def table(self) -> FrameTable:
        """States and actions of every dataset frame."""
        ...

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each file that rows are stored in, in their order; all of them where they are not stored."""
        ...

    def samples(self) -> bytes | None:
        """A file of `imagewam_cli.data.samples`, which a policy keeps; None where there is none."""
        ...

    def scratch_bytes(self, rows: int) -> int:
        """What `prepare` takes of the disk for so many rows."""
        ...

    def prepare(self, indices: Indices, folder: Path) -> AbstractContextManager[None]:
        """Within it, `gather` is asked for these rows and no others. folder: whose disk may be used meanwhile."""
        ...

    def gather(self, indices: Indices) -> Callable[[], PrefixKV]:
        """What may run ahead, in a thread beside a computation; the call that it returns does the rest and gives the
        prefix of the rows, float32 on the CPU."""
        ...


class CachedPrefixes:
    """The rows of a cache."""

    def __init__(self, place: Location, load: LoadMethod = "mmap") -> None:
        """load: how the shards are read; the rows are the same.

        Raises:
            CacheError: no cache, a damaged one, or one without rows.
        """
        self.reader = CacheReader(place, load)
        manifest = self.reader.manifest
        self.info = SourceInfo(
            kind="cache",
            location=str(place.resolve()) if isinstance(place, Path) else place,
            fingerprint=manifest.fingerprint,
            spec=manifest.spec,
            codec=manifest.codec,
            dataset=manifest.dataset,
            table_checksum=manifest.files.get(TABLE, ""),
            rows=manifest.rows,
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

    def samples(self) -> bytes | None:
        return self.reader.samples()

    def scratch_bytes(self, rows: int) -> int:
        return 0

    def prepare(self, indices: Indices, folder: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, indices: Indices) -> Callable[[], PrefixKV]:
        prefix = self.reader.read(indices)
        return lambda: prefix
