"""Folders of any name: one with a colon is no URL, one with braces or a percent sign no template."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from imagewam_cli.cli.app import run
from imagewam_cli.data.formats import open_dataset
from tests.support.recordings import record, write_v30

NAMES = ["a:b", "C:foo", "s3:", "file:x", "~not-a-user", "{episode_index} {}", "100 %d #1", "-lead", "名 é"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v30(tmp_path_factory.mktemp("recordings") / "set", record((3, 2), {"top": (32, 48)}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, so that a test names everything by a relative path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def options(tiny_weights: Path) -> list[str]:
    return ["--editor", "tiny", "--weights", str(tiny_weights), "--image-size", "64x64", "--segments", "reference"]


@pytest.mark.parametrize("name", NAMES)
def test_datasets_and_caches_of_any_name(folder: Path, recording: Path, options: list[str], name: str) -> None:
    shutil.copytree(recording, folder / name)
    cache = f"{name} cache"
    assert run(["-q", "cache", "--dataset", name, *options, "--out", cache]) == 0
    assert (folder / cache / "manifest.json").is_file()
    assert run(["-q", "cache", "verify", "--cache", cache, "--dataset", name]) == 0
    assert run(["info", "--", name]) == 0
    assert run(["info", "--", cache]) == 0


@pytest.mark.parametrize("name", ["a:b", "s3:", "{}%d"])
def test_recordings_of_any_name(folder: Path, name: str) -> None:
    assert run(["-q", "record", "--out", name, "--episodes", "1"]) == 0
    assert next(iter(open_dataset(name).rows(stride=1000))).images


def test_all_ways_to_name_a_dataset_mean_the_same(folder: Path, recording: Path, options: list[str]) -> None:
    shutil.copytree(recording, folder / "set")
    (folder / "link").symlink_to(folder / "set")
    (folder / "below").mkdir()
    for dataset in ("set", "set/", "link", "./set", "below/../set", str(folder / "set")):
        assert run(["-q", "cache", "--dataset", dataset, *options, "--out", "cache/"]) == 0


def test_a_name_that_is_not_utf_8_is_one_line(
    folder: Path, recording: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"set-\xff")
    shutil.copytree(recording, folder / name)
    assert run(["-q", "cache", "--dataset", name, *options, "--out", "cache"]) == 1
    error = capsys.readouterr().err
    assert "error: a file name is not UTF-8: " in error
    assert "hint: rename it" in error
