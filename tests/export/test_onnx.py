"""Test the whole ONNX export: its files, and what it refuses to export."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from imagewam_cli.errors import ExportError, UsageError
from imagewam_cli.export import TOLERANCE, ExportReport, graphs
from imagewam_cli.export.onnx import OnnxExporter
from imagewam_cli.policy.bundle import read_bundle
from imagewam_cli.policy.loading import ExportedPolicy
from imagewam_cli.policy.policy import Policy
from imagewam_cli.runtime.export_folder import ExportFolderError
from imagewam_cli.runtime.onnx_policy import OnnxPolicy
from imagewam_flux2.editor import Flux2Editor
from tests.support.policies import observation

ExportAgain = Callable[..., ExportReport]
GRAPHS = ("loop.onnx", "prefix.onnx", "step.onnx")


@pytest.fixture
def export_again(
    onnx_export: ExportReport,
    policy_folder: Path,
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ExportAgain:
    """`export_again(change)` exports into tmp_path / "out" with the graphs traced before.

    change(file, model) returns the model to export.
    """

    def export(change: Callable[[str, Any], Any] = lambda _file, model: model) -> ExportReport:
        take_graphs_from(onnx_export.folder, monkeypatch, change)
        return OnnxExporter().export(policy_folder, tmp_path / "out", weights=tiny_weights)

    return export


def test_every_check_passed(onnx_export: ExportReport) -> None:
    assert set(onnx_export.errors) == {"prefix", "step", "loop", "chunk"}
    assert all(0 < error < TOLERANCE / 4 for error in onnx_export.errors.values())
    assert onnx_export.notes == ()


def test_the_report_lists_the_files_in_the_folder(onnx_export: ExportReport) -> None:
    there = {path.name: path.stat().st_size for path in onnx_export.folder.iterdir()}
    assert there == dict(onnx_export.files)
    assert set(there) == {*GRAPHS, "tokenizer.json", "noise.npy", "onnx.json", "editor.json", "policy.py"}
    assert [path.name for path in onnx_export.folder.parent.iterdir()] == [onnx_export.folder.name]


def test_an_exported_policy_knows_the_keys_of_its_dataset(onnx_export: ExportReport, policy_folder: Path) -> None:
    keys = read_bundle(policy_folder).config.keys
    assert keys is not None
    assert ExportedPolicy.load(onnx_export.folder).keys == keys


def test_the_description_has_the_policys_values(onnx_export: ExportReport, policy_folder: Path) -> None:
    description = json.loads((onnx_export.folder / "onnx.json").read_text())
    parts = read_bundle(policy_folder)
    assert description["errors"] == dict(onnx_export.errors)
    assert description["editor"] == {"name": "tiny", "fingerprint": dict(parts.editor.fingerprint)}
    assert (description["horizon"], description["execute"], description["fps"]) == (5, 2, 10.0)
    assert description["levels"] == pytest.approx([1.0, 5 / 6, 0.0])
    assert description["prefix"]["cameras"] == ["top"]
    assert (description["prefix"]["height"], description["prefix"]["width"]) == (64, 64)
    np.testing.assert_allclose(description["state"]["scale"], parts.state_normalizer.scale, rtol=0)
    np.testing.assert_allclose(description["action"]["offset"], parts.action_normalizer.offset, rtol=0)
    assert np.load(onnx_export.folder / "noise.npy").shape == (5, 3)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_complete_and_has_dynamic_batch_and_tokens(onnx_export: ExportReport, name: str) -> None:
    model = onnx.load(onnx_export.folder / name, load_external_data=False)
    onnx.checker.check_model(model)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": graphs.OPSET}
    assert model.ir_version == graphs.IR_VERSION
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    for value in (*model.graph.input, *model.graph.output):
        sizes = [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        assert sizes[0] == "batch", value.name
        if value.name.startswith(("layer.", "valid", "token")):
            assert isinstance(sizes[1], str), value.name


def test_the_outputs_of_the_prefix_are_the_inputs_of_the_loop(onnx_export: ExportReport) -> None:
    prefix, loop, step = (onnx.load(onnx_export.folder / name) for name in ("prefix.onnx", "loop.onnx", "step.onnx"))
    given = {value.name for value in prefix.graph.output}
    assert {value.name for value in loop.graph.input} == given | {"state", "noise"}
    assert {value.name for value in step.graph.input} == given | {"state", "noisy_actions", "t"}
    assert {value.name for value in prefix.graph.input} == {"image", "token_ids", "token_valid"}


def test_no_file_contains_a_local_path(onnx_export: ExportReport, policy_folder: Path, tiny_weights: Path) -> None:
    places = [policy_folder, tiny_weights, Path(graphs.__file__).parents[2], Path(onnx.__file__).parents[1]]
    for path in onnx_export.folder.iterdir():
        content = path.read_bytes()
        assert not any(str(place).encode() in content for place in places), path.name


@pytest.mark.parametrize(("name", "check"), [("loop.onnx", "loop"), ("step.onnx", "step"), ("prefix.onnx", "prefix")])
def test_a_graph_that_differs_from_torch_is_refused(
    export_again: ExportAgain, tmp_path: Path, name: str, check: str
) -> None:
    with pytest.raises(ExportError, match=f"{check} differs from torch by .*, more than 1e-04"):
        export_again(lambda file, model: tampered(model) if file == name else model)
    assert list(tmp_path.iterdir()) == []


def test_an_editor_without_a_graph_is_noted_in_the_report(
    export_again: ExportAgain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flux2Editor, "prefix_graph", lambda _editor: None)
    report = export_again()
    assert set(report.errors) == {"step", "loop", "chunk"}
    assert not {"prefix.onnx", "tokenizer.json"} & set(report.files)
    assert json.loads((report.folder / "onnx.json").read_text())["prefix"] is None
    (note,) = report.notes
    assert "no prefix.onnx" in note
    assert "'tiny' must run in torch" in note


@pytest.mark.slow
def test_weights_too_large_for_a_file_are_exported_as_external_data(
    policy_folder: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_WEIGHT_BYTES", 10_000)
    report = OnnxExporter().export(policy_folder, tmp_path / "out", weights=tiny_weights)
    assert set(report.errors) == {"prefix", "step", "loop", "chunk"}
    assert {"loop.onnx.data", "prefix.onnx.data"} <= set(report.files)
    description = json.loads((report.folder / "onnx.json").read_text())
    assert {"loop.onnx.data", "prefix.onnx.data"} <= set(description["checksums"])
    assert report.files["loop.onnx"] < report.files["loop.onnx.data"]
    row = observation(50)
    chunk = Policy.load(policy_folder, weights=tiny_weights).chunks([row])
    np.testing.assert_allclose(OnnxPolicy.load(report.folder).chunks([row]), chunk, atol=TOLERANCE)
    (report.folder / "loop.onnx.data").unlink()
    with pytest.raises(ExportFolderError, match=r"loop\.onnx\.data is missing"):
        OnnxPolicy.load(report.folder)


def test_every_file_of_the_policy_has_its_checksum(onnx_export: ExportReport) -> None:
    listed = json.loads((onnx_export.folder / "onnx.json").read_text())["checksums"]
    assert set(listed) == set(onnx_export.files) - {"policy.py"}
    for name in set(listed) - {"onnx.json"}:
        content = (onnx_export.folder / name).read_bytes()
        assert listed[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_missing_packages_are_named(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else find(name, *rest)
    )
    with pytest.raises(ExportError, match="needs onnx, onnxscript, onnxruntime") as caught:
        OnnxExporter().export(policy_folder, tmp_path / "out")
    assert caught.value.hint == "pip install 'imagewam[onnx]'"
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_refused(policy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError):
        OnnxExporter().export(policy_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def take_graphs_from(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Any], Any]) -> None:
    """Make exports read their graphs from `folder` instead of tracing them again."""
    from imagewam_cli.export import unroll

    monkeypatch.setattr(graphs, "trace", lambda _graph, name, _weights: change(name, onnx.load(folder / name)))
    monkeypatch.setattr(unroll, "unroll", lambda _step, _levels: change("loop.onnx", onnx.load(folder / "loop.onnx")))


def tampered(model: Any) -> Any:
    """Return the model with every matrix scaled by 1.001."""
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim == 2 and value.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(value * np.float32(1.001), tensor.name))
    return model
