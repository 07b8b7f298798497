"""Commands meet a dataset whose videos were replaced under unchanged metadata."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.cli.app import run
from tests.support.recordings import record, replace_video, write_v21

VIDEO = "videos/chunk-000/observation.images.top/episode_000001.mp4"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_v21(tmp_path / "set", record(cameras={"top": (32, 48)}))


@pytest.fixture
def build(root: Path, tmp_path: Path, tiny_weights: Path) -> list[str]:
    inputs = ["--editor", "tiny", "--weights", str(tiny_weights), "--dataset", str(root), "--image-size", "64x64"]
    return ["-q", "cache", *inputs, "--stride", "3", "--out", str(tmp_path / "cache")]


def verified(cache: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    """Return exit code and JSON of `cache verify`."""
    capsys.readouterr()
    code = run(["-q", "cache", "verify", "--cache", str(cache), "--format", "json", *options])
    return code, json.loads(capsys.readouterr().out)["dataset"]


def test_the_same_command_on_replaced_videos_is_refused(
    build: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(build) == 0
    replace_video(root, VIDEO, 1)
    assert run(build) == 1
    error = capsys.readouterr().err
    assert f"holds a cache that was built from other files of the dataset: {VIDEO} was replaced\n" in error
    assert "choose another folder with --out, or delete this one" in error


def test_verify_compares_the_dataset_and_names_replaced_files(
    build: list[str], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(build) == 0
    code, dataset = verified(tmp_path / "cache", capsys=capsys)
    assert (code, dataset["files"], dataset["by_ends"], dataset["changed"]) == (0, 6, 0, [])
    replace_video(root, VIDEO, 1)
    code, dataset = verified(tmp_path / "cache", capsys=capsys)
    assert (code, dataset["changed"]) == (1, [{"file": VIDEO, "what": "was replaced"}])
    assert run(["-q", "cache", "verify", "--cache", str(tmp_path / "cache")]) == 1
    assert f"{root}: {VIDEO} was replaced" in capsys.readouterr().out


def test_verify_finds_a_dataset_that_was_moved(
    build: list[str], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(build) == 0
    moved = Path(shutil.move(root, tmp_path / "moved"))
    code, dataset = verified(tmp_path / "cache", capsys=capsys)
    assert code == 0
    assert dataset["not_compared"] == f"{root} does not exist; pass its folder with --dataset"
    code, dataset = verified(tmp_path / "cache", "--dataset", str(moved), capsys=capsys)
    assert (code, dataset["files"], dataset["changed"]) == (0, 6, [])
    (moved / VIDEO).unlink()
    tasks = moved / "meta" / "tasks.jsonl"
    tasks.write_text(tasks.read_text(encoding="utf-8").replace("red", "blue"), encoding="utf-8")
    code, dataset = verified(tmp_path / "cache", "--dataset", str(moved), capsys=capsys)
    assert code == 1
    assert dataset["changed"] == [
        {"file": "the metadata", "what": "was changed"},
        {"file": VIDEO, "what": "is missing"},
    ]
