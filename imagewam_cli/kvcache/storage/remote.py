"""Storage in a remote store: any store that fsspec supports.

The store must give the guarantees of object stores: a file appears complete or not at all, and a reader sees the last
write. Nothing is renamed there, since object stores cannot rename. Locks exclude processes of the same machine only.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.format.manifest import SHARDS, ShardEntry, repair_hint
from imagewam_cli.kvcache.format.shard import Shard
from imagewam_cli.kvcache.storage.download_cache import DownloadCache, copies_limit, copies_root
from imagewam_cli.kvcache.storage.location import name_of
from imagewam_cli.lock import FILES_LOCK, LOCK, write_lock

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_HOST = socket.gethostname()
_PACKAGES = {"s3": "imagewam[s3]", "s3a": "imagewam[s3]", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""Packages for the most common stores; for others fsspec's own message names the package."""
_FAILURES = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("ftplib", "Error"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
    ("paramiko", "SSHException"),
)
"""Exceptions that file systems raise besides OSError."""


class RemoteStorage:
    """A cache in a folder of a remote store; see `Storage` for the methods."""

    evictable = True

    def __init__(self, url: str) -> None:
        """
        Raises:
            UsageError: no installed package supports the URL.
        """
        self.address = url
        self.repair = f"delete the local copy to download it again; if the error persists, {repair_hint(url)}"
        self._fs, self._root = _file_system(url)
        self._made: set[str] = set()
        root, name = copies_root(), f"{name_of(url)}-{xxhash.xxh3_64_hexdigest(url.encode())}"
        self.disk = root / name
        self._drafts = self.disk / f"drafts.{_HOST}.{os.getpid()}"
        self._copies = DownloadCache(root, name, copies_limit())

    def names(self) -> list[str]:
        return list(self._listed(self._root))

    def read(self, name: str) -> bytes:
        with _explained(self._at(name), absent=True):
            data: bytes = self._fs.cat_file(f"{self._root}/{name}")
            return data

    def write(self, name: str, data: bytes) -> None:
        with _explained(self._at(name)):
            self._fs.pipe_file(f"{self._root}/{name}", data)

    def delete(self, name: str) -> None:
        with _explained(self._at(name)):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextmanager
    def lock(self, name: str = LOCK, *, wait: bool = False) -> Iterator[None]:
        """Exclude other processes of this machine. Other machines are not excluded: object stores have no locks."""
        self.disk.mkdir(parents=True, exist_ok=True)
        with write_lock(self.disk, name, wait=wait):
            for drafts in self.disk.glob(f"drafts.{_HOST}.*"):  # other hosts may share this folder
                if not _alive(int(drafts.suffix[1:])):
                    shutil.rmtree(drafts, ignore_errors=True)
            try:
                self._make(self._root)
                yield
            finally:
                if name != FILES_LOCK:
                    shutil.rmtree(self._drafts, ignore_errors=True)

    def free_bytes(self) -> int | None:
        return None

    def damaged_shards(self, entries: Sequence[ShardEntry]) -> Mapping[str, CacheError]:
        """Compare sizes only: anything else would have to be downloaded."""
        sizes = self._listed(f"{self._root}/{SHARDS}") if entries else {}
        found = {}
        for entry in entries:
            size = sizes.get(entry.file)
            if size != entry.bytes:
                what = "is missing" if size is None else f"has {size} bytes, but the manifest lists {entry.bytes}"
                found[entry.file] = CacheError(f"{self._shard_at(entry.file)} {what}", repair_hint(self.address))
        return found

    def draft(self, file: str) -> Path:
        self._drafts.mkdir(parents=True, exist_ok=True)
        return self._drafts / file

    def add(self, file: str, path: Path) -> None:
        # create it after the manifest: a folder with only shards is not recognized as a cache
        self._make(f"{self._root}/{SHARDS}")
        with _explained(self._shard_at(file)):
            self._fs.put_file(str(path), f"{self._root}/{SHARDS}/{file}")
            self._fs.invalidate_cache(f"{self._root}/{SHARDS}")
            size = self._fs.info(f"{self._root}/{SHARDS}/{file}")["size"]
        if size != path.stat().st_size:
            raise CacheError(
                f"{self._shard_at(file)} has {size} of {path.stat().st_size} bytes after it was written",
                "run the same command again",
            )
        if path.parent == self._drafts:
            path.unlink()

    @contextmanager
    def open_current(self, entry: ShardEntry) -> Iterator[Path]:
        with self._copies.temporary(entry.file) as path:
            with suppress(FileNotFoundError):
                self._fetch(entry.file, path)
            yield path

    def file(self, name: str, checksum: str) -> Path:
        return self._copies.get(name, checksum, 0, partial(self._fetch_file, name, checksum))

    def shard(self, entry: ShardEntry) -> Path:
        return self._copies.get(entry.file, entry.checksum, entry.bytes, partial(self._fetch_shard, entry))

    def evicted(self) -> Collection[Path]:
        return self._copies.evicted()

    def _make(self, folder: str) -> None:
        """Create a folder, if the store has folders. Its parent must exist, because a missing parent may be a misspelt
        bucket."""
        if folder in self._made:
            return
        with _explained(self.address), suppress(FileExistsError):
            self._fs.mkdir(folder, create_parents=False)
        self._made.add(folder)

    def _fetch_file(self, name: str, checksum: str, path: Path) -> None:
        try:
            data = self.read(name)
        except FileNotFoundError:
            raise CacheError(f"{self._at(name)} is missing", repair_hint(self.address)) from None
        if checksum_of(data) != checksum:
            raise self._changed(f"{self._at(name)} differs from its checksum")
        path.write_bytes(data)

    def _fetch_shard(self, entry: ShardEntry, path: Path) -> None:
        try:
            self._fetch(entry.file, path)
            Shard.open(path).require_listed(entry.bytes, entry.checksum)
        except FileNotFoundError:
            raise CacheError(f"{self._shard_at(entry.file)} is missing", repair_hint(self.address)) from None
        except CacheError as error:
            raise self._changed(error.message.replace(str(path), self._shard_at(entry.file))) from None

    def _changed(self, message: str) -> CacheError:
        return CacheError(
            message,
            "if the cache was being built at the same time, run the same command again; "
            f"otherwise {repair_hint(self.address)}",
        )

    def _fetch(self, file: str, path: Path) -> None:
        with _explained(self._shard_at(file), absent=True):
            self._fs.get_file(f"{self._root}/{SHARDS}/{file}", str(path))

    def _listed(self, folder: str) -> dict[str, int | None]:
        """Return name -> size of the files in a folder; empty if there is no such folder."""
        try:
            with _explained(self.address, absent=True):
                self._fs.invalidate_cache(folder)
                entries = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return {}
        paths = {str(entry["name"]).rstrip("/"): entry["size"] for entry in entries}
        # some stores list a folder as an empty file in itself
        return {path.rpartition("/")[2]: size for path, size in paths.items() if path != folder}

    def _at(self, name: str) -> str:
        return f"{self.address}/{name}"

    def _shard_at(self, file: str) -> str:
        return f"{self.address}/{SHARDS}/{file}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system for a URL, and the path in it."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        with _explained(url, wrong=True):
            system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        hint = f"pip install '{package}'" if package is not None else str(error)
        raise UsageError(f"{url} needs a package that is not installed", hint) from None
    except ValueError as error:
        raise UsageError(f"{url} cannot store a cache: {error}", "write it as s3://BUCKET/caches/NAME") from None
    return system, path.rstrip("/")


@contextmanager
def _explained(url: str, *, absent: bool = False, wrong: bool = False) -> Iterator[None]:
    """Convert exceptions of the file system to one CacheError.

    absent, wrong: let FileNotFoundError or ValueError through for the caller to handle.

    Raises:
        CacheError: names the URL and the reason.
    """
    try:
        yield
    except PermissionError as error:
        raise CacheError(f"{url}: permission denied: {_reason(error)}", "check the credentials of the store") from error
    except _failures() as error:
        no_room = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if no_room or (absent and isinstance(error, FileNotFoundError)) or (wrong and isinstance(error, ValueError)):
            raise
        raise CacheError(
            f"{url} failed: {_reason(error)}", "check the URL, the network and the credentials, then run it again"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _failures() -> tuple[type[Exception], ...]:
    """Return the exception types of packages that are loaded; packages that are not loaded cannot raise."""
    special = (getattr(sys.modules[module], name) for module, name in _FAILURES if module in sys.modules)
    return (OSError, ValueError, NotImplementedError, *special)
