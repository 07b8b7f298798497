"""Test merging independently built parts: the result equals a single build, byte for byte."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.editors.contract import WeightsIdentity
from imagewam_cli.errors import CacheError, UsageError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.merge import merge_cache
from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.kvcache.codecs.pca import PCA2
from imagewam_cli.kvcache.format.manifest import CODEC, BuildPart
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.storage.manifests import read_manifest
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.faults import stop_after
from tests.support.folders import files


def build_part(
    out: Path, index: int, count: int = 3, editor: ArithmeticEditor | None = None, codec: Codec = FLOAT32
) -> ArithmeticEditor:
    worker = editor or ArithmeticEditor()
    shard_mb = SETTINGS.shard_mb if codec is FLOAT32 else 0.0009
    settings = dataclasses.replace(SETTINGS, part=BuildPart(index=index, count=count), shard_mb=shard_mb)
    build_cache(MemoryDataset(LENGTHS), worker, out, codec, settings)
    return worker


class Elsewhere(ArithmeticEditor):
    """An editor on a machine that rounds differently, with weights from another folder."""

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        exact = super().encode(images, instructions)
        return PrefixKV(tuple(LayerKV(kv.k * (1 + 1e-6), kv.v) for kv in exact.layers), exact.valid)

    @property
    def weights(self) -> WeightsIdentity:
        return dataclasses.replace(super().weights, revision="main")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_merged_parts_equal_a_single_build(built: Path, tmp_path: Path, order: tuple[int, ...]) -> None:
    rows = [build_part(tmp_path / "cache", index).encoded for index in order]
    assert sum(rows) == 15, "the parts share or lack rows"
    merge_cache(tmp_path / "cache")
    assert files(tmp_path / "cache") == files(built)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_any_number_of_parts_gives_the_same_bytes(built: Path, tmp_path: Path, count: int) -> None:
    for index in range(count):
        build_part(tmp_path / "cache", index, count)
    merge_cache(tmp_path / "cache")
    assert files(tmp_path / "cache") == files(built)


def test_parts_in_separate_folders_are_copied(built: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(index) for index in range(3)]
    for index, folder in enumerate(folders):
        build_part(folder, index)
    before = [files(folder) for folder in folders]
    merge_cache(tmp_path / "cache", folders)
    assert files(tmp_path / "cache") == files(built)
    assert [files(folder) for folder in folders] == before


def test_a_reader_reads_unmerged_parts_as_one_cache(built: Path, tmp_path: Path) -> None:
    for index in range(3):
        build_part(tmp_path / "cache", index)
    there, here = CacheReader(built), CacheReader(tmp_path / "cache")
    assert here.manifest.complete
    everything = np.arange(len(there))
    for a, b in zip(there.read(everything).layers, here.read(everything).layers, strict=True):
        assert np.array_equal(a.k.numpy(), b.k.numpy())
    assert not verify_cache(tmp_path / "cache")


def test_a_stopped_part_resumes_and_a_finished_one_is_not_changed(built: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "cache", dataclasses.replace(SETTINGS, part=BuildPart(index=1, count=2))
    build_part(out, 0, 2)
    with pytest.raises(KeyboardInterrupt):
        build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), out, FLOAT32, settings, on_rows=stop_after(1))
    assert not read_manifest(out).complete
    build_part(out, 1, 2)
    assert build_part(out, 0, 2).encoded == 0
    merge_cache(out)
    assert files(out) == files(built)


def test_parts_can_be_merged_before_all_are_finished(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    build_part(out, 0)
    assert not merge_cache(out).complete
    for index in (1, 2):
        build_part(out, index)
    assert merge_cache(out).complete
    merge_cache(out)
    assert files(out) == files(built)


def test_readers_see_merged_parts_and_later_ones(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    build_part(out, 0)
    merge_cache(out)
    build_part(out, 1)
    build_part(out, 2)
    assert CacheReader(out).manifest.complete
    build_cache(MemoryDataset(LENGTHS), editor := ArithmeticEditor(), out, FLOAT32, SETTINGS)
    assert editor.encoded == 0, "the full build encoded rows that the parts already have"
    merge_cache(out)
    assert files(out) == files(built)


def test_all_parts_share_a_fitted_codec_and_a_rerun_keeps_it(tmp_path: Path) -> None:
    """Fitting the codec again would give other axes, which could not decode the existing shards."""
    out = tmp_path / "cache"
    for index in range(2):
        build_part(out, index, 2, codec=PCA2)
    merge_cache(out)
    before = files(out)
    assert build_part(out, 0, 2, Elsewhere(), PCA2).encoded == 0
    assert files(out)[CODEC] == before[CODEC]
    merge_cache(out)
    assert files(out) == before


def test_parts_of_machines_that_round_differently_share_one_codec(tmp_path: Path) -> None:
    out = tmp_path / "cache"
    build_part(out, 0, 2, codec=PCA2)
    codec = files(out)[CODEC]
    build_part(out, 1, 2, Elsewhere(), PCA2)
    assert files(out)[CODEC] == codec
    assert merge_cache(out).complete
    assert verify_cache(out) == []


def test_parts_may_have_dataset_and_weights_in_other_folders(tmp_path: Path) -> None:
    out, dataset = tmp_path / "cache", MemoryDataset(LENGTHS)
    build_part(out, 0, 2)
    dataset.info = dataclasses.replace(dataset.info, root=Path("elsewhere"))
    settings = dataclasses.replace(SETTINGS, part=BuildPart(index=1, count=2))
    build_cache(dataset, Elsewhere(), out, FLOAT32, settings)
    assert len(CacheReader(out)) == 15
    assert merge_cache(out).complete


def test_parts_that_were_repaired_can_be_merged(tmp_path: Path) -> None:
    """Rebuild a shard to other bytes, as another machine would."""
    out = tmp_path / "cache"
    for index in range(2):
        build_part(out, index, 2)
    path = out / "shards" / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert repair_cache(out, verify_cache(out), MemoryDataset(LENGTHS), Elsewhere()) == [path.name]
    merge_cache(out)
    assert verify_cache(out) == []


def test_copied_shards_are_flushed_before_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(2):
        build_part(tmp_path / str(index), index, 2)
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    merge_cache(tmp_path / "cache", [tmp_path / "0", tmp_path / "1"])
    shards = [f"shard-0000{i}.safetensors.partial" for i in range(4)]
    assert [name for name in synced if name in shards] == shards
    assert synced.index("manifest.json.partial") > max(synced.index(name) for name in shards)


def test_a_cache_and_its_parts_cannot_be_written_at_once(tmp_path: Path) -> None:
    """Parts of another count, and a merge, are refused too: each would write the other's shards."""
    out = tmp_path / "cache"

    def meanwhile(rows: int) -> None:
        for other in (0, 1):
            with pytest.raises(CacheError, match="is being written by"):
                build_part(out, other, 2)
        with pytest.raises(CacheError, match="is being written by"):
            merge_cache(out)

    build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), out, FLOAT32, SETTINGS, on_rows=meanwhile)
    shutil.rmtree(out)

    def beside_a_part(rows: int) -> None:
        with pytest.raises(CacheError, match="is being written by"):
            build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), out, FLOAT32, SETTINGS)
        with pytest.raises(CacheError, match="is being written by"):
            build_part(out, 0, 2)

    settings = dataclasses.replace(SETTINGS, part=BuildPart(index=0, count=3))
    build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), out, FLOAT32, settings, on_rows=beside_a_part)


def test_parts_of_different_editors_are_refused_with_the_difference(tmp_path: Path) -> None:
    for index in range(2):
        build_part(tmp_path / str(index), index, 2, ArithmeticEditor(timestep=0.5 * index))
    with pytest.raises(CacheError, match=r"to different caches: setting 'timestep' is 0\.0 in one and 0\.5"):
        merge_cache(tmp_path / "cache", [tmp_path / "0", tmp_path / "1"])
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_damaged_part_is_not_merged(tmp_path: Path) -> None:
    for index in range(3):
        build_part(tmp_path / "cache", index)
    (tmp_path / "cache" / "shards" / "shard-00002.safetensors").unlink()
    with pytest.raises(CacheError, match=r"shard-00002\.safetensors is missing"):
        merge_cache(tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_folder_without_parts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="contains no part of a cache"):
        merge_cache(tmp_path)


def test_a_whole_cache_can_be_merged_with_itself(built: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "cache"))
    merge_cache(out)
    assert files(out) == files(built)


@pytest.mark.parametrize(("index", "count"), [(3, 3), (-1, 3), (0, 0)])
def test_a_part_number_out_of_range_is_refused(index: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"part {index} of {count} does not exist"):
        BuildPart(index=index, count=count)
