"""A cache belongs to the bytes of its dataset: replaced files are refused and named, a copy is the same dataset."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.data.dataset_files import checksum_lines, checksums_of
from imagewam_cli.data.episodes import EpisodeSelection
from imagewam_cli.data.formats import open_dataset
from imagewam_cli.data.types import KeyMap
from imagewam_cli.errors import CacheError, ImagewamWarning
from imagewam_cli.kvcache.building.build import build_cache, require_resumable
from imagewam_cli.kvcache.building.dataset_checksums import changed_dataset_files
from imagewam_cli.kvcache.building.merge import merge_cache
from imagewam_cli.kvcache.building.shard_builder import ShardBuilder
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
from imagewam_cli.kvcache.building.workers.pool import WorkerPool
from imagewam_cli.kvcache.building.workers.worker import Worker
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.format.manifest import BuildPart, Manifest
from imagewam_cli.kvcache.storage.manifests import manifests_at, put_manifest, read_manifest, storage_at
from tests.support.arithmetic_editor import ArithmeticEditor
from tests.support.folders import files
from tests.support.recordings import record, replace_video, write_v21

SETTINGS = BuildSettings(batch=3, shard_mb=0.001)
"""Settings that give each episode its own shard."""
TOP = "videos/chunk-000/observation.images.top/episode_000001.mp4"
WRIST = "videos/chunk-000/observation.images.wrist/episode_000001.mp4"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_v21(tmp_path / "set", record())


def build(root: Path, out: Path, part: BuildPart | None = None, **options: Any) -> Manifest:
    return build_cache(
        open_dataset(root), ArithmeticEditor(), out, FLOAT32, dataclasses.replace(SETTINGS, part=part), **options
    )


class TestResuming:
    def test_a_replaced_video_is_refused_and_named(self, root: Path, tmp_path: Path) -> None:
        build(root, tmp_path / "cache")
        before = files(tmp_path / "cache")
        replace_video(root, TOP, 1)
        with pytest.raises(CacheError, match=f"built from other files of the dataset: {TOP} was replaced") as error:
            build(root, tmp_path / "cache")
        assert "--out" in str(error.value.hint)
        with pytest.raises(CacheError, match=f"{TOP} was replaced"):  # without an editor
            require_resumable(open_dataset(root), "arithmetic", tmp_path / "cache", FLOAT32, SETTINGS)
        assert files(tmp_path / "cache") == before

    def test_an_interrupted_build_does_not_mix_two_recordings(self, root: Path, tmp_path: Path) -> None:
        def stop(rows: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(root, tmp_path / "cache", on_rows=stop)
        replace_video(root, TOP, 1)
        with pytest.raises(CacheError, match=f"{TOP} was replaced"):
            build(root, tmp_path / "cache")

    def test_replaced_rows_are_named(self, root: Path, tmp_path: Path) -> None:
        build(root, tmp_path / "cache")
        data = root / "data/chunk-000/episode_000000.parquet"
        other = write_v21(tmp_path / "other", record(seed=1))
        shutil.copyfile(other / data.relative_to(root), data)
        with pytest.raises(CacheError, match=r"data/chunk-000/episode_000000\.parquet was replaced"):
            build(root, tmp_path / "cache")

    def test_a_copy_with_other_times_is_the_same_dataset(self, root: Path, tmp_path: Path) -> None:
        first = build(root, tmp_path / "cache")
        copy = Path(shutil.copytree(root, tmp_path / "moved" / "a copy: 100 %"))
        for path in copy.rglob("*"):
            os.utime(path, (1, 1))
        shutil.rmtree(root)
        again = build(copy, tmp_path / "cache")
        assert (again.shards, again.dataset.content) == (first.shards, first.dataset.content)

    def test_cameras_and_episodes_that_are_not_read_may_change(self, root: Path, tmp_path: Path) -> None:
        keys, episodes = KeyMap(cameras=("top",)), EpisodeSelection.of("0,2")
        for _ in range(2):
            build_cache(open_dataset(root, keys, episodes), ArithmeticEditor(), tmp_path / "cache", FLOAT32, SETTINGS)
            replace_video(root, WRIST, 1, "wrist")
            replace_video(root, TOP, 1)
        assert not any("000001" in line or "wrist" in line for line in recorded(tmp_path / "cache"))

    def test_a_file_that_is_replaced_during_the_build_stops_it(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(CacheError, match=f"the dataset changed during the build: {TOP} was replaced"):
            build(root, tmp_path / "cache", on_start=lambda plan: replace_video(root, TOP, 1))


class TestParts:
    def test_a_part_of_another_recording_is_refused(self, root: Path, tmp_path: Path) -> None:
        build(root, tmp_path / "cache", BuildPart(index=0, count=2))
        replace_video(root, TOP, 1)
        with pytest.raises(CacheError, match=f"{TOP} was replaced"):
            build(root, tmp_path / "cache", BuildPart(index=1, count=2))

    def test_parts_of_two_recordings_are_not_merged(self, root: Path, tmp_path: Path) -> None:
        build(root, tmp_path / "a", BuildPart(index=0, count=2))
        replace_video(root, TOP, 1)
        build(root, tmp_path / "b", BuildPart(index=1, count=2))
        with pytest.raises(CacheError, match=f"built from different files of the dataset: {TOP} was replaced"):
            merge_cache(tmp_path / "a", [tmp_path / "b"])

    def test_merged_parts_equal_one_build(self, root: Path, tmp_path: Path) -> None:
        build(root, tmp_path / "whole")
        for index, folder in enumerate(("a", "b")):
            build(root, tmp_path / folder, BuildPart(index=index, count=2))
        assert len(recorded(tmp_path / "a")) < 9
        merge_cache(tmp_path / "a", [tmp_path / "b"])
        assert files(tmp_path / "a") == files(tmp_path / "whole")

    def test_merging_with_a_part_of_an_older_imagewam_warns(self, root: Path, tmp_path: Path) -> None:
        for index in range(2):
            build(root, tmp_path / "cache", BuildPart(index=index, count=2))
        forget_files(tmp_path / "cache", BuildPart(index=1, count=2).manifest)
        with pytest.warns(ImagewamWarning, match="was built by an older imagewam"):
            merge_cache(tmp_path / "cache")
        assert read_manifest(tmp_path / "cache").dataset.content is None

    def test_a_worker_that_sees_other_files_is_refused(self, root: Path, tmp_path: Path) -> None:
        job = FileJob(root, tmp_path / "cache")
        facts = Worker(job, 0, 1).facts
        pool = WorkerPool(None, out=job.out, identity=facts.dataset, content="0" * 32)  # type: ignore[arg-type]
        with pytest.raises(CacheError, match="worker 0 differs in its files of the dataset"):
            pool._require_same(facts, 0)


@dataclasses.dataclass(frozen=True)
class FileJob:
    """A job of a worker on a dataset in files."""

    root: Path
    out: Path

    def open(self, slot: int) -> tuple[ShardBuilder, list[str]]:
        return ShardBuilder(open_dataset(self.root), ArithmeticEditor(), self.out, FLOAT32, SETTINGS), []


class TestRecord:
    def test_the_record_holds_the_sha256_of_every_file(self, root: Path, tmp_path: Path) -> None:
        build(root, tmp_path / "cache")
        names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in (".mp4", ".parquet")]
        names = [name for name in names if "wrist" not in name]  # the editor sees `top` alone
        assert (tmp_path / "cache" / "dataset.sha256").read_bytes() == checksum_lines(checksums_of(root, names))

    def test_changes_are_found_at_the_old_and_at_a_new_place(self, root: Path, tmp_path: Path) -> None:
        build(root, tmp_path / "cache")
        storage, manifest = storage_at(tmp_path / "cache"), read_manifest(tmp_path / "cache")
        copy = Path(shutil.copytree(root, tmp_path / "copy"))
        assert changed_dataset_files(storage, manifest, copy) == []
        replace_video(copy, TOP, 1)
        (change,) = changed_dataset_files(storage, manifest, copy)
        assert (change.file, change.how) == (TOP, "was replaced")
        assert changed_dataset_files(storage, manifest, root) == []

    @pytest.mark.parametrize("name", ["dataset.sha256", "dataset_files.json"])
    def test_a_damaged_record_is_repaired(self, root: Path, tmp_path: Path, name: str) -> None:
        build(root, tmp_path / "cache")
        before = files(tmp_path / "cache")
        (tmp_path / "cache" / name).write_bytes(b"{}")
        damages = verify_cache(tmp_path / "cache")
        assert [damage.file for damage in damages] == [name]
        repair_cache(tmp_path / "cache", damages, open_dataset(root), ArithmeticEditor())
        assert files(tmp_path / "cache") == before

    def test_a_repair_from_replaced_files_is_refused(self, root: Path, tmp_path: Path) -> None:
        build(root, tmp_path / "cache")
        (tmp_path / "cache" / "shards" / "shard-00001.safetensors").unlink()
        damages = verify_cache(tmp_path / "cache")
        replace_video(root, TOP, 1)
        with pytest.raises(CacheError, match=f"the cache was built from other files of the dataset: {TOP} was"):
            repair_cache(tmp_path / "cache", damages, open_dataset(root), ArithmeticEditor())


def recorded(cache: Path) -> list[str]:
    """Return the lines of all checksum files of a cache."""
    return [line for path in cache.glob("*.sha256") for line in path.read_text(encoding="utf-8").splitlines()]


def forget_files(cache: Path, name: str) -> None:
    """Turn a manifest into one of an imagewam that did not record the files of the dataset."""
    storage = storage_at(cache)
    manifest = dict(manifests_at(storage))[name]
    older = {n: c for n, c in manifest.files.items() if "dataset" not in n}
    dataset = dataclasses.replace(manifest.dataset, content=None)
    put_manifest(storage, dataclasses.replace(manifest, files=older, dataset=dataset), name)
