"""Fixtures of two stores for remote caches: fsspec's memory file system, and a real S3 server on loopback."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.support.s3_server import BUCKET, s3_client, s3_server

_numbers = itertools.count()


class Store:
    """Read and write the files under a URL without imagewam."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs: Any
        self.fs, self.root = fsspec.url_to_fs(url)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def files(self) -> dict[str, bytes]:
        self.fs.invalidate_cache()
        return {path.removeprefix(f"{self.root}/"): self.fs.cat_file(path) for path in self.fs.find(self.root)}

    def put(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(self.path(name), data)

    def flip(self, name: str, offset: int) -> None:
        data = bytearray(self.fs.cat_file(self.path(name)))
        data[offset] ^= 1
        self.put(name, bytes(data))

    def log(self, patch: pytest.MonkeyPatch, *methods: str) -> list[str]:
        """Return a list to which these methods of the file system append the file names that they are called with."""
        asked: list[str] = []

        def logged(real: Callable[..., Any], position: int) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                asked.append(arguments[position].removeprefix(f"{self.root}/"))
                return real(*arguments, **options)

            return call

        for method in methods:
            patch.setattr(self.fs, method, logged(getattr(self.fs, method), 1 if method == "put_file" else 0))
        return asked


def copies(home: Path) -> dict[str, int]:
    """Return name and size of each local copy of a shard."""
    return {path.name: path.stat().st_size for path in home.glob("*/copies/*shard*")}


def memory_store() -> Store:
    return Store(f"memory://caches/{next(_numbers)}")


def s3_store() -> Store:
    return Store(f"s3://{BUCKET}/caches/{next(_numbers)}")


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    with s3_server() as address:
        with s3_client(address):
            fsspec.filesystem("s3").mkdir(BUCKET)
        yield address


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of local copies."""
    folder = tmp_path / "home"
    monkeypatch.setenv("IMAGEWAM_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def s3(home: Path, s3_address: str) -> Iterator[Store]:
    with s3_client(s3_address):
        yield s3_store()


@pytest.fixture(params=["memory", "s3"])
def store(home: Path, request: pytest.FixtureRequest) -> Store:
    found: Store = memory_store() if request.param == "memory" else request.getfixturevalue("s3")
    return found


@pytest.fixture
def memory(home: Path) -> Store:
    return memory_store()
