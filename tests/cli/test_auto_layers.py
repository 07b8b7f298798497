"""`imagewam cache --layers auto:K`: layers are measured once, stored, and reused when a build resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagewam_cli.cache_study.layer_selection import LayerChoice
from imagewam_cli.cli.app import run
from imagewam_cli.kvcache.storage.manifests import read_manifest

MEASURE = "imagewam_cli.cache_study.layer_selection.measure_layers"


@pytest.fixture
def small(tabletop: Path, tiny_weights: Path) -> list[str]:
    rows = ["--dataset", str(tabletop), "--weights", str(tiny_weights), "--image-size", "64x64"]
    return ["cache", *rows, "--stride", "8", "--shard-mb", "0.1"]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake a measurement whose layers no other choice would give."""
    result = LayerChoice(kept=(0, 2), removed=(1,), errors=(0.5, 0.4))
    monkeypatch.setattr(MEASURE, lambda *_, **__: result)


def test_plan_build_and_manifest_have_the_same_layers(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*small, "--layers", "auto:2", "--plan", "--format", "json"]) == 0
    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    assert f"--layers auto:2: {plan['layers']} (error of a linear predictor" in printed.err
    assert run([*small, "--layers", "auto:2", "--out", str(tmp_path / "cache")]) == 0
    manifest = read_manifest(tmp_path / "cache")
    assert (manifest.settings.layers, len(manifest.spec.layers)) == (plan["layers"], 2)
    assert run([*small, "--layers", plan["layers"], "--out", str(tmp_path / "cache")]) == 0, "it is the same cache"


def test_a_resumed_build_does_not_measure_again(
    small: list[str],
    chosen: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "cache"
    build = ["-q", *small, "--layers", "auto:2", "--out", str(out)]
    assert run([*build, "--part", "0/2"]) == 0
    monkeypatch.setattr(MEASURE, lambda *_, **__: pytest.fail("measured again"))
    shard = next((out / "shards").iterdir())
    whole = shard.read_bytes()
    shard.unlink()
    assert run([*build, "--part", "0/2"]) == 0, "the same part"
    assert shard.read_bytes() == whole
    assert run([*build, "--part", "1/2"]) == 0, "the other part"
    assert run(["-q", "cache", "merge", str(out)]) == 0
    capsys.readouterr()
    assert run(build[1:]) == 0
    assert "--layers auto:2: 0,2, the layers of the cache" in capsys.readouterr().err
    assert read_manifest(out).settings.layers == "0,2"


def test_auto_with_another_number_of_layers_is_refused_before_the_editor_loads(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    assert run(["-q", *small, "--layers", "0,2", "--out", str(out)]) == 0
    capsys.readouterr()
    monkeypatch.setattr("imagewam_cli.cli.editor_options.EditorSetup.load", lambda _: pytest.fail("loaded"))
    assert run([*small, "--layers", "auto:1", "--out", str(out)]) == 1
    problem, advice = capsys.readouterr().err.splitlines()
    assert "has 2 layers (--layers 0,2), but --layers auto:1 asks for 1" in problem
    assert "--layers auto:2" in advice


@pytest.mark.parametrize("value", ["auto:", "auto:x", "auto:0", "auto:-1", "auto:²"])
def test_auto_without_a_valid_number_is_refused_first(
    value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["cache", "--layers", value]) == 2
    problem, advice = capsys.readouterr().err.splitlines()
    assert f"--layers {value}: auto needs the number of layers to keep" in problem
    assert "--layers auto:4" in advice
    assert list(tmp_path.iterdir()) == []


def test_auto_with_too_many_layers_is_refused_before_a_row_is_encoded(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = "imagewam_cli.editors.diffusers.DiffusersEditor.encode"
    monkeypatch.setattr(encode, lambda *_: pytest.fail("encoded"))
    assert run([*small, "--layers", "auto:99", "--out", str(tmp_path / "cache")]) == 2
    problem, advice = capsys.readouterr().err.splitlines()
    assert "auto:99: the editor has 3 layers" in problem
    assert "auto:1 to auto:3" in advice
    assert not (tmp_path / "cache").exists()


def test_planning_auto_layers_needs_weights(
    tabletop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments = ["cache", "--editor", "instruct-pix2pix", "--dataset", str(tabletop), "--layers", "auto:2", "--plan"]
    assert run(arguments) == 1
    assert "run `imagewam fetch instruct-pix2pix`" in capsys.readouterr().err
