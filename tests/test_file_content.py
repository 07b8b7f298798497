"""Test that files which are not what their names say are recognized by their first and last bytes."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagewam_cli.file_content import content_fault
from tests.support.faults import LFS_POINTER
from tests.support.recordings import encode_mp4


@pytest.mark.parametrize(
    ("name", "content", "problem", "hint"),
    [
        ("a.parquet", LFS_POINTER, "is a Git LFS pointer, not the file itself", "git lfs pull"),
        ("info.json", LFS_POINTER, "is a Git LFS pointer, not the file itself", "git lfs pull"),
        (
            "a.mp4",
            b"/annex/objects/SHA256E-s1--0.mp4\n",
            "is a git-annex pointer, not the file itself",
            "git annex get",
        ),
        ("a.mp4", b"", "is empty", "download it again"),
        ("a.mp4", bytes(5000), "begins with 1024 zero bytes", "the copy failed"),
        ("a.mp4", b"\n<!DOCTYPE html><html>", "is a web page, saved under the name of the file", "hf auth login"),
        ("a.mp4", b"<?xml version='1.0'?><Error>", "is a server's error message", "download it again"),
        ("a.mp4", b"Entry not found", "holds only the text 'Entry not found'", "download it again"),
        ("info.json", gzip.compress(b"{}", mtime=0), "is compressed (gzip)", "unpack it first"),
    ],
)
def test_the_content_is_named(tmp_path: Path, name: str, content: bytes, problem: str, hint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    fault = content_fault(path)
    assert fault is not None
    assert fault.problem.startswith(problem)
    assert hint in fault.hint


def test_a_zip_archive_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.parquet", "w") as archive:
        archive.writestr("a.parquet", b"PAR1")
    fault = content_fault(tmp_path / "a.parquet")
    assert fault is not None
    assert fault.problem == "is compressed (zip)"


def test_files_that_were_cut_off_lack_their_end(tmp_path: Path) -> None:
    table, video = tmp_path / "a.parquet", tmp_path / "a.mp4"
    pq.write_table(pa.table({"a": [1]}), table)
    encode_mp4(video, np.zeros((3, 32, 32, 3), np.uint8))
    assert content_fault(table) is None
    assert content_fault(video) is None
    for path, problem in ((table, "is a parquet file without its end"), (video, "is an mp4 without its index (moov)")):
        path.write_bytes(path.read_bytes()[:-100])
        fault = content_fault(path)
        assert fault is not None
        assert fault.problem == problem


def test_a_missing_file_and_unknown_bytes_have_no_fault(tmp_path: Path) -> None:
    assert content_fault(tmp_path / "missing") is None
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    assert content_fault(tmp_path / "bytes") is None
