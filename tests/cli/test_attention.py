"""`imagewam attention`: numbers and pictures for a policy on a dataset, and refused arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagewam_cli.cli import app
from tests.support.policies import write_policy


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = app.run(["attention", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_attention_writes_numbers_and_pictures(
    capsys: pytest.CaptureFixture[str], policy_folder: Path, tiny_weights: Path, tabletop: Path, tmp_path: Path
) -> None:
    out = tmp_path / "looks"
    code, printed, err = run(
        capsys, "--policy", policy_folder, "--dataset", tabletop, "--weights", tiny_weights,
        "--rows", 5, "--out", out, "--format", "json",
    )  # fmt: skip
    assert code == 0, err
    assert "only 0 held-out episodes are known" in err
    values = json.loads(printed)
    assert values.pop("folder") == str(out)
    assert json.loads((out / "result.json").read_text()) == values
    assert values["episodes"] == values["rows"] == len(list((out / "rows").iterdir())) == 5 - values["still"]
    for path in (*(out / "rows").iterdir(), out / "sheet.png"):
        assert np.asarray(Image.open(path)).std() > 0
    assert not list(out.rglob("*.partial*"))


def test_a_second_run_replaces_the_pictures_of_the_first(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    policy_folder: Path,
    tiny_weights: Path,
    tabletop: Path,
    tmp_path: Path,
) -> None:
    given = ["--policy", policy_folder, "--dataset", tabletop, "--weights", tiny_weights, "--out", tmp_path]
    assert run(capsys, *given, "--rows", 6)[0] == 0
    (tmp_path / "rows" / "notes.txt").write_text("mine")
    before = sorted(path.name for path in (tmp_path / "rows").iterdir())
    with monkeypatch.context() as broken:
        broken.setattr("imagewam_cli.evaluation.attention.pictures.sheet", lambda _: 1 / 0)
        assert run(capsys, *given, "--rows", 3)[0] == 1
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == before
    assert run(capsys, *given, "--rows", 3)[0] == 0
    kept = json.loads((tmp_path / "result.json").read_text())["per_row"]
    pages = [f"episode-{row['episode']:06d}-frame-{row['frame']:06d}.png" for row in kept]
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == sorted([*pages, "notes.txt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "rows", "sheet.png"]


def test_the_default_folder_is_inside_the_policy(
    capsys: pytest.CaptureFixture[str], policy_folder: Path, tiny_weights: Path, tabletop: Path, tmp_path: Path
) -> None:
    shutil.copytree(policy_folder, tmp_path / "policy")
    code, printed, _ = run(
        capsys, "--policy", tmp_path / "policy", "--dataset", tabletop, "--weights", tiny_weights,
        "--rows", 3, "--target", "end",
    )  # fmt: skip
    assert code == 0
    folder = tmp_path / "policy" / "attention" / tabletop.name
    assert printed.splitlines()[-1] == str(folder)
    assert json.loads((folder / "result.json").read_text())["target"] == "end"


def test_an_onnx_export_is_refused(capsys: pytest.CaptureFixture[str], tabletop: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx.json").write_text("{}")
    code, _, err = run(capsys, "--policy", tmp_path, "--dataset", tabletop)
    assert code == 2
    assert err.splitlines() == [
        f"error: {tmp_path} is an ONNX export, which does not expose attention weights",
        "hint: pass the run that it was exported from",
    ]


def test_a_prefix_with_only_text_is_refused(
    capsys: pytest.CaptureFixture[str], load_tiny: Any, tiny_weights: Path, tabletop: Path, tmp_path: Path
) -> None:
    folder = write_policy(tmp_path / "blind", load_tiny(segments=("text",)))
    code, _, err = run(capsys, "--policy", folder, "--dataset", tabletop, "--weights", tiny_weights)
    assert code == 2
    assert err.splitlines()[-2].startswith("error: no layer of this policy's prefix holds picture tokens")
    assert not (folder / "attention").exists()


def test_a_dataset_without_the_camera_is_refused(
    capsys: pytest.CaptureFixture[str], load_tiny: Any, tiny_weights: Path, tabletop: Path, tmp_path: Path
) -> None:
    folder = write_policy(tmp_path / "other", load_tiny(cameras=("wrist",)))
    code, _, err = run(capsys, "--policy", folder, "--dataset", tabletop, "--weights", tiny_weights)
    assert code == 1
    assert err.startswith("error: ")
    assert "wrist" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "1"], "1 row(s) are too few"),
        (["--target", "middle"], "'middle' is not one of"),
        (["--policy", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str],
    policy_folder: Path,
    tiny_weights: Path,
    tabletop: Path,
    arguments: list[str],
    message: str,
) -> None:
    given = ["--policy", policy_folder, "--dataset", tabletop, "--weights", tiny_weights]
    code, _, err = run(capsys, *given, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
