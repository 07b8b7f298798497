"""Test `kvcache.format.shard`: atomic writes, damaged files, wrong headers. The reference is safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.kvcache.format.row_layout import RowLayout
from imagewam_cli.kvcache.format.shard import INDEX_KEYS, Shard, ShardWriter
from tests.support.faults import out_of_space

ROWS = 5


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(ROWS, 3, 2, 4, generator=generator)
    return {
        "valid": k[:, :, 0, 0] > 0,  # one byte per number, given before wider ones
        "layer.0.k": k,
        "layer.0.v": k.to(torch.bfloat16),
        "layer.1.k": k.half(),
        "layer.1.v": k[:, :1].transpose(2, 3),  # not contiguous
        "layer.2.k": k.to(torch.float8_e4m3fn),
        "layer.2.v": (k * 50).to(torch.int8).view(torch.uint8),
    }


def index(rows: range) -> dict[str, list[int]]:
    return {name: [10 * i + j for j in rows] for i, name in enumerate(INDEX_KEYS)}


def write(path: Path, tensors: dict[str, torch.Tensor], cut: int = 2) -> tuple[int, str]:
    """Write a shard in two pieces; return its size and checksum."""
    with ShardWriter(path, ROWS, {name: Part(tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()}) as writer:
        for rows in (range(cut), range(cut, ROWS)):
            writer.append(index(rows), {name: t[rows.start : rows.stop] for name, t in tensors.items()})
        return writer.bytes, writer.finish()


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "shard.safetensors"
    write(path, tensors)
    return path


def test_safetensors_reads_back_what_was_written(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    back = load_file(path)
    assert back.keys() == tensors.keys() | set(INDEX_KEYS) | {"checksum"}
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.contiguous().view(torch.uint8))
    for name, numbers in index(range(ROWS)).items():
        assert back[name].tolist() == numbers


def test_the_file_does_not_depend_on_the_batches_of_rows(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert write(tmp_path / "a", tensors, 1) == write(tmp_path / "b", tensors, 4)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_checksums_cover_the_bytes_in_file_order(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Compute the checksums as docs/reference/cache-format.md specifies, from the file alone."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    offsets = {name: [start + x for x in entry["data_offsets"]] for name, entry in header.items()}
    for i, found in enumerate(load_file(path)["checksum"].numpy()):
        row = b""
        for name in sorted(tensors, key=lambda name: offsets[name][0]):
            size = (offsets[name][1] - offsets[name][0]) // ROWS
            row += data[offsets[name][0] + i * size :][:size]
        assert int(found) == xxhash.xxh3_64_intdigest(row)
    head = data[: start + 48 * ROWS]
    assert max(offsets[name][1] for name in (*INDEX_KEYS, "checksum")) == len(head)
    assert Shard.open(path).head_checksum == xxhash.xxh3_128_hexdigest(head)


def test_every_tensor_is_aligned_to_its_dtype(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    shard = Shard.open(path)
    for name, tensor in tensors.items():
        assert shard.offsets[name] % tensor.element_size() == 0


@pytest.mark.parametrize("rows", [1, 2, ROWS])
def test_the_first_tensor_after_the_index_begins_at_a_cache_line(
    tmp_path: Path, tensors: dict[str, torch.Tensor], rows: int
) -> None:
    with ShardWriter(tmp_path / "x", rows, {"layer.0.k": Part((3, 2, 4), torch.float32)}) as writer:
        writer.append(index(range(rows)), {"layer.0.k": tensors["layer.0.k"][:rows]})
        writer.finish()
    assert Shard.open(tmp_path / "x").offsets["layer.0.k"] % 64 == 0


def test_a_gap_between_tensors_is_refused(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    last = max(header, key=lambda name: header[name]["data_offsets"][0])
    header[last]["data_offsets"] = [at + 4 for at in header[last]["data_offsets"]]
    path.write_bytes(file_of(json.dumps(header).encode(), data[8 + length :] + bytes(4)))
    with pytest.raises(CacheError, match=rf"is damaged: {last} begins at \d+, but the preceding tensor ends at \d+"):
        Shard.open(path)


def test_narrow_numbers_before_wide_ones_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide numbers would begin at unaligned offsets, in the file or in a row."""
    monkeypatch.setattr(RowLayout, "from_parts", RowLayout)
    write(tmp_path / "x", {name: tensors[name] for name in ("valid", "layer.0.k")})
    with pytest.raises(CacheError, match="its tensors are not ordered by dtype, widest first"):
        Shard.open(tmp_path / "x")


def test_a_file_that_shrinks_during_a_read_is_an_error(path: Path) -> None:
    shard = Shard.open(path, "read")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CacheError, match=r"shard\.safetensors ends before byte"):
        shard.read(np.array([ROWS - 1]))


def test_size_and_checksum_are_those_of_the_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "shard.safetensors"
    size, checksum = write(path, tensors)
    assert size == path.stat().st_size
    assert checksum == Shard.open(path).head_checksum


@pytest.mark.parametrize("method", ["mmap", "read"])
def test_selected_rows_equal_those_of_safetensors(path: Path, method: Any) -> None:
    rows = [4, 0, 0, 3]
    found, expected = Shard.open(path, method).read(np.array(rows)), load_file(path)
    assert found.keys() == expected.keys() - set(INDEX_KEYS) - {"checksum"}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.view(torch.uint8), expected[name][rows].view(torch.uint8))


@pytest.mark.parametrize("method", ["mmap", "read"])
@pytest.mark.parametrize("name", ["layer.0.k", "layer.1.v", "layer.2.v", "valid"])
def test_a_flipped_bit_is_reported_for_its_row_only(path: Path, method: Any, name: str) -> None:
    damaged, data = 3, bytearray(path.read_bytes())
    shard = Shard.open(path)
    data[shard.offsets[name] + damaged * shard.layout.parts[name].row_bytes] ^= 16
    path.write_bytes(data)
    shard = Shard.open(path, method)
    assert shard.damaged_rows().tolist() == [damaged]
    shard.read(np.array([0, 1, 2, 4]))
    with pytest.raises(CacheError, match=r"is damaged: dataset rows 3 differ from their checksums"):
        shard.read(np.array([4, 3]))


def test_partial_writes_are_continued(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call may write fewer bytes than requested."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, data[:10], at))
    write(tmp_path / "pieces", tensors)
    monkeypatch.undo()
    write(tmp_path / "whole", tensors)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_more_rows_than_declared_are_refused_before_they_are_written(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    parts = {name: Part(tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()}
    with ShardWriter(tmp_path / "x", 3, parts) as writer:
        with pytest.raises(
            CacheError, match="should have 3 rows according to the dataset's metadata, but got more than 3"
        ):
            writer.append(index(range(ROWS)), tensors)
        assert (tmp_path / "x.partial").stat().st_size == 0


def test_fewer_rows_than_declared_leave_no_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    parts = {name: Part(tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()}
    with ShardWriter(tmp_path / "x", ROWS, parts) as writer:
        writer.append(index(range(2)), {name: t[:2] for name, t in tensors.items()})
        with pytest.raises(CacheError, match="should have 5 rows according to the dataset's metadata, but got 2"):
            writer.finish()
    assert not list(tmp_path.iterdir())


def test_an_index_that_does_not_follow_the_header_is_refused(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["row"]["data_offsets"], header["layer.0.k"] = header["layer.0.k"]["data_offsets"], header["row"]
    header["row"]["data_offsets"][1] = header["row"]["data_offsets"][0] + 8 * ROWS
    path.write_bytes(file_of(json.dumps(header).encode(), data[8 + length :]))
    with pytest.raises(CacheError, match="is damaged"):
        Shard.open(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"gone\.safetensors is missing"):
        Shard.open(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("size", [0, 4, 8, 9, 100])
def test_a_file_truncated_in_its_header_is_damaged(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(CacheError, match="is damaged"):
        Shard.open(path)


def test_a_file_truncated_in_its_tensors_is_damaged(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CacheError, match=r"is damaged: a tensor ends at \d+, the file at \d+"):
        Shard.open(path)


@pytest.mark.parametrize("claim", [0, 1, 2**20, 2**40, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(path: Path, claim: int) -> None:
    path.write_bytes(claim.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CacheError, match=f"its header claims {claim} bytes of {path.stat().st_size}"):
        Shard.open(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}},  # the end is after the end of the file
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-4, 12]}},  # the start is negative
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},  # the start is after the end
        {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},  # fewer bytes than the shape needs
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 15]}},  # not a multiple of the number size
        {"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}},  # an unknown type
        {"a": {"dtype": "F32", "shape": [4]}},  # no offsets
        {"a": 7},
        [1, 2],
        "text",
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(file_of(json.dumps(header).encode(), bytes(16)))
    with pytest.raises(CacheError, match=r"shard\.safetensors is damaged"):
        Shard.open(path)


@pytest.mark.parametrize("header", [b"{not json}", b"\xff\xfe\xff\xfe"])
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(file_of(header, b""))
    with pytest.raises(CacheError, match=r"shard\.safetensors is damaged"):
        Shard.open(path)


@pytest.mark.parametrize("before", [None, b"what stood there"])
def test_a_full_disk_keeps_the_old_file_and_leaves_no_partial_one(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    path = tmp_path / "shard.safetensors"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(os, "fsync", out_of_space)
    with pytest.raises(OSError, match="No space left"):
        write(path, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def file_of(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data
