"""`imagewam cache`: what it refuses before it does anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagewam_cli.cli.app import run
from imagewam_cli.editor import PrefixSettings
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
