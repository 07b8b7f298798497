"""Test `policy.bundle`: bundles survive a round trip, and errors name the damaged file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewam_cli.data.normalization import MODES, NormalizationMode, Normalizer, RunningStats
from imagewam_cli.errors import RunError
from imagewam_cli.policy.bundle import find_bundle, read_bundle, write_bundle

FILES = ("policy.json", "normalization.json", "editor.json")


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's policy."""
    return shutil.copytree(run / "policy", tmp_path / "policy")


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("mode", MODES)
def test_normalisers_are_read_back_exactly(run: Path, tmp_path: Path, mode: NormalizationMode) -> None:
    rng = np.random.default_rng(0)
    normalizers = []
    for dim in (2, 5):
        stats = RunningStats(dim)
        stats.update(rng.normal(size=(50, dim)) * 10.0 ** rng.uniform(-6, 6, size=dim))
        normalizers.append(Normalizer(mode=mode, stats=stats.result()))
    state, action = normalizers
    parts = dataclasses.replace(read_bundle(run / "policy"), state_normalizer=state, action_normalizer=action)
    write_bundle(tmp_path / "new", parts)
    back = read_bundle(tmp_path / "new")
    assert back == parts
    values = rng.normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_array_equal(back.action_normalizer.denormalize(values), action.denormalize(values))
    np.testing.assert_array_equal(back.state_normalizer.normalize(values[:, :2]), state.normalize(values[:, :2]))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RunError) as error:
        read_bundle(folder)
    assert error.value.message == f"{folder / name} is missing"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"7"])
def test_a_damaged_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(RunError) as error:
        read_bundle(folder)
    assert error.value.message.startswith(f"{folder / name} is damaged: ")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("policy.json", {"horizon": "six"}, "horizon must be int"),
        ("policy.json", {"horison": 6}, "unknown key 'horison'"),
        ("editor.json", {"spec": {}}, "spec"),
        ("editor.json", {"settings": {"layer": "all"}}, "unknown key 'settings.layer'"),
        ("normalization.json", {"state": None}, "state"),
        ("normalization.json", {"action": {"mode": "min_max"}}, "action"),
        ("normalization.json", {"action": {"mode": "min_max", "stats": {"min": [0.0]}}}, "the statistics lack max"),
    ],
)
def test_a_wrong_value_is_refused_with_file_and_key(
    folder: Path, name: str, values: dict[str, Any], message: str
) -> None:
    edit(folder / name, **values)
    with pytest.raises(RunError) as error:
        read_bundle(folder)
    assert str(folder / name) in error.value.message
    assert message in error.value.message


@pytest.mark.parametrize("version", [3, "1", None])
def test_another_version_is_refused_with_both_values_before_any_other_check(folder: Path, version: Any) -> None:
    edit(folder / "policy.json", version=version, added_by_a_newer_version=True)
    with pytest.raises(RunError) as error:
        read_bundle(folder)
    assert f"version {version!r}; this imagewam reads version 1" in error.value.message
    assert error.value.hint == "upgrade imagewam"


def test_a_bundle_is_found_in_a_run_and_in_its_policy_folder(run: Path) -> None:
    assert find_bundle(run) == find_bundle(run / "policy") == run / "policy"


def test_the_error_of_a_folder_without_a_policy_suggests_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no policy") as error:
        find_bundle(tmp_path)
    assert "train-expert" in (error.value.hint or "")


def test_a_missing_folder_is_reported_as_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        find_bundle(tmp_path / "nowhere")
