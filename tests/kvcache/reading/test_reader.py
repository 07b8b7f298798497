"""Test `kvcache.reading.reader` against safetensors reading the same shards."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.building.verify import verify_cache
from imagewam_cli.kvcache.codecs.cast import BFLOAT16, FLOAT16, FLOAT32, CastCodec
from imagewam_cli.kvcache.format import row_copy
from imagewam_cli.kvcache.format.manifest import with_checksum
from imagewam_cli.kvcache.format.shard import Shard
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.storage.manifests import read_manifest
from imagewam_cli.prefix.kv import PrefixKV
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset

ROWS = 15


def resign(folder: Path, values: dict[str, Any]) -> None:
    """Write a manifest of these values with a valid checksum."""
    (folder / "manifest.json").write_bytes(with_checksum({k: v for k, v in values.items() if k != "checksum"}))


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all shards, concatenated, as safetensors reads them."""
    parts = [load_file(path) for path in sorted((folder / "shards").iterdir())]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(params=[1, row_copy._TWO_THREADS_FROM], ids=["two threads", "one thread"])
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_copy, "_TWO_THREADS_FROM", request.param)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    "indices",
    [[0], [14], list(range(ROWS)), list(range(ROWS))[::-1], [9, 2, 14, 2, 9, 0], [7, 7, 7], [4, 3, 2]],
)
def test_rows_in_any_order_equal_those_of_safetensors(built: Path, indices: list[int]) -> None:
    expected = everything(built)
    prefix = CacheReader(built).read(np.array(indices))
    assert prefix.valid is not None
    assert torch.equal(prefix.valid, expected["valid"][indices])
    for i, layer in enumerate(prefix.layers):
        assert torch.equal(layer.k, expected[f"layer.{i}.k"][indices])
        assert torch.equal(layer.v, expected[f"layer.{i}.v"][indices])


def test_random_rows_equal_those_of_safetensors(built: Path) -> None:
    expected, reader = everything(built), CacheReader(built)
    rng = np.random.default_rng(0)
    for _ in range(20):
        indices = rng.integers(0, ROWS, size=rng.integers(1, 40))
        assert torch.equal(reader.read(indices).layers[1].v, expected["layer.1.v"][indices])


@pytest.mark.parametrize("codec", [FLOAT32, BFLOAT16, FLOAT16])
def test_stored_numbers_are_read_as_float32(tmp_path: Path, codec: CastCodec) -> None:
    build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), tmp_path / "cache", codec, SETTINGS)
    expected = everything(tmp_path / "cache")["layer.0.k"]
    found = CacheReader(tmp_path / "cache").read(np.arange(ROWS)).layers[0].k
    assert expected.dtype == codec.dtype
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


def test_all_tokens_of_a_batch_without_a_mask_are_valid(tmp_path: Path) -> None:
    """An editor may omit the mask of a batch without padding; other batches keep theirs."""

    def some(prefix: PrefixKV) -> PrefixKV:
        assert prefix.valid is not None
        return PrefixKV(prefix.layers, None if bool(prefix.valid[:, 1].all()) else prefix.valid)

    dataset = MemoryDataset((3, 3, 3))  # the third instruction is one word
    build_cache(dataset, ArithmeticEditor(spoil=some), tmp_path / "cache", FLOAT32, BuildSettings(batch=3))
    valid = CacheReader(tmp_path / "cache").read(np.array([0, 4, 8])).valid
    assert valid is not None
    assert valid.all(1).tolist() == [True, True, False]


def test_the_index_has_the_frame_of_each_row(built: Path) -> None:
    expected, index = everything(built), CacheReader(built).index
    for key in ("row", "episode", "frame", "instruction"):
        np.testing.assert_array_equal(getattr(index, key), expected[key].numpy())


@pytest.mark.parametrize("index", [ROWS, -1, 1000])
def test_a_row_out_of_range_is_an_error(built: Path, index: int) -> None:
    with pytest.raises(IndexError):
        CacheReader(built).read(np.array([0, index]))


def test_a_missing_shard_is_reported_only_when_its_rows_are_read(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "cache")
    (folder / "shards" / "shard-00001.safetensors").unlink()
    reader = CacheReader(folder)
    reader.read(np.array([0, 1, 2]))
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors is missing"):
        reader.read(np.array([0, 3]))


def test_a_shard_of_another_size_is_refused_with_both_sizes(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "cache")
    path = folder / "shards" / "shard-00000.safetensors"
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CacheError, match=f"has {size + 4} bytes, but the manifest lists {size}"):
        CacheReader(folder).read(np.array([0]))


def test_a_shard_with_another_number_of_heads_than_in_the_manifest_is_refused(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "cache"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["spec"]["layers"][1]["kv_heads"] *= 2
    resign(folder, manifest)
    with pytest.raises(CacheError, match=r"layer\.1\.[kv] is .*, but the manifest implies"):
        CacheReader(folder).read(np.array([0]))


def test_tensors_in_another_order_are_refused(built: Path, tmp_path: Path) -> None:
    """K and V have the same size, so a shard with K and V swapped can still have valid checksums."""
    folder = Path(shutil.copytree(built, tmp_path / "cache"))
    path = folder / "shards" / "shard-00000.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    k, v = header["layer.0.k"], header["layer.0.v"]
    k["data_offsets"], v["data_offsets"] = v["data_offsets"], k["data_offsets"]
    path.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + data[8 + length :])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["checksum"] = Shard.open(path).head_checksum
    resign(folder, manifest)
    with pytest.raises(CacheError, match="its tensors are not in the order that the format requires"):
        CacheReader(folder).read(np.array([0]))


def test_a_batch_is_one_block_of_memory(built: Path) -> None:
    reader, expected = CacheReader(built), everything(built)
    gathered = reader.gather(np.array([1, 4]))
    assert list(gathered) == ["rows"]
    for name, tensor in reader.tensors(gathered).items():
        assert tensor.untyped_storage().data_ptr() == gathered["rows"].untyped_storage().data_ptr()
        assert torch.equal(tensor, expected[name][[1, 4]])


def test_swapped_shards_are_refused(built: Path, tmp_path: Path) -> None:
    """Both shards are valid and of equal size."""
    folder = Path(shutil.copytree(built, tmp_path / "cache"))
    one, two = (folder / "shards" / f"shard-0000{i}.safetensors" for i in (0, 2))
    assert one.stat().st_size == two.stat().st_size
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    with pytest.raises(CacheError, match="the checksum of its head"):
        CacheReader(folder).read(np.array([0]))
    manifest = json.loads((folder / "manifest.json").read_text())
    first, third = manifest["shards"][0], manifest["shards"][2]
    first["checksum"], third["checksum"] = third["checksum"], first["checksum"]
    resign(folder, manifest)
    with pytest.raises(CacheError, match="holds other rows than the manifest lists: row differs"):
        CacheReader(folder).read(np.array([0]))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("method", ["mmap", "read"])
def test_one_flipped_bit_is_found(built: Path, tmp_path: Path, method: Any) -> None:
    folder = shutil.copytree(built, tmp_path / "cache")
    path = folder / "shards" / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    reader = CacheReader(folder, method)
    reader.read(np.arange(8))
    row = reader.index.row[10]
    for order in (np.arange(11), np.arange(10, -1, -1)):  # the row is read in the second half, then in the first
        with pytest.raises(CacheError, match=f"dataset rows {row} differ from their checksums"):
            reader.read(order)


@pytest.mark.parametrize("method", ["mmap", "read"])
def test_few_shards_stay_open_and_their_rows_are_checked_only_once(
    built: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    checksum = Mock(wraps=xxhash.xxh3_64_intdigest)
    monkeypatch.setattr(row_copy.xxhash, "xxh3_64_intdigest", checksum)
    expected, reader = everything(built), CacheReader(built, method, open_shards=2)
    for _ in range(3):
        assert torch.equal(reader.read(np.arange(ROWS)).layers[0].k, expected["layer.0.k"])
        assert len(reader._open) == 2
    assert checksum.call_count == ROWS


def test_a_batch_in_use_is_not_overwritten_by_the_next(built: Path) -> None:
    reader, expected = CacheReader(built), everything(built)["layer.0.k"]
    held = [reader.read(np.array([i])).layers[0].k for i in range(ROWS)]
    assert all(torch.equal(k, expected[i : i + 1]) for i, k in enumerate(held))


def test_several_threads_can_share_a_reader(built: Path) -> None:
    reader, expected = CacheReader(built, open_shards=1), everything(built)["layer.1.v"]
    orders = [np.random.default_rng(i).permutation(ROWS) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for rows, prefix in zip(orders, pool.map(reader.read, orders), strict=True):
            assert torch.equal(prefix.layers[1].v, expected[rows])


def test_a_growing_cache_is_readable_after_each_shard(tmp_path: Path) -> None:
    """A shard is listed while the next one is computed."""
    folder, readable = tmp_path / "cache", []
    known = iter((0, 3, 3, 8, 11, 11))  # rows of finished shards, batch by batch: 3 | 3 + 2 | 3 | 3 + 1

    def look(rows: int) -> None:
        expected, until = next(known), time.monotonic() + 30
        while (there := read_manifest(folder).rows) < expected and time.monotonic() < until:
            time.sleep(0.001)  # a background thread is still writing the shard
        if there:
            reader = CacheReader(folder)
            assert not verify_cache(folder)
            assert len(reader.index.row) == len(reader)
            reader.read(np.arange(len(reader)))
            readable.append(len(reader))

    build_cache(MemoryDataset(LENGTHS), ArithmeticEditor(), folder, FLOAT32, SETTINGS, on_rows=look)
    assert readable == [3, 3, 8, 11, 11]


def test_a_cache_without_a_finished_shard_is_a_clear_error(built: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "cache")
    resign(folder, json.loads((folder / "manifest.json").read_text()) | {"shards": []})
    with pytest.raises(CacheError, match="no finished shard"):
        CacheReader(folder)


@pytest.mark.parametrize("size", [0, 5, 200])
def test_a_damaged_table_is_a_clear_error(built: Path, tmp_path: Path, size: int) -> None:
    folder = shutil.copytree(built, tmp_path / "cache")
    os.truncate(folder / "table.safetensors", size)
    with pytest.raises(CacheError, match=r"table\.safetensors is damaged"):
        _ = CacheReader(folder).table
