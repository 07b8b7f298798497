"""Test `imagewam_cli.files`: what is on disk after success, an error, a full disk, and a kill at any step."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash

from imagewam_cli.errors import UsageError
from imagewam_cli.files import (
    atomic_file,
    atomic_folder,
    checksum_of,
    file_sizes,
    has_checksum,
    partial_of,
    require_vacant,
    sha256_of,
    unique_partial,
    write_atomically,
)
from tests.support.faults import out_of_space
from tests.support.folders import files
from tests.support.paths import ROOT


def file_by_bytes(path: Path) -> None:
    write_atomically(path, b"new")


def file_by_path(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"new")


def file_by_path_and_name(path: Path) -> None:
    with atomic_file(path, partial=partial_of(path)) as temporary:
        temporary.write_bytes(b"new")


def folder(path: Path) -> None:
    with atomic_folder(path) as temporary:
        fill(temporary, b"new")


def replaced_folder(path: Path) -> None:
    with atomic_folder(path, replace=True, partial=partial_of(path)) as temporary:
        fill(temporary, b"new")


def fill(path: Path, data: bytes) -> None:
    (path / "inner").mkdir()
    (path / "a").write_bytes(data)
    (path / "inner" / "b").write_bytes(data)


def content(path: Path) -> object:
    """Return the bytes of a file, or of every file of a folder, or None if `path` does not exist."""
    return files(path) if path.is_dir() else path.read_bytes() if path.exists() else None


FILES = [file_by_bytes, file_by_path, file_by_path_and_name]
FOLDERS = [folder, replaced_folder]
FULL = {"a": b"new", "inner/b": b"new"}

Write = Callable[[Path], None]


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Check that the block does not change `path` and leaves no other files beside it."""
    before = content(path)
    yield
    assert content(path) == before
    assert [p for p in path.parent.iterdir() if p != path] == []


class TestFile:
    @pytest.mark.parametrize("write", FILES)
    @pytest.mark.parametrize("old", [None, b"a longer old content"])
    def test_the_file_has_the_new_content_and_no_temporary_file_is_left(
        self, tmp_path: Path, write: Write, old: bytes | None
    ) -> None:
        path = tmp_path / "file.txt"
        if old is not None:
            path.write_bytes(old)
        write(path)
        assert files(tmp_path) == {"file.txt": b"new"}

    @pytest.mark.parametrize("write", FILES)
    def test_a_full_disk_leaves_the_old_content(
        self, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file.txt"
        path.write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", out_of_space)
        with unchanged(path), pytest.raises(OSError, match="No space left"):
            write(path)

    def test_an_error_while_writing_leaves_the_old_content(self, tmp_path: Path) -> None:
        path = tmp_path / "file.txt"
        path.write_bytes(b"old")

        def write() -> None:
            with atomic_file(path) as temporary:
                temporary.write_bytes(b"half")
                raise RuntimeError("midway")

        with unchanged(path), pytest.raises(RuntimeError, match="midway"):
            write()

    def test_the_temporary_file_is_hidden_in_the_same_folder_with_the_same_suffix(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "film.mp4"
        with atomic_file(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.name.startswith(".film.")
            assert temporary.suffix == ".mp4"
            temporary.touch()
        assert path.exists()

    def test_a_file_has_the_default_permissions(self, tmp_path: Path) -> None:
        file_by_path(tmp_path / "atomic")
        (tmp_path / "plain").touch()
        assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize(("durable", "flushed"), [(True, 2), (False, 0)])
    def test_file_and_folder_are_flushed(
        self, tmp_path: Path, durable: bool, flushed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        monkeypatch.setattr(os, "fsync", calls.append)
        with atomic_file(tmp_path / "x", durable=durable) as temporary:
            temporary.touch()
        assert len(calls) == flushed

    def test_temporary_names_end_in_partial_and_unique_ones_differ(self) -> None:
        assert partial_of(Path("a/x.bin")) == Path("a/x.bin.partial")
        one, two = unique_partial(Path("a/x.bin")), unique_partial(Path("a/x.bin"))
        assert one != two
        assert one.parent == Path("a")
        assert one.suffix == ".partial"


class TestFolder:
    @pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
    def test_the_folder_appears_when_the_block_ends(self, tmp_path: Path, there: bool) -> None:
        out = tmp_path / "deep" / "out"
        if there:
            out.mkdir(parents=True)
        with atomic_folder(out) as temporary:
            fill(temporary, b"new")
            assert not there or not any(out.iterdir())
            assert there or not out.exists()
        assert file_sizes(out) == {"a": 3, "inner/b": 3}
        assert list(out.parent.iterdir()) == [out]

    def test_the_current_folder_can_be_named_by_a_dot(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "out"
        out.mkdir()
        monkeypatch.chdir(out)
        folder(Path("."))
        assert files(out) == FULL

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_existing_content_is_not_replaced_by_default(self, tmp_path: Path, kind: str) -> None:
        out = tmp_path / "out"
        if kind == "folder":
            out.mkdir()
        held = out if kind == "file" else out / "mine.txt"
        held.write_text("mine")
        with pytest.raises(UsageError, match="is a file" if kind == "file" else "is not empty"), atomic_folder(out):
            pytest.fail("the block must not run")
        assert held.read_text() == "mine"
        assert list(tmp_path.iterdir()) == [out]

    def test_content_that_appears_during_the_block_is_kept(self, tmp_path: Path) -> None:
        out = tmp_path / "out"

        def collide() -> None:
            with atomic_folder(out):
                out.mkdir()
                (out / "mine.txt").write_text("mine")

        with pytest.raises(UsageError, match="is not empty"):
            collide()
        assert files(tmp_path) == {"out/mine.txt": b"mine"}
        assert list(tmp_path.iterdir()) == [out]

    def test_replace_removes_the_old_content(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").touch()
        partial_of(out).mkdir()
        (partial_of(out) / "left by a killed process").touch()
        replaced_folder(out)
        assert files(tmp_path) == {f"out/{name}": data for name, data in FULL.items()}

    @pytest.mark.parametrize("write", FOLDERS)
    def test_a_full_disk_keeps_the_old_content(
        self, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        if write is replaced_folder:
            out.mkdir()
            (out / "old").touch()
        monkeypatch.setattr(os, "fsync", out_of_space)
        with unchanged(out), pytest.raises(OSError, match="No space left"):
            write(out)

    def test_every_file_and_folder_is_flushed_before_the_rename(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, flushed = tmp_path / "out", []

        def fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            flushed.append((path.name, out.exists()))

        monkeypatch.setattr(os, "fsync", fsync)
        with atomic_folder(out, partial=partial_of(out)) as temporary:
            fill(temporary, b"new")
        early = {"a", "inner", "b", "out.partial"}
        assert set(flushed) == {*((name, False) for name in early), (tmp_path.name, True)}

    def test_a_folder_has_the_default_permissions(self, tmp_path: Path) -> None:
        folder(tmp_path / "atomic")
        (tmp_path / "plain").mkdir()
        assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_vacant_means_missing_or_empty(self, tmp_path: Path) -> None:
        require_vacant(tmp_path)
        require_vacant(tmp_path / "missing")


KILL_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from tests import test_files

write, root, is_file = getattr(test_files, sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "file"
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}

def kill_at(step):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        seen += event in STEPS
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for step in range(1, 1000):
    target = root / str(step) / "target"
    target.parent.mkdir()
    if is_file:
        target.write_bytes(b"old")
    elif write is test_files.replaced_folder:
        target.mkdir()
        (target / "a").write_bytes(b"old")
    child = os.fork()
    if not child:
        kill_at(step)
        write(target)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the system calls of Linux's Python")
@pytest.mark.parametrize("write", [*FILES, *FOLDERS])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_content(tmp_path: Path, write: Write) -> None:
    """Kill before each file system call. A new attempt must then succeed."""
    kind = "file" if write in FILES else "folder"
    arguments = [sys.executable, "-c", KILL_AT_EVERY_STEP, write.__name__, str(tmp_path), kind]
    subprocess.run(arguments, check=True, timeout=60, cwd=ROOT)
    new = b"new" if kind == "file" else FULL
    # No portable call exchanges two folders, so the old one is removed first and may be missing for a moment.
    before = {"file": (b"old",), "folder": ({"a": b"old"}, {}, None)}[kind]
    found = []
    for step in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        target = step / "target"
        assert content(target) in (*before, new)
        found.append(content(target))
        left = [path.name for path in step.iterdir() if path != target]
        assert all(".partial" in name for name in left)
        if content(target) != new or write is replaced_folder:
            write(target)
        assert content(target) == new
        if write in (file_by_bytes, file_by_path_and_name, replaced_folder):
            assert list(step.iterdir()) == [target], "the second attempt did not reuse the fixed temporary name"
    assert len(found) > 3
    assert found[-1] == new
    assert found[0] == before[0] or write is folder


class TestChecksums:
    def test_checksums_equal_those_of_xxhash_and_hashlib(self, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"some bytes")
        assert checksum_of(b"some bytes") == xxhash.xxh3_128_hexdigest(b"some bytes")
        assert checksum_of(memoryview(b"some bytes")) == checksum_of(b"some bytes")
        assert has_checksum(path, checksum_of(b"some bytes"))
        assert sha256_of(path) == hashlib.sha256(b"some bytes").hexdigest()

    def test_a_missing_file_has_no_checksum(self, tmp_path: Path) -> None:
        assert not has_checksum(tmp_path / "missing", checksum_of(b""))
        assert not has_checksum(tmp_path, checksum_of(b""))
