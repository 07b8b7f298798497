"""`imagewam info` and `imagewam list` on complete, damaged and unmerged caches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.cli.app import run
from imagewam_cli.cli.output import bytes_text
from imagewam_cli.data.normalization import Normalizer, Rule, RunningStats
from imagewam_cli.errors import ImagewamWarning
from imagewam_cli.export import ExportReport
from imagewam_cli.kvcache.format.manifest import SHARDS, BuildPart
from imagewam_cli.kvcache.storage.manifests import put_manifest, read_manifest, storage_at
from imagewam_cli.policy.bundle import read_bundle, write_bundle
from imagewam_cli.policy.policy import Policy
from tests.support.policies import ACTION_NAMES, STATE_NAMES
from tests.support.recordings import record, write_v21


@pytest.fixture
def copy(tiny_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache, tmp_path / "caches" / "tiny"))


@pytest.fixture
def parts(copy: Path) -> Path:
    """Return the cache as two of three workers left it; the second worker has one shard left."""
    manifest = read_manifest(copy)
    listed = (manifest.shards[:1], manifest.shards[1:2])
    for i, shards in enumerate(listed):
        name = BuildPart(index=i, count=3).manifest
        put_manifest(storage_at(copy), dataclasses.replace(manifest, shards=shards), name)
    (copy / "manifest.json").unlink()
    return copy


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run([*arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_complete_cache_has_no_next_steps(tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "info", str(tiny_cache))
    assert found["complete"]
    assert (found["parts"], found["damage"], found["next"]) == ({}, [], [])


def test_parts_are_listed_with_the_missing_rows(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "info", str(parts))
    rows = [entry.rows for entry in read_manifest(parts).shards]
    assert found["parts"] == {"0/3": rows[0], "1/3": rows[1]}
    assert (found["rows"], found["complete"]) == (sum(rows), False)
    resume, merge = found["next"]
    assert f"{found['of'] - sum(rows)} rows are missing: not started: part 2/3" in resume
    assert f"imagewam cache merge {parts}" in merge


@pytest.mark.parametrize("how", ["gone", "short", "swapped", "head", "table"])
def test_info_finds_damage_and_names_the_repair_command(
    copy: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    first, second, *_ = (copy / SHARDS / entry.file for entry in read_manifest(copy).shards)
    data = first.read_bytes()
    if how == "gone":
        first.unlink()
    elif how == "short":
        first.write_bytes(data[:-1])
    elif how == "head":
        first.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    elif how == "swapped":
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    else:
        (copy / "table.safetensors").write_bytes(b"")
    assert run(["info", str(copy)]) == 0
    out = capsys.readouterr().out
    damage = next(line for line in out.splitlines() if line.startswith("damage: "))
    assert ("table.safetensors" if how == "table" else f"{SHARDS}/{first.name}") in damage
    assert (f"{SHARDS}/{second.name}" in damage) == (how == "swapped")
    assert f"imagewam cache verify --cache {copy} --repair" in out


def test_an_export_is_described_in_bytes(
    onnx_export: ExportReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json_of(capsys, "info", str(onnx_export.folder))
    assert (found["kind"], found["editor"], found["needs_editor"]) == ("onnx export", "tiny", False)
    assert (found["cameras"], found["state_names"], found["action_names"]) == (
        ["top"],
        ["gripper_x", "gripper_y", "opening"],
        ["dx", "dy", "grip"],
    )
    assert (found["fps"], found["horizon"], found["execute"]) == (10.0, 5, 2)
    assert found["onnxruntime"] == ">=1.30"  # its rotary positions are float64
    assert found["files"] == dict(onnx_export.files)
    assert found["bytes"] == sum(onnx_export.files.values())
    content = (onnx_export.folder / "loop.onnx").read_bytes()
    assert found["sha256"]["loop.onnx"] == hashlib.sha256(content).hexdigest()
    assert found["damage"] == []
    folder = shutil.copytree(onnx_export.folder, tmp_path / "copy")
    (folder / "loop.onnx").write_bytes(content[:-1])
    (damage,) = json_of(capsys, "info", str(folder))["damage"]
    assert damage.startswith(f"loop.onnx is not the file that was exported: it has {len(content) - 1} bytes instead")
    assert run(["info", str(folder)]) == 0
    assert f"loop.onnx {bytes_text(len(content) - 1)}" in capsys.readouterr().out


def test_a_policy_is_described_in_bytes(policy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "info", str(policy_folder))
    sizes = {path.name: path.stat().st_size for path in policy_folder.iterdir()}
    assert (found["files"], found["bytes"]) == (sizes, sum(sizes.values()))
    assert (found["editor"], found["cameras"], found["fps"]) == ("tiny", ["top"], 10.0)
    assert (found["state_names"], found["action_names"]) == (list(STATE_NAMES), list(ACTION_NAMES))


def test_list_finds_caches_in_any_folder(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for folders, expected in (
        ((), "caches/tiny"),
        ((str(tmp_path),), str(parts)),
        ((str(parts.parent),), str(parts)),
        ((str(parts),), str(parts)),
        ((str(parts), str(parts.parent)), str(parts)),
    ):
        assert [(i["kind"], i["path"]) for i in json_of(capsys, "list", *folders)] == [("cache", expected)]
    assert json_of(capsys, "list", "elsewhere") == []
    assert run(["list", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    parts.rename("beside")
    assert [i["path"] for i in json_of(capsys, "list")] == ["beside"]


def test_episodes_that_cannot_be_read_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_v21(tmp_path / "set", record())
    (root / "videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    assert run(["info", str(root)]) == 0
    printed = capsys.readouterr()
    assert "episodes: 3" in printed.out
    assert "episode_000001.mp4, episode 1: the file is missing" in printed.err
    assert "--only-episodes 0,2" in printed.err


@pytest.mark.parametrize("rule", ["relative", "absolute"])
def test_a_policy_names_its_constant_dimensions(
    rule: Rule, policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = RunningStats(3)
    stats.update([[0.0, 1.5, -4e-5], [1.0, 1.5, 4e-5]])
    normalizer = Normalizer(mode="min_max", stats=stats.result(), rule=rule)
    written = dataclasses.replace(read_bundle(policy_folder), action_normalizer=normalizer)
    write_bundle(tmp_path / "policy", written)
    assert read_bundle(tmp_path / "policy") == written
    found = json_of(capsys, "info", str(tmp_path / "policy"))
    assert found["constant_actions"] == ({"dy": 1.5} if rule == "relative" else {})
    assert found["constant_states"] == {}
    assert found["unscaled_actions"] == ([] if rule == "relative" else ["dy", "grip"])
    assert len(found["normalization_faults"]) == (rule == "absolute")
    # An older imagewam would act differently by the new rule, so it must refuse the folder.
    version = json.loads((tmp_path / "policy/policy.json").read_text())["version"]
    assert version == (2 if rule == "relative" else 1)


def test_loading_a_policy_of_the_older_rule_names_what_reaches_the_robot(
    policy_folder: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(policy_folder, tmp_path / "policy"))
    stats = RunningStats(3)
    stats.update([[0.0, 1.5, -1.0], [1.0, 1.5, 1.0]])
    older = Normalizer(mode="min_max", stats=stats.result(), rule="absolute")
    write_bundle(folder, dataclasses.replace(read_bundle(folder), action_normalizer=older))
    with pytest.warns(ImagewamWarning, match=r"action 'dy' \(1.5\).*the model's error reaches the robot as it is"):
        Policy.load(folder, weights=tiny_weights)
