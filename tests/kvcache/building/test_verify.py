"""Test `kvcache.building.verify`: every flipped byte is found, and repair restores the bytes by encoding few rows."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.kvcache.codecs.integer import INT4
from imagewam_cli.kvcache.format.manifest import MANIFEST
from imagewam_cli.kvcache.format.shard import Shard
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.lock import write_lock
from imagewam_cli.prefix.spec import KVSpec
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.faults import flip
from tests.support.folders import files

BESIDE = ["table.safetensors", "samples.safetensors"]


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cache"))


def repaired(folder: Path, editor: ArithmeticEditor | None = None) -> list[str]:
    return repair_cache(folder, verify_cache(folder), MemoryDataset(LENGTHS), editor or ArithmeticEditor())


def test_an_intact_cache_has_no_damage(built: Path) -> None:
    counted: list[int] = []
    assert verify_cache(built, on_rows=counted.append) == []
    assert sum(counted) == 15


def test_every_flipped_byte_is_found_and_never_returned_by_a_read(copy: Path) -> None:
    """Flip bytes of every file at seeded offsets. A damaged table or manifest is refused when it is read."""
    rng = np.random.default_rng(0)
    for name, content in files(copy).items():
        for offset in rng.integers(0, len(content), size=25):
            flip(copy / name, int(offset))
            if name == MANIFEST:
                with pytest.raises(CacheError):
                    verify_cache(copy)
            else:
                assert [damage.file for damage in verify_cache(copy)] == [name]
            if name != "samples.safetensors":  # the reader does not open the samples
                with pytest.raises(CacheError):
                    read_all(copy)
            (copy / name).write_bytes(content)
    read_all(copy)


def read_all(folder: Path) -> None:
    reader = CacheReader(folder)
    reader.read(np.arange(len(reader)))


@pytest.mark.parametrize("name", [*BESIDE, "shards/shard-00001.safetensors"])
@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_a_missing_or_truncated_file_is_named_and_repaired(built: Path, copy: Path, name: str, how: str) -> None:
    (copy / name).unlink() if how == "deleted" else os.truncate(copy / name, 60)
    (damage,) = verify_cache(copy)
    assert damage.file == name
    assert damage.rows is None
    assert not repaired(copy)
    assert files(copy) == files(built)


def test_only_the_batches_with_damaged_rows_are_computed_again(built: Path, copy: Path) -> None:
    path = copy / "shards" / "shard-00001.safetensors"
    shard = Shard.open(path)
    flip(path, shard.offsets["layer.1.k"] + 4 * shard.layout.parts["layer.1.k"].row_bytes)
    (damage,) = verify_cache(copy)
    assert (damage.rows, damage.what) == ((4,), "1 of 5 rows differ from their checksums (dataset rows 13)")
    editor = ArithmeticEditor()
    assert not repaired(copy, editor)
    assert editor.encoded == 2, "only the damaged batch of 2 rows is encoded, not the batch of 3"
    assert files(copy) == files(built)


def test_everything_damaged_at_once_is_repaired(built: Path, copy: Path) -> None:
    for name in files(copy):
        if name != MANIFEST:
            flip(copy / name, -1)
    assert len(verify_cache(copy)) == 2 + 4
    assert not repaired(copy)
    assert files(copy) == files(built)


def test_quantized_rows_are_repaired_to_the_same_bytes(tmp_path: Path) -> None:
    codec: Codec = INT4
    build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), tmp_path / "cache", codec, SETTINGS)
    before = files(tmp_path / "cache")
    flip(tmp_path / "cache" / "shards" / "shard-00000.safetensors", -1)
    assert not repaired(tmp_path / "cache")
    assert files(tmp_path / "cache") == before


def test_a_repair_to_other_bytes_is_reported_and_leaves_a_valid_cache(copy: Path) -> None:
    """The editor computes other numbers with the same fingerprint, as another library version might."""
    path = copy / "shards" / "shard-00003.safetensors"
    flip(path, -1)
    other = ArithmeticEditor(
        spoil=lambda p: dataclasses.replace(p, layers=tuple(type(kv)(kv.k * 1.5, kv.v) for kv in p.layers))
    )
    assert repaired(copy, other) == ["shard-00003.safetensors"]
    assert not verify_cache(copy)
    read_all(copy)


@pytest.mark.parametrize(
    ("dataset", "editor", "what"),
    [
        (MemoryDataset(LENGTHS, identity="another"), ArithmeticEditor(), "dataset"),
        (MemoryDataset(LENGTHS), ArithmeticEditor(weights="trained longer"), "editor weights"),
    ],
)
def test_another_dataset_or_editor_repairs_nothing(
    copy: Path, dataset: MemoryDataset, editor: ArithmeticEditor, what: str
) -> None:
    flip(copy / "shards" / "shard-00000.safetensors", -1)
    before = files(copy)
    with pytest.raises(CacheError, match=f"differs in its {what}: .+ in the cache, .+ here"):
        repair_cache(copy, verify_cache(copy), dataset, editor)
    assert files(copy) == before


def test_a_dataset_changed_under_the_same_identity_does_not_replace_the_table(copy: Path) -> None:
    flip(copy / "table.safetensors", -1)
    before = files(copy)
    with pytest.raises(CacheError, match=r"table\.safetensors, when recomputed, differs from the cache's"):
        repair_cache(copy, verify_cache(copy), MemoryDataset(LENGTHS, shift=1.0), ArithmeticEditor())
    assert files(copy) == before


def test_a_deleted_folder_of_shards_is_repaired(built: Path, copy: Path) -> None:
    shutil.rmtree(copy / "shards")
    assert len(verify_cache(copy)) == 4
    assert not repaired(copy)
    assert files(copy) == files(built)


def test_a_folder_in_place_of_a_shard_is_reported_with_other_damage(copy: Path) -> None:
    path = copy / "shards" / "shard-00001.safetensors"
    path.unlink()
    path.mkdir()
    flip(copy / "shards" / "shard-00003.safetensors", -1)
    assert [damage.file for damage in verify_cache(copy)] == [f"shards/shard-0000{i}.safetensors" for i in (1, 3)]


def test_another_layout_repairs_nothing(copy: Path) -> None:
    """A plugin version that declares positions gives other int4 bytes for the same keys."""
    flip(copy / "shards" / "shard-00000.safetensors", -1)

    class Wider(ArithmeticEditor):
        @property
        def spec(self) -> KVSpec:
            return dataclasses.replace(super().spec, image_size=(8, 8))

    with pytest.raises(CacheError, match="differs in its prefix layout"):
        repair_cache(copy, verify_cache(copy), MemoryDataset(LENGTHS), Wider())


def test_build_and_repair_hold_the_lock(tmp_path: Path, built: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "cache"))
    with write_lock(folder):
        with pytest.raises(CacheError, match="being written by process"):
            build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), folder, FLOAT32, SETTINGS)
        with pytest.raises(CacheError, match="being written by process"):
            repair_cache(folder, [], MemoryDataset(LENGTHS), ArithmeticEditor())
