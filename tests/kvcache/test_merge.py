"""Parts built by workers that know nothing of each other: merged, they are the single build, byte for byte."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.kvcache.build import build_cache
from imagewam_cli.kvcache.codec import FLOAT32
from imagewam_cli.kvcache.manifest import Share, read_manifest
from imagewam_cli.kvcache.merge import merge_cache
from imagewam_cli.kvcache.reader import CacheReader
from imagewam_cli.kvcache.verify import verify_cache

from .conftest import LENGTHS, SETTINGS
from .doubles import ArithmeticEditor, MemoryDataset
from .test_build import files, stop_after


def build_part(out: Path, index: int, count: int = 3, editor: ArithmeticEditor | None = None) -> ArithmeticEditor:
    worker = editor or ArithmeticEditor()
    settings = dataclasses.replace(SETTINGS, share=Share(index=index, count=count))
    build_cache(MemoryDataset(LENGTHS), worker, out, FLOAT32, settings)
    return worker


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merged_parts_are_the_single_build(built: Path, tmp_path: Path, order: tuple[int, ...]) -> None:
    rows = [build_part(tmp_path / "cache", index).encoded for index in order]
    assert sum(rows) == 15, "no row twice"
    merge_cache(tmp_path / "cache")
    assert files(tmp_path / "cache") == files(built)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_any_number_of_parts_gives_the_same(built: Path, tmp_path: Path, count: int) -> None:
    for index in range(count):
        build_part(tmp_path / "cache", index, count)
    merge_cache(tmp_path / "cache")
    assert files(tmp_path / "cache") == files(built)


def test_parts_in_folders_of_their_own_are_copied(built: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(index) for index in range(3)]
    for index, folder in enumerate(folders):
        build_part(folder, index)
    before = [files(folder) for folder in folders]
    merge_cache(tmp_path / "cache", folders)
    assert files(tmp_path / "cache") == files(built)
    assert [files(folder) for folder in folders] == before


def test_a_reader_unites_parts_on_the_fly(built: Path, tmp_path: Path) -> None:
    for index in range(3):
        build_part(tmp_path / "cache", index)
    there, here = CacheReader(built), CacheReader(tmp_path / "cache")
    assert here.manifest.complete
    everything = np.arange(len(there))
    for a, b in zip(there.read(everything).layers, here.read(everything).layers, strict=True):
        assert np.array_equal(a.k.numpy(), b.k.numpy())
    assert not verify_cache(tmp_path / "cache")


def test_a_stopped_part_goes_on_and_a_finished_one_is_left_alone(built: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "cache", dataclasses.replace(SETTINGS, share=Share(index=1, count=2))
    build_part(out, 0, 2)
    with pytest.raises(KeyboardInterrupt):
        build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), out, FLOAT32, settings, on_rows=stop_after(1))
    assert not read_manifest(out).complete
    build_part(out, 1, 2)
    assert build_part(out, 0, 2).encoded == 0
    merge_cache(out)
    assert files(out) == files(built)


def test_merging_what_is_there_first_and_the_rest_later(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    build_part(out, 0)
    assert not merge_cache(out).complete
    for index in (1, 2):
        build_part(out, index)
    assert merge_cache(out).complete
    merge_cache(out)
    assert files(out) == files(built)


def test_parts_of_different_editors_are_refused_with_what_differs(tmp_path: Path) -> None:
    for index in range(2):
        build_part(tmp_path / str(index), index, 2, ArithmeticEditor(timestep=0.5 * index))
    with pytest.raises(CacheError, match=r"of different caches: .*timestep is 0\.0 and 0\.5"):
        merge_cache(tmp_path / "cache", [tmp_path / "0", tmp_path / "1"])
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_damaged_part_is_not_merged(tmp_path: Path) -> None:
    for index in range(3):
        build_part(tmp_path / "cache", index)
    (tmp_path / "cache" / "shards" / "shard-00002.safetensors").unlink()
    with pytest.raises(CacheError, match=r"shard-00002\.safetensors is missing"):
        merge_cache(tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_nothing_to_merge_is_told(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="has no part of a cache"):
        merge_cache(tmp_path)


def test_a_whole_cache_can_be_merged_with_itself(built: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "cache"))
    merge_cache(out)
    assert files(out) == files(built)


@pytest.mark.parametrize(("index", "count"), [(3, 3), (-1, 3), (0, 0)])
def test_there_is_no_such_part(index: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"no part {index} of {count}"):
        Share(index=index, count=count)
