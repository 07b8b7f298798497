"""`imagewam cache verify` on a real cache of `tiny`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from imagewam_cli.cli.app import run


@pytest.fixture
def damaged(tiny_cache: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
    shard = sorted((folder / "shards").iterdir())[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return folder


def test_a_sound_cache_passes(tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-q", "cache", "verify", "--cache", str(tiny_cache)]) == 0
    assert "all checksums match" in capsys.readouterr().out


def test_damage_is_exit_1_and_names_the_file_and_its_rows(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-q", "cache", "verify", "--cache", str(damaged), "--format", "json"]) == 1
    (damage,) = json.loads(capsys.readouterr().out)["damaged"]
    assert damage["file"].startswith("shards/shard-00000")
    assert len(damage["rows"]) == 1


def test_repair_restores_the_bytes(
    damaged: Path, tiny_cache: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cache", str(damaged), "--weights", str(tiny_weights), "--repair"]
    assert run(["-q", "cache", "verify", *arguments]) == 0
    assert "repaired shards/shard-00000.safetensors" in capsys.readouterr().out
    for shard in (damaged / "shards").iterdir():
        assert shard.read_bytes() == (tiny_cache / "shards" / shard.name).read_bytes()


def test_training_on_damaged_rows_is_one_line(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cache", str(damaged), "--out", str(tmp_path / "run"), "--steps", "20", "--batch", "500"]
    assert run(["-q", "train-expert", *arguments]) == 1
    assert "differ from their checksums" in capsys.readouterr().err
