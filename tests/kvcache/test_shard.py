"""`kvcache.shard`: atomic writing, and headers that do not describe their file. safetensors itself is the reference."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.shard import Shard, write_shard


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(5, 3, 2, 4, generator=generator)
    return {
        "layer.0.k": k,
        "layer.0.v": k.to(torch.bfloat16),
        "layer.1.k": k.half(),
        "layer.1.v": k[:, :1].transpose(2, 3),  # not contiguous
        "valid": k[:, :, 0, 0] > 0,
        "row": torch.arange(5),
    }


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "shard.safetensors"
    write_shard(path, tensors)
    return path


def test_safetensors_reads_back_what_was_written(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_size_and_checksum_are_those_of_the_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "shard.safetensors"
    size, checksum = write_shard(path, tensors)
    assert size == path.stat().st_size
    assert checksum == hashlib.sha256(path.read_bytes()).hexdigest()


def test_taken_rows_are_those_of_safetensors(path: Path) -> None:
    rows = np.array([4, 0, 0, 3])
    shard = Shard.open(path)
    for name, tensor in load_file(path).items():
        taken = shard.take(name, rows)
        assert taken.dtype == tensor.dtype
        assert torch.equal(taken, tensor[rows])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"gone\.safetensors is missing"):
        Shard.open(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("size", [0, 4, 8, 9, 100])
def test_a_file_cut_off_in_its_header_is_damaged(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(CacheError, match="is damaged"):
        Shard.open(path)


def test_a_file_cut_off_in_its_tensors_is_damaged(path: Path) -> None:
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
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}},  # beyond the end
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-4, 12]}},  # before the start
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},  # backwards
        {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},  # not its shape
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 15]}},  # not whole numbers
        {"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}},  # an unknown type
        {"a": {"dtype": "F32", "shape": [4]}},  # nowhere
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
def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    path = tmp_path / "shard.safetensors"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(os, "fsync", out_of_space)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def file_of(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def out_of_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
