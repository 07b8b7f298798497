"""`imagewam cache`: what it refuses before it does anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.cli.app import run
from imagewam_cli.editor import PrefixSettings
from imagewam_cli.kvcache.manifest import read_manifest
from imagewam_cli.kvcache.reader import CacheReader
from imagewam_cli.registry import Registry


def test_a_plan_records_no_demonstrations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["cache", "--plan"]) == 2
    assert "--plan needs --dataset" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_weights_nothing_is_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run(["cache", "--editor", "instruct-pix2pix"]) == 1
    assert "run `imagewam fetch instruct-pix2pix`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_planned_without_weights(
    capsys: pytest.CaptureFixture[str], tabletop: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments = ["--editor", "instruct-pix2pix", "--dataset", str(tabletop), "--stride", "20", "--format", "json"]
    assert run(["cache", *arguments, "--plan"]) == 0
    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    editors = Registry.installed().editors
    spec = editors.load("instruct-pix2pix").describe(editors.get("instruct-pix2pix"), PrefixSettings())
    assert plan["bytes_per_row"] == spec.bytes_per_row(2) + 5 * 8
    assert plan["seconds"] is None
    assert "not on this machine" in printed.err


def test_pooled_tokens_are_planned_and_cached(
    capsys: pytest.CaptureFixture[str], tabletop: Path, tmp_path: Path
) -> None:
    """8 x 8 tokens in cells of 3 x 3: 9 are left of 64, in the files as in the plan."""
    out = tmp_path / "cache"
    arguments = ["cache", "--dataset", str(tabletop), "--stride", "40", "--layers", "0", "--format", "json"]
    assert run([*arguments, "--image-size", "128x128", "--pool", "3", "--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert run([*arguments, "--image-size", "128x128", "--pool", "3", "--out", str(out)]) == 0
    manifest, reader = read_manifest(out), CacheReader(out)
    assert manifest.fingerprint["settings"]["pool"] == 3
    (layer,) = manifest.spec.layers
    text, picture = layer.segments
    assert (picture.grid, picture.tokens) == ((3, 3), 9)
    assert plan["bytes_per_row"] == pytest.approx(manifest.spec.bytes_per_row(2), rel=0.01)
    assert reader.read(np.arange(1)).layers[0].k.shape[1] == text.tokens + 9


def test_a_pool_of_nothing_is_refused(capsys: pytest.CaptureFixture[str], tabletop: Path) -> None:
    assert run(["cache", "--dataset", str(tabletop), "--pool", "0"]) == 2
    assert "pool must be at least 1, got 0" in capsys.readouterr().err
