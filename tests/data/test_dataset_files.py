"""Test `data.dataset_files`: which files identify a dataset, and how changes are named."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagewam_cli.data.dataset_files import (
    DatasetFiles,
    FileChange,
    checksum_lines,
    checksums_of,
    ends_of,
    files_of,
    named_changes,
    read_checksum_lines,
)
from imagewam_cli.data.formats import open_dataset
from imagewam_cli.errors import DatasetError
from tests.support.arithmetic_editor import MemoryDataset
from tests.support.recordings import record, write_v21, write_v30

VIDEO = "videos/chunk-000/observation.images.top/episode_000001.mp4"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_v21(tmp_path / "set", record())


def files_at(root: Path, *cameras: str) -> DatasetFiles:
    found = DatasetFiles.of(open_dataset(root), cameras or ("top", "wrist"))
    assert found is not None
    return found


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_first(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


class TestWhatCounts:
    def test_data_files_and_the_videos_of_the_chosen_cameras_count(self, root: Path) -> None:
        names = set(files_at(root, "top").entries)
        on_disk = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        assert names == {n for n in on_disk if not n.startswith("meta/") and "wrist" not in n}

    def test_only_the_files_of_the_chosen_episodes_count(self, root: Path) -> None:
        assert files_of(open_dataset(root), ["top"], [1]) == ["data/chunk-000/episode_000001.parquet", VIDEO]

    def test_a_file_that_several_episodes_share_counts_once(self, tmp_path: Path) -> None:
        root = write_v30(tmp_path / "set", record())
        names = files_of(open_dataset(root), ["top"], [0, 2])
        assert names == [
            "data/chunk-000/file-000.parquet",
            "videos/observation.images.top/chunk-000/file-000.mp4",
        ]

    def test_picture_files_outside_of_the_data_files_count(self, tmp_path: Path) -> None:
        root = write_v30(tmp_path / "set", record(), video_codec=None)
        (data,) = (root / "data").rglob("*.parquet")
        table = pq.read_table(data)
        key, cells = "observation.images.top", table["observation.images.top"].to_pylist()
        (root / "images").mkdir()
        for number, cell in enumerate(cells):
            (root / f"images/{number}.png").write_bytes(cell["bytes"])
        outside = pa.array([{"bytes": None, "path": f"images/{n}.png"} for n in range(len(cells))])
        pq.write_table(table.set_column(table.schema.get_field_index(key), key, outside), data)
        episode = open_dataset(root).episodes()[1]
        names = files_of(open_dataset(root), ["top"], [1])
        rows = range(episode.first_row, episode.first_row + episode.length)
        assert names == ["data/chunk-000/file-000.parquet", *(f"images/{n}.png" for n in rows)]

    def test_pictures_inside_the_data_files_need_no_other_file(self, tmp_path: Path) -> None:
        root = write_v30(tmp_path / "set", record(), video_codec=None)
        assert files_of(open_dataset(root), ["top"]) == ["data/chunk-000/file-000.parquet"]

    def test_a_missing_file_is_named(self, root: Path) -> None:
        (root / VIDEO).unlink()
        with pytest.raises(DatasetError, match=r"episode_000001\.mp4, episode 1: the file is missing"):
            files_at(root)
        assert VIDEO not in files_at(root, "wrist").entries

    def test_a_format_that_lists_no_files_is_unknown(self) -> None:
        assert DatasetFiles.of(MemoryDataset((3, 2)), ["top"]) is None


class TestComparison:
    def test_a_copy_with_other_times_is_the_same(self, root: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(root, tmp_path / "ünï copy"))
        for path in copy.rglob("*"):
            os.utime(path, (1, 1))
        assert files_at(copy).digest == files_at(root).digest
        assert files_at(root).changes(files_at(copy)) == []

    @pytest.mark.parametrize("edit", [append, flip_first])
    def test_a_replaced_file_is_named(self, root: Path, edit: Callable[[Path], None]) -> None:
        before = files_at(root)
        edit(root / VIDEO)
        after = files_at(root)
        assert before.changes(after) == [FileChange(VIDEO, "was replaced")]
        assert before.digest != after.digest

    def test_files_at_both_ends_of_a_change_are_named(self) -> None:
        one = DatasetFiles.from_bytes(b'{"a": [1, "x"], "b": [1, "x"]}')
        two = DatasetFiles.from_bytes(b'{"b": [1, "x"], "c": [1, "x"]}')
        assert one.changes(two) == [FileChange("a", "is missing"), FileChange("c", "was added")]

    def test_many_changes_are_counted(self) -> None:
        changes = [FileChange(f"{number}.mp4", "was replaced") for number in range(9)]
        assert named_changes(changes).endswith("2.mp4 was replaced, 6 more files differ")
        assert named_changes(changes[:1]) == "0.mp4 was replaced"

    def test_a_change_in_the_middle_of_a_large_file_needs_the_checksum(self, tmp_path: Path) -> None:
        large = tmp_path / "large.mp4"
        large.write_bytes(bytes(300_000))
        files = DatasetFiles({"large.mp4": ends_of(large)})
        checksums = checksums_of(tmp_path, ["large.mp4"])
        assert checksums == {"large.mp4": hashlib.sha256(bytes(300_000)).hexdigest()}
        large.write_bytes(bytes(150_000) + b"\1" + bytes(149_999))
        assert files.changes_at(tmp_path, {}) == []
        assert files.changes_at(tmp_path, checksums) == [FileChange("large.mp4", "was replaced")]
        large.unlink()
        assert files.changes_at(tmp_path, checksums) == [FileChange("large.mp4", "is missing")]


class TestOnDisk:
    def test_the_list_is_read_back(self, root: Path) -> None:
        files = files_at(root)
        assert DatasetFiles.from_bytes(files.to_bytes()) == files

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": [1]}', '{"a": ["x", "y"]}'])
    def test_a_damaged_list_is_an_error(self, text: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 - json's message, or our own
            DatasetFiles.from_bytes(text.encode())

    def test_sha256sum_checks_the_checksums(self, root: Path, tmp_path: Path) -> None:
        checksums = checksums_of(root, files_at(root).entries)
        listing = tmp_path / "dataset.sha256"
        listing.write_bytes(checksum_lines(checksums))
        assert read_checksum_lines(listing.read_bytes()) == checksums
        subprocess.run(["sha256sum", "--check", "--quiet", str(listing)], cwd=root, check=True)

    def test_names_of_any_characters_are_read_back(self) -> None:
        checksums = {"a b/ü  名\u2028\r.mp4": "0" * 64}
        assert read_checksum_lines(checksum_lines(checksums)) == checksums
