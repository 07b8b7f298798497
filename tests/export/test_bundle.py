"""Test that the exported bundle is a copy that plans the same actions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from imagewam_cli.errors import DatasetError, ExportError, UsageError
from imagewam_cli.export.bundle import FILES, BundleExporter
from imagewam_cli.policy.policy import Policy
from tests.support.policies import observation


def test_the_copy_plans_the_same_actions(policy_folder: Path, tiny_weights: Path, tmp_path: Path) -> None:
    report = BundleExporter().export(policy_folder, tmp_path / "out", weights=tiny_weights)
    assert report.folder == tmp_path / "out"
    assert report.errors == {"chunk": 0.0}
    assert dict(report.files) == {name: (policy_folder / name).stat().st_size for name in sorted(FILES)}
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (policy_folder / name).read_bytes()
    scene = [observation(11)]
    copied = Policy.load(tmp_path / "out", weights=tiny_weights).chunks(scene)
    np.testing.assert_array_equal(copied, Policy.load(policy_folder, weights=tiny_weights).chunks(scene))


def test_only_files_of_the_policy_are_copied(policy_folder: Path, tiny_weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(policy_folder, run / "policy")
    (run / "policy" / "notes.pkl").write_bytes(b"\x80")
    BundleExporter().export(run, tmp_path / "out", weights=tiny_weights)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_a_copy_that_plans_other_actions_is_refused(
    policy_folder: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def damaging(source: Path, target: Path) -> None:
        copy(source, target)
        if target.name == "expert.safetensors":
            weights = load_file(target)
            weights["head.linear.weight"] += 0.01
            save_file(weights, target)

    monkeypatch.setattr(shutil, "copyfile", damaging)
    with pytest.raises(ExportError, match="plans different chunks"):
        BundleExporter().export(policy_folder, tmp_path / "out", weights=tiny_weights)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_without_sample_rows_cannot_be_checked(policy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(policy_folder, tmp_path / "policy")
    (tmp_path / "policy" / "samples.safetensors").unlink()
    with pytest.raises(DatasetError, match=r"samples\.safetensors"):
        BundleExporter().export(tmp_path / "policy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_refused(policy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError):
        BundleExporter().export(policy_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
