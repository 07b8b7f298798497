"""Test that `load_policy` loads runs, bundles and ONNX exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.data.types import Observation
from imagewam_cli.errors import DatasetError, ImagewamWarning, RunError
from imagewam_cli.export import ExportReport
from imagewam_cli.policy.loading import ExportedPolicy, load_policy
from imagewam_cli.policy.policy import Policy
from imagewam_cli.runtime.export_folder import DESCRIPTION
from imagewam_cli.workspace import ONNX_MARKER
from tests.support.policies import observation

ROWS = [observation(41), observation(42, "put it down")]


def test_the_runtime_and_the_export_agree_on_the_name_of_the_description() -> None:
    assert DESCRIPTION == ONNX_MARKER


def test_a_policy_is_loaded_from_its_folder_or_its_run(policy_folder: Path, tiny_weights: Path, tmp_path: Path) -> None:
    shutil.copytree(policy_folder, tmp_path / "run" / "policy")
    for path in (policy_folder, tmp_path / "run"):
        assert isinstance(load_policy(path, weights=tiny_weights), Policy)


def test_an_export_loads_as_a_policy_with_the_same_interface(
    onnx_export: ExportReport, policy_folder: Path, tiny_weights: Path
) -> None:
    exported = load_policy(onnx_export.folder)
    live = load_policy(policy_folder, weights=tiny_weights)
    assert isinstance(exported, ExportedPolicy)
    assert (exported.execute, exported.horizon, exported.cameras) == (live.execute, live.horizon, live.cameras)
    np.testing.assert_allclose(exported.chunks(ROWS), live.chunks(ROWS), atol=1e-4)
    exported.reset()
    np.testing.assert_allclose(exported.act(ROWS[0]), live.chunks(ROWS)[0, 0], atol=1e-4)


def test_without_a_prefix_graph_the_editor_computes_the_prefix(
    onnx_export: ExportReport, policy_folder: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    folder = without_prefix(onnx_export.folder, tmp_path / "copy")
    exported = load_policy(folder, weights=tiny_weights)
    np.testing.assert_allclose(
        exported.chunks(ROWS), Policy.load(policy_folder, weights=tiny_weights).chunks(ROWS), atol=1e-4
    )
    (folder / "editor.json").write_text("{}")
    with pytest.raises(RunError, match=r"editor\.json is damaged"):
        load_policy(folder, weights=tiny_weights)
    (folder / "editor.json").unlink()
    with pytest.raises(RunError, match=r"editor\.json"):
        load_policy(folder, weights=tiny_weights)


def test_a_folder_that_is_not_a_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no policy"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"onnx\.json is damaged"),
        ("{}", "has version None; this reads version 1"),
        ('{"version": 2, "prefix": {}}', "has version 2; this reads version 1"),
        ('{"version": 1}', r"onnx\.json is damaged: it has no key 'files'"),
    ],
)
def test_a_damaged_export_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "onnx.json").write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        load_policy(tmp_path)
    assert caught.value.hint


def test_a_swapped_file_is_named(onnx_export: ExportReport, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx_export.folder, tmp_path / "copy")
    shutil.copy(folder / "step.onnx", folder / "loop.onnx")
    with pytest.raises(
        RunError, match=r"loop\.onnx is not the file that was exported: it has \d+ bytes instead"
    ) as caught:
        load_policy(folder)
    assert caught.value.hint == "copy the whole export folder again, or export the policy again"


def test_an_export_made_before_is_read_with_a_warning(onnx_export: ExportReport, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx_export.folder, tmp_path / "copy")
    description = json.loads((folder / "onnx.json").read_text())
    del description["checksums"], description["min_onnxruntime"]
    (folder / "onnx.json").write_text(json.dumps(description))
    with pytest.warns(ImagewamWarning, match="its files are not checked"):
        exported = load_policy(folder)
    np.testing.assert_array_equal(exported.chunks(ROWS), load_policy(onnx_export.folder).chunks(ROWS))


def test_a_wrong_observation_is_an_error_that_names_the_part(onnx_export: ExportReport) -> None:
    scene = observation(43)
    exported = load_policy(onnx_export.folder)
    with pytest.raises(DatasetError, match="state has shape"):
        exported.chunks([Observation(images=scene.images, state=scene.state[:1], instruction="x")])


def without_prefix(export: Path, copy: Path) -> Path:
    shutil.copytree(export, copy, ignore=shutil.ignore_patterns("prefix.onnx", "tokenizer.json"))
    description = json.loads((copy / "onnx.json").read_text())
    del description["checksums"]  # it was changed on purpose
    (copy / "onnx.json").write_text(json.dumps(description | {"prefix": None}))
    return copy
