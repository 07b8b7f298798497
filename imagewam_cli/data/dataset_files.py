"""The bytes of a dataset: the files that hold its rows and pictures, and digests of them.

Metadata alone does not change when a video is encoded again. Files are therefore compared at two depths: by size and
ends (`DatasetFiles`), in seconds, whenever a build or a run begins; and by the SHA-256 of every byte (`checksums_of`),
once when a cache is finished and again by `imagewam cache verify`. Modification times never count: a copy of a dataset
is the same dataset.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from imagewam_cli.data.types import Dataset
from imagewam_cli.errors import DatasetError
from imagewam_cli.files import checksum_of, sha256_of

_END = 64 * 1024
"""Number of bytes to read at each end of a file."""
_THREADS = 16
"""Files to read at the same time: network file systems answer many requests at once."""
_BLOCK = 64
"""Files per task of a thread."""
_NAMED = 3
"""Number of files that a message names."""

T = TypeVar("T")


@runtime_checkable
class ListsFiles(Protocol):
    """A dataset that can list its files. Plugin formats may implement it; without it their files are not compared."""

    def files(self, *, cameras: Sequence[str], episodes: Sequence[int] | None = None) -> Sequence[str] | None:
        """Return the files that hold rows, or pictures of these cameras, of the given episodes (default: all).

        Paths are relative to the dataset's folder, with forward slashes, without duplicates. None: unknown.

        Raises:
            DatasetError: a file is missing.
        """
        ...


def files_of(dataset: Dataset, cameras: Sequence[str], episodes: Sequence[int] | None = None) -> Sequence[str] | None:
    """Return what `ListsFiles.files` returns; None if the dataset does not list its files."""
    return dataset.files(cameras=cameras, episodes=episodes) if isinstance(dataset, ListsFiles) else None


@dataclass(frozen=True)
class FileEnds:
    """Size of a file in bytes, and the XXH3-128 of its first and last 64 KiB."""

    size: int
    ends: str


@dataclass(frozen=True)
class DatasetFiles:
    """Size and ends of every file that holds rows or pictures, by path relative to the dataset's folder."""

    entries: Mapping[str, FileEnds]

    @classmethod
    def of(cls, dataset: Dataset, cameras: Sequence[str]) -> DatasetFiles | None:
        """Read the files of a dataset; None if its format does not list them.

        Raises:
            DatasetError: a file is missing.
        """
        names, root = files_of(dataset, cameras), dataset.info.root
        return None if names is None else cls(dict(sorted(_in_threads(names, lambda name: ends_of(root / name)))))

    @classmethod
    def from_bytes(cls, data: bytes) -> DatasetFiles:
        """Parse what `to_bytes` returned.

        Raises:
            ValueError: the data is damaged.
        """
        try:
            entries: dict[str, Any] = json.loads(data)
            return cls({name: FileEnds(int(size), str(ends)) for name, (size, ends) in entries.items()})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"not a list of files: {error}") from None

    def to_bytes(self) -> bytes:
        """Return the list as JSON: one line per file, its path, size and digest."""
        lines = (f"{json.dumps(name)}: {json.dumps([f.size, f.ends])}" for name, f in self.entries.items())
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @cached_property
    def digest(self) -> str:
        """XXH3-128 of the list, 32 hex digits: equal for every copy of the files."""
        return checksum_of(self.to_bytes())

    def changes(self, other: DatasetFiles) -> list[FileChange]:
        """Return what differs in `other`, by path."""
        names = sorted({*self.entries, *other.entries})
        kinds = ((name, _change(self.entries.get(name), other.entries.get(name))) for name in names)
        return [FileChange(name, how) for name, how in kinds if how is not None]

    def changes_at(
        self, root: Path, checksums: Mapping[str, str], on_file: Callable[[], None] = lambda: None
    ) -> list[FileChange]:
        """Compare with the files in folder `root`: every byte of those in `checksums`, size and ends of the others.

        checksums: SHA-256 by path. on_file: called after each file, in this thread.
        """

        def look(name: str) -> str | None:
            try:
                now = ends_of(root / name)
                if now == self.entries[name] and checksums.get(name) not in (None, sha256_of(root / name)):
                    return _REPLACED
            except (FileNotFoundError, NotADirectoryError):
                return _MISSING
            return _change(self.entries[name], now)

        return [FileChange(name, how) for name, how in _in_threads(self.entries, look, on_file) if how is not None]


@dataclass(frozen=True)
class FileChange:
    """A file that differs from its record. how: what happened to it, such as "was replaced"."""

    file: str
    how: str


_REPLACED, _MISSING, _ADDED = "was replaced", "is missing", "was added"


def _change(before: FileEnds | None, now: FileEnds | None) -> str | None:
    if before == now:
        return None
    return _ADDED if before is None else _MISSING if now is None else _REPLACED


def changes_text(there: DatasetFiles | None, here: DatasetFiles | None) -> str:
    """Return one line that names the first files that differ. None: a list that was lost."""
    if there is None or here is None:
        return "the list of them is lost"
    return named_changes(there.changes(here))


def named_changes(changes: Sequence[FileChange]) -> str:
    """Return one line that names the first changed files and counts the others."""
    more = [f"{len(changes) - _NAMED} more files differ"] if len(changes) > _NAMED else []
    return ", ".join([*(f"{change.file} {change.how}" for change in changes[:_NAMED]), *more])


def checksums_of(root: Path, files: Iterable[str], on_file: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Return the SHA-256 of each file, by path. Reads every byte.

    Raises:
        DatasetError: a file is missing.
    """

    def read(name: str) -> str:
        try:
            return sha256_of(root / name)
        except FileNotFoundError as error:
            raise DatasetError(f"{root / name} is missing", "copy or download it again") from error

    return dict(sorted(_in_threads(files, read, on_file)))


def checksum_lines(checksums: Mapping[str, str]) -> bytes:
    """Return checksums in the format of `sha256sum`, which can check them in the dataset's folder."""
    # the format has no room for a name of two lines; such a file is compared by its ends only
    return "".join(f"{checksum}  {name}\n" for name, checksum in checksums.items() if "\n" not in name).encode(
        errors="surrogateescape"
    )


def read_checksum_lines(data: bytes) -> dict[str, str]:
    """Parse what `checksum_lines` returned."""
    lines = (line.partition("  ") for line in data.decode(errors="surrogateescape").split("\n") if line)
    return {name: checksum for checksum, _, name in lines}


def ends_of(path: Path) -> FileEnds:
    """Return the size and ends of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, 2 * _END if size <= 2 * _END else _END, 0)
        tail = os.pread(descriptor, _END, size - _END) if size > 2 * _END else b""
    finally:
        os.close(descriptor)
    return FileEnds(size, checksum_of(head + tail))


def _in_threads(
    names: Iterable[str], read: Callable[[str], T], on_file: Callable[[], None] = lambda: None
) -> list[tuple[str, T]]:
    """Call `read` for each name, several at a time. Returns (name, result) in order."""
    found: list[tuple[str, T]] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for block in threads.map(lambda block: [(name, read(name)) for name in block], _blocks(names)):
            found += block
            for _ in block:
                on_file()
    return found


def _blocks(names: Iterable[str]) -> Iterator[list[str]]:
    waiting = iter(names)
    while block := list(islice(waiting, _BLOCK)):
        yield block
