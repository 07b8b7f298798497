"""Test caches in remote stores: the bytes of a local build, downloaded once, never mixed, with one-line errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.kvcache.building.merge import merge_cache
from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
from imagewam_cli.kvcache.format.manifest import MANIFEST, BuildPart, parse_manifest
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.storage.download_cache import copies_root
from imagewam_cli.kvcache.storage.local import LocalStorage
from imagewam_cli.kvcache.storage.location import Location, location, name_of
from imagewam_cli.kvcache.storage.manifests import storage_at
from imagewam_cli.prefix.kv import PrefixKV
from tests.support.arithmetic_cache import LENGTHS, build
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.faults import stop_after
from tests.support.folders import files
from tests.support.paths import ROOT
from tests.support.s3_server import BUCKET
from tests.support.stores import Store, copies

SHARD = "shards/shard-00000.safetensors"
ROWS = (3, 5, 3, 4)
EVERYTHING = np.arange(sum(ROWS))


def build_part(out: Location, index: int, count: int = 3) -> ArithmeticEditor:
    return build(out, part=BuildPart(index=index, count=count))


def same(one: PrefixKV, other: PrefixKV) -> bool:
    pairs = [(x, y) for a, b in zip(one.layers, other.layers, strict=True) for x, y in ((a.k, b.k), (a.v, b.v))]
    return all(np.array_equal(x.numpy(), y.numpy()) for x, y in pairs)


class TestLocation:
    @pytest.mark.parametrize("text", ["s3://bucket/a", "memory://a/b", "hf://datasets/user/name"])
    def test_a_url_keeps_its_slashes(self, text: str) -> None:
        assert location(text) == location(f"{text}/") == text

    @pytest.mark.parametrize("text", ["caches/a", "/caches/a", "C:/a", "a:b", "s3:/a"])
    def test_other_text_is_a_folder(self, text: str) -> None:
        assert location(text) == Path(text)

    def test_a_file_url_means_the_folder(self, built: Path) -> None:
        storage = storage_at(f"file://{built}/")
        assert isinstance(storage, LocalStorage)
        assert storage.disk == built
        assert location("file:///with%20space") == Path("/with space")

    @pytest.mark.parametrize("text", ["s3://", "memory:///", "file://"])
    def test_an_incomplete_url_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match=f"^{text} has no bucket or folder$"):
            location(text)

    def test_the_name_of_a_cache_is_its_last_path_part(self) -> None:
        assert name_of("s3://bucket/caches/x") == name_of(Path("caches/x")) == "x"

    def test_local_copies_are_in_the_users_cache_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("IMAGEWAM_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
        assert copies_root() == tmp_path / "user" / "imagewam" / "caches"

    def test_without_a_home_folder_copies_are_temporary(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A container may run as a user without an entry in the list of users, and so without a home folder."""
        for variable in ("IMAGEWAM_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr("pwd.getpwuid", _no_such_user)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert copies_root() == tmp_path / f"cache-{os.getuid()}" / "imagewam" / "caches"


def _no_such_user(user: int) -> None:
    raise KeyError(user)


class TestBuild:
    def test_the_bytes_are_those_of_a_local_build(self, built: Path, store: Store, home: Path) -> None:
        build(store.url)
        assert store.files() == files(built)
        assert not [path for path in home.rglob("*") if path.is_file()], "the build left local files"

    @pytest.mark.parametrize("rows", [1, 3, 9, 14])
    def test_an_interrupted_build_resumes(self, built: Path, memory: Store, home: Path, rows: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            build(memory.url, on_rows=stop_after(rows))
        there = parse_manifest(memory.files()[MANIFEST], MANIFEST)
        for path in home.iterdir():
            assert not list(path.iterdir()), "a local file is left, but another machine may resume the build"
        assert build(memory.url).encoded == 15 - there.rows
        assert memory.files() == files(built)

    def test_a_finished_cache_is_not_changed(self, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        build(memory.url)
        written = memory.log(monkeypatch, "put_file", "pipe_file")
        assert build(memory.url).encoded == 0
        assert written == [MANIFEST]

    def test_no_manifest_lists_a_shard_that_is_not_stored(self, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        real, listed = memory.fs.pipe_file, []

        def pipe_file(path: str, data: bytes, **options: Any) -> None:
            if path.endswith(MANIFEST):
                there = memory.files()
                entries = parse_manifest(data, path).shards
                assert [len(there[f"shards/{e.file}"]) for e in entries] == [e.bytes for e in entries]
                listed.append(len(entries))
            real(path, data, **options)

        monkeypatch.setattr(memory.fs, "pipe_file", pipe_file)
        build(memory.url)
        assert listed == [0, 1, 2, 3, 4, 4]

    def test_at_most_two_shards_are_on_the_local_disk(self, memory: Store, home: Path) -> None:
        most = 0

        def look(rows: int) -> None:
            nonlocal most
            most = max(most, len([path for path in home.rglob("*.safetensors*") if path.is_file()]))

        build(memory.url, on_rows=look)
        assert 1 <= most <= 2

    @pytest.mark.parametrize("how", ["deleted", "truncated"])
    def test_a_lost_shard_is_built_again(self, built: Path, memory: Store, how: str) -> None:
        build(memory.url)
        if how == "deleted":
            memory.fs.rm_file(memory.path(SHARD))
        else:
            memory.put(SHARD, b"less")
        assert build(memory.url).encoded == ROWS[0]
        assert memory.files() == files(built)

    def test_another_cache_at_the_url_is_named_and_kept(self, memory: Store) -> None:
        build(memory.url)
        before = memory.files()
        with pytest.raises(CacheError, match=rf"^{memory.url} holds a cache that differs in its setting 'timestep'"):
            build(memory.url, editor=ArithmeticEditor(timestep=0.5))
        assert memory.files() == before

    def test_files_that_are_not_a_cache_are_kept(self, memory: Store) -> None:
        memory.put("notes.txt", b"mine")
        with pytest.raises(UsageError, match="not a cache"):
            build(memory.url)
        assert memory.files() == {"notes.txt": b"mine"}

    def test_an_empty_object_that_marks_the_folder_is_accepted(self, built: Path, s3: Store) -> None:
        s3.fs.call_s3("put_object", Bucket=BUCKET, Key=s3.root.removeprefix(f"{BUCKET}/") + "/")
        build(s3.url)
        assert {name: data for name, data in s3.files().items() if name} == files(built)

    def test_a_second_writer_on_the_machine_is_refused(self, memory: Store) -> None:
        with storage_at(memory.url).lock(), pytest.raises(CacheError, match="being written by process"):
            build(memory.url)

    def test_a_truncated_upload_is_not_listed(self, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory.fs, "put_file", lambda here, there: memory.fs.pipe_file(there, b"some"))
        with pytest.raises(CacheError, match=r"shard-00000\.safetensors has 4 of \d+ bytes"):
            build(memory.url)
        assert parse_manifest(memory.files()[MANIFEST], MANIFEST).rows == 0

    def test_a_build_resumes_after_a_kill(self, built: Path, s3: Store, home: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", _BUILD_AND_WAIT, s3.url],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "two shards are there\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert list(home.rglob("*.partial")), "the process was not killed within a shard"
        assert 3 + 5 <= parse_manifest(s3.files()[MANIFEST], MANIFEST).rows < 15
        assert build(s3.url).encoded <= 3 + 4
        assert s3.files() == files(built)
        assert not [path for path in home.rglob("*") if path.is_file()]


_BUILD_AND_WAIT = """
import sys, time
from imagewam_cli.kvcache.format.manifest import MANIFEST, parse_manifest
from tests.support.stores import Store
from tests.support.arithmetic_cache import build
store, done = Store(sys.argv[1]), 0
def on_rows(rows):
    global done
    done += rows
    if done > 8:
        while parse_manifest(store.fs.cat_file(store.path(MANIFEST)), MANIFEST).rows < 8:
            time.sleep(0.01)
        print("two shards are there", flush=True)
        time.sleep(60)
build(store.url, on_rows=on_rows)
"""


class TestParts:
    def test_merged_parts_equal_a_single_build(self, built: Path, store: Store) -> None:
        assert sum(build_part(store.url, index).encoded for index in (2, 0, 1)) == 15
        assert CacheReader(store.url).manifest.complete, "the reader does not see all parts"
        merge_cache(store.url)
        assert store.files() == files(built)
        merge_cache(store.url)
        assert store.files() == files(built)

    def test_parts_are_merged_from_folders_into_a_store_and_back(
        self, built: Path, memory: Store, tmp_path: Path
    ) -> None:
        for index in range(3):
            build_part(tmp_path / str(index), index)
        merge_cache(memory.url, [tmp_path / str(index) for index in range(3)])
        assert memory.files() == files(built)
        merge_cache(tmp_path / "back", [memory.url])
        assert files(tmp_path / "back") == files(built)

    def test_a_lost_shard_is_not_merged(self, memory: Store) -> None:
        for index in range(3):
            build_part(memory.url, index)
        memory.fs.rm_file(memory.path(SHARD))
        with pytest.raises(CacheError, match=f"^{memory.url}/{SHARD} is missing$"):
            merge_cache(memory.url)
        assert MANIFEST not in memory.files()


class TestReading:
    def test_a_store_gives_the_same_numbers_as_a_folder(self, built: Path, memory: Store) -> None:
        build(memory.url)
        here, there = CacheReader(built), CacheReader(memory.url)
        assert same(here.read(EVERYTHING), there.read(EVERYTHING))
        assert here.samples() == there.samples()
        assert np.array_equal(here.index.row, there.index.row)
        assert np.array_equal(here.table.action, there.table.action)

    def test_files_are_downloaded_once_on_first_use(
        self, store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(store.url)
        fetched, read = store.log(monkeypatch, "get_file"), store.log(monkeypatch, "cat_file")
        reader = CacheReader(store.url)
        assert (fetched, read) == ([], [MANIFEST])
        reader.read(np.array([0, 1]))
        assert (fetched, read) == ([SHARD], [MANIFEST, "table.safetensors"])
        reader.read(EVERYTHING)
        assert len(fetched) == len(copies(home)) == 4
        again = CacheReader(store.url)
        again.read(EVERYTHING)
        again.samples()
        assert (len(fetched), read[2:]) == (4, [MANIFEST, "samples.safetensors"])

    @pytest.mark.parametrize("limit", [20_000, 100])
    def test_over_the_limit_the_least_recently_used_are_evicted(
        self, built: Path, memory: Store, home: Path, monkeypatch: pytest.MonkeyPatch, limit: int
    ) -> None:
        """Shards take 7 to 10 kB: two of them are kept, or only the one in use, which is larger than the limit."""
        build(memory.url)
        monkeypatch.setenv("IMAGEWAM_CACHE_LIMIT", f"{limit}")
        fetched = memory.log(monkeypatch, "get_file")
        here, there = CacheReader(built), CacheReader(memory.url)
        assert same(here.read(EVERYTHING), there.read(EVERYTHING))
        kept = sum(copies(home).values())
        assert kept <= limit or len(copies(home)) == 1
        assert len(there._open) == len(copies(home)), "a shard without a local copy is still open"
        fetched.clear()
        assert same(here.read(np.array([14])), there.read(np.array([14])))
        assert fetched == [], "the most recent shard was downloaded again"
        assert same(here.read(EVERYTHING), there.read(EVERYTHING))

    def test_recently_used_copies_are_kept(self, memory: Store, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build(memory.url)
        first, last = SHARD, "shards/shard-00003.safetensors"
        monkeypatch.setenv("IMAGEWAM_CACHE_LIMIT", f"{sum(len(memory.files()[name]) for name in (first, last))}")
        reader = CacheReader(memory.url)
        for row in (0, 8, 0, 14):  # shards 0, 2, 0, 3
            reader.read(np.array([row]))
        assert sorted(f"shards/{name.partition('-')[2]}" for name in copies(home)) == [first, last]

    def test_an_invalid_limit_is_refused(self, memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IMAGEWAM_CACHE_LIMIT", "much")
        with pytest.raises(UsageError, match="IMAGEWAM_CACHE_LIMIT must look like 50GB, got 'much'"):
            CacheReader(memory.url)

    def test_an_incomplete_download_of_a_dead_process_is_deleted(self, memory: Store, home: Path) -> None:
        build(memory.url)
        reader = CacheReader(memory.url)
        reader.read(np.array([0]))
        folder = next(home.glob("*/copies"))
        for name, age in (("dead.partial", 2e5), ("alive.partial", 0.0)):
            (folder / name).write_bytes(b"half")
            now = (folder / name).stat().st_mtime
            os.utime(folder / name, (now - age, now - age))
        reader.read(np.array([14]))
        assert [path.name for path in folder.glob("*.partial")] == ["alive.partial"]

    def test_two_readers_can_download_the_same_file_at_once(
        self, built: Path, memory: Store, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(memory.url)
        real, one, both = memory.fs.get_file, threading.Lock(), threading.Barrier(2, timeout=20)

        def get_file(*arguments: Any, **options: Any) -> None:
            with one:  # all readers of an fsspec memory file share one position
                real(*arguments, **options)
            both.wait()  # both downloads finish before either file is renamed

        monkeypatch.setattr(memory.fs, "get_file", get_file)
        expected = CacheReader(built).read(np.arange(3))
        readers = [CacheReader(memory.url) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(lambda reader: reader.read(np.arange(3)), readers):
                assert same(found, expected)
        assert len(list(home.glob("*/copies/*shard*"))) == 1


class TestChange:
    def test_a_reader_sees_new_shards_and_keeps_its_copies_of_old_ones(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            build(store.url, on_rows=stop_after(9))
        before = CacheReader(store.url)
        before.read(np.arange(len(before)))
        build(store.url)
        fetched = store.log(monkeypatch, "get_file")
        after = CacheReader(store.url)
        assert (len(before), len(after)) == (8, 15)
        after.read(EVERYTHING)
        assert len(fetched) == 2

    def test_a_rebuilt_cache_is_never_read_from_old_copies(self, built: Path, memory: Store, tmp_path: Path) -> None:
        """The dataset, shards and sizes are the same; only the numbers differ."""
        build(memory.url)
        old = CacheReader(memory.url)
        old.read(np.arange(3))
        memory.fs.rm(memory.root, recursive=True)
        build(memory.url, editor=another())
        build(tmp_path / "other", editor=another())
        new = CacheReader(memory.url).read(EVERYTHING)
        assert same(new, CacheReader(tmp_path / "other").read(EVERYTHING))
        assert not same(new, CacheReader(built).read(EVERYTHING))
        assert same(old.read(np.arange(3)), CacheReader(built).read(np.arange(3)))
        with pytest.raises(CacheError, match="the checksum of its head is") as error:
            old.read(EVERYTHING)
        assert error.value.message.startswith(f"{memory.url}/shards/shard-00001.safetensors is damaged")


def another() -> ArithmeticEditor:
    return ArithmeticEditor(weights="another", spoil=lambda p: PrefixKV(tuple(map(_doubled, p.layers)), p.valid))


def _doubled(kv: Any) -> Any:
    return type(kv)(2 * kv.k, 2 * kv.v)


class TestDamage:
    @pytest.mark.parametrize("name", [SHARD, "table.safetensors", "samples.safetensors"])
    def test_damage_in_the_store_is_found_and_repaired(self, built: Path, memory: Store, home: Path, name: str) -> None:
        build(memory.url)
        assert verify_cache(memory.url) == []
        CacheReader(memory.url).read(EVERYTHING)  # undamaged local copies must not hide the damage
        memory.flip(name, -5)
        (damage,) = verify_cache(memory.url)
        assert damage.file == name
        editor = ArithmeticEditor()
        assert repair_cache(memory.url, [damage], MemoryDataset(LENGTHS), editor) == []
        assert memory.files() == files(built)
        assert editor.encoded == (3 if name == SHARD else 0)
        assert not list(home.rglob("*.partial"))

    def test_a_lost_shard_is_repaired(self, built: Path, memory: Store) -> None:
        build(memory.url)
        memory.fs.rm_file(memory.path(SHARD))
        damages = verify_cache(memory.url)
        assert [damage.what for damage in damages] == ["is missing"]
        repair_cache(memory.url, damages, MemoryDataset(LENGTHS), ArithmeticEditor())
        assert memory.files() == files(built)

    @pytest.mark.parametrize("offset", [60, 700])
    def test_a_shard_with_a_damaged_header_is_not_kept_as_a_copy(self, memory: Store, home: Path, offset: int) -> None:
        build(memory.url)
        memory.flip(SHARD, offset)
        with pytest.raises(CacheError, match=f"^{memory.url}/{SHARD} is damaged") as error:
            CacheReader(memory.url).read(np.array([0]))
        assert f"`imagewam cache verify --cache {memory.url} --repair`" in str(error.value.hint)
        assert copies(home) == {}

    def test_a_damaged_copy_is_refused_until_it_is_deleted(self, built: Path, memory: Store, home: Path) -> None:
        build(memory.url)
        CacheReader(memory.url).read(np.array([0]))
        (copy,) = home.glob("*/copies/*shard*")
        data = bytearray(copy.read_bytes())
        data[-5] ^= 1
        copy.write_bytes(data)
        with pytest.raises(CacheError, match=f"^{copy} is damaged: dataset rows 4 differ") as error:
            CacheReader(memory.url).read(EVERYTHING)
        assert "delete the local copy" in str(error.value.hint)
        copy.unlink()
        assert same(CacheReader(memory.url).read(EVERYTHING), CacheReader(built).read(EVERYTHING))

    @pytest.mark.parametrize("name", ["table.safetensors", "samples.safetensors", SHARD])
    def test_a_missing_file_is_named(self, memory: Store, name: str) -> None:
        build(memory.url)
        memory.fs.rm_file(memory.path(name))
        reader = CacheReader(memory.url)
        with pytest.raises(CacheError, match=f"^{memory.url}/{name} is missing$"):
            (reader.samples if name.startswith("samples") else lambda: reader.read(np.array([0])))()

    def test_a_manifest_with_a_wrong_checksum_is_refused(self, memory: Store) -> None:
        build(memory.url)
        memory.flip(MANIFEST, 300)
        with pytest.raises(CacheError, match=f"^{memory.url}/{MANIFEST} is damaged"):
            CacheReader(memory.url)


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(CacheError) as error:
        act()
    assert error.value.hint
    assert "\n" not in error.value.message
    return error.value.message


class TestUnreachable:
    def test_an_empty_store_is_not_a_cache(self, store: Store) -> None:
        assert refused(lambda: CacheReader(store.url)) == f"{store.url} is not a cache: it has no {MANIFEST}"

    def test_an_unknown_protocol_is_refused(self, home: Path) -> None:
        with pytest.raises(UsageError, match=r"^nosuch://a/b cannot store a cache: Protocol not known: nosuch"):
            CacheReader("nosuch://a/b")

    def test_a_missing_package_is_named(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        with pytest.raises(UsageError, match=r"^s3://a/b needs a package that is not installed") as error:
            CacheReader("s3://a/b")
        assert error.value.hint == "pip install 'imagewam[s3]'"

    def test_a_missing_bucket_is_named_and_not_created(self, s3: Store) -> None:
        message = refused(lambda: build("s3://elsewhere/caches/x"))
        assert message == "s3://elsewhere/caches/x failed: The specified bucket does not exist"
        assert not s3.fs.exists("elsewhere"), "the build created the bucket"

    def test_an_unreachable_server_is_reported(self, s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        type(s3.fs).clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert "Could not connect to the endpoint URL" in refused(lambda: CacheReader(s3.url))

    def test_an_unreachable_hub_is_reported(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import HfFileSystem

        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        HfFileSystem.clear_instance_cache()
        message = refused(lambda: CacheReader("hf://datasets/user/name/cache"))
        assert message.startswith("hf://datasets/user/name/cache failed: ")
        HfFileSystem.clear_instance_cache()

    def test_missing_credentials_are_reported(self, s3: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        type(s3.fs).clear_instance_cache()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert refused(lambda: CacheReader(s3.url)) == f"{s3.url} failed: Unable to locate credentials"

    def test_a_missing_permission_is_reported(self, s3: Store, s3_address: str) -> None:
        import urllib.request

        def authorize_after(actions: str) -> None:
            url, kind = f"{s3_address}/moto-api/reset-auth", {"Content-Type": "text/plain"}
            urllib.request.urlopen(urllib.request.Request(url, actions.encode(), kind)).close()

        build(s3.url)
        authorize_after("0")
        try:
            assert refused(lambda: CacheReader(s3.url)).startswith(f"{s3.url}: permission denied: ")
        finally:
            authorize_after("1e9")
