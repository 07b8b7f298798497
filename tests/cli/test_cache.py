"""`imagewam cache` and `imagewam cache plan`: plans, budgets, pooling, and arguments refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from imagewam_cli.cli.app import run
from imagewam_cli.editors.installed import installed_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.storage.manifests import read_manifest
from tests.support.editors.instruct_pix2pix import build as build_pix2pix


def test_a_plan_without_a_dataset_is_refused_and_records_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command, named in ((["cache", "plan"], "cache plan"), (["cache", "--plan"], "--plan")):
        assert run(command) == 2
        assert f"{named} needs --dataset" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_are_refused_before_demonstrations_are_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run(["cache", "--editor", "instruct-pix2pix"]) == 1
    assert "run `imagewam fetch instruct-pix2pix`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_needs_no_weights_to_compute_bytes(
    capsys: pytest.CaptureFixture[str], tabletop: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments = ["--editor", "instruct-pix2pix", "--dataset", str(tabletop), "--stride", "20", "--format", "json"]
    assert run(["cache", "plan", *arguments]) == 0
    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    spec = installed_editor("instruct-pix2pix").describe(PrefixOptions())
    assert plan["bytes_per_row"] == spec.bytes_per_row(2) + 6 * 8
    assert plan["seconds"] is None
    assert "not on this machine" in printed.err


def test_pooled_tokens_are_planned_and_cached(
    capsys: pytest.CaptureFixture[str], tabletop: Path, tmp_path: Path
) -> None:
    """8 x 8 tokens in cells of 3 x 3 leave 9 tokens, in the plan and in the files."""
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


def test_a_pool_of_0_is_refused(capsys: pytest.CaptureFixture[str], tabletop: Path) -> None:
    assert run(["cache", "--dataset", str(tabletop), "--pool", "0"]) == 2
    assert "pool must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message", "hint"),
    [
        ("--segments", "text, sky", "--segments is 'sky'", "choose one of: reference, target, text"),
        ("--pool", "9" * 20, f"pool must be at most 1024, got {'9' * 20}", "--pool 2"),
        ("--timestep", "2", "timestep must be in [0, 1], got 2.0", "--timestep"),
        ("--layers", "every:0", "'all', 'every:N' or a list like '0,4,9', N from 1, got 'every:0'", "--layers"),
        ("--layers", "0,9", "the editor has layers 0 to 5", "--layers"),
        ("--image-size", "12", "--image-size must look like 224x448, got '12'", "the height, then the width"),
        ("--image-size", "12x64", "image size 12x64 does not split", "use the nearest valid size: --image-size 16x64"),
    ],
)
def test_a_refused_value_is_reported_with_its_option(
    capsys: pytest.CaptureFixture[str],
    tabletop: Path,
    tmp_path: Path,
    option: str,
    value: str,
    message: str,
    hint: str,
) -> None:
    out = tmp_path / "cache"
    assert run(["cache", "--dataset", str(tabletop), "--out", str(out), option, value]) == 2
    problem, advice = capsys.readouterr().err.strip().splitlines()
    assert message in problem
    assert hint in advice
    assert not out.exists()


def test_segments_may_be_separated_by_spaces(capsys: pytest.CaptureFixture[str], tabletop: Path) -> None:
    plans = []
    for segments in ("text,reference", " text, reference "):
        assert run(["cache", "plan", "--dataset", str(tabletop), "--segments", segments, "--format", "json"]) == 0
        plans.append(json.loads(capsys.readouterr().out)["bytes_per_row"])
    assert plans[0] == plans[1]


@pytest.fixture
def small(tabletop: Path, tiny_weights: Path) -> list[str]:
    """Return the command that built `tiny_cache`, without --out."""
    rows = ["--dataset", str(tabletop), "--weights", str(tiny_weights), "--image-size", "64x64"]
    return ["cache", *rows, "--stride", "4", "--codec", "fp32", "--batch", "8", "--shard-mb", "0.5"]


@pytest.mark.parametrize(
    ("change", "message", "hint", "loads"),
    [
        (["--stride", "5"], "differs in its stride: 4, but this build has 5", "choose another folder", False),
        (["--codec", "int8"], "differs in its codec: fp32, but this build has int8", "choose another folder", False),
        (
            ["--editor", "flux2-klein-4b"],
            "differs in its editor: tiny, but this build has",
            "choose another folder",
            False,
        ),
        (["--shard-mb", "1"], "split into different shards", "use the same --shard-mb", True),
        (
            ["--layers", "0"],
            "differs in its setting 'layers': all, but this build has 0",
            "choose another folder",
            True,
        ),
    ],
)
@pytest.mark.parametrize("parts", [False, True])
def test_a_build_that_does_not_match_the_cache_is_refused_first(
    small: list[str],
    tiny_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: list[str],
    message: str,
    hint: str,
    loads: bool,
    parts: bool,
) -> None:
    out = Path(shutil.copytree(tiny_cache, tmp_path / "cache"))
    if parts:
        (out / "manifest.json").rename(out / "manifest.part-00001-of-00003.json")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if not loads:
        monkeypatch.setattr("imagewam_cli.cli.editor_options.EditorSetup.load", lambda _: pytest.fail("loaded"))
    assert run([*small, "--out", str(out), *change, *(["--part", "0/3"] if parts else [])]) == 1
    problem, advice = capsys.readouterr().err.strip().splitlines()
    assert message in problem
    assert hint in advice
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_with_other_files_is_refused_before_the_editor_loads(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").touch()
    monkeypatch.setattr("imagewam_cli.cli.editor_options.EditorSetup.load", lambda _: pytest.fail("loaded"))
    assert run([*small, "--out", str(tmp_path)]) == 2
    assert "holds something that is not a cache" in capsys.readouterr().err


def test_a_plan_with_a_budget_lists_all_choices_that_fit_and_marks_one(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache", "plan", *small[1:], "--budget", "400 kB", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["choice"] == plan["choices"][0]
    assert all(choice["total_bytes"] <= 400_000 for choice in plan["choices"])
    assert {choice["layers"] for choice in plan["choices"]} == {"all", "every:2", "every:4"}
    assert run(["cache", "plan", *small[1:], "--budget", "400kB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (marked,) = [line.split() for line in lines if "<- recommended" in line]
    best = plan["choice"]
    assert marked[:3] == [best["codec"], str(best["pool"]), best["layers"]]
    assert lines[-1] == f"--codec {best['codec']} --pool {best['pool']} --layers {best['layers']}"
    combinations = {(choice["layers"], choice["pool"]) for choice in plan["choices"]}
    head = next(i for i, line in enumerate(lines) if line.startswith("codec"))
    assert len(lines[head + 1 : -1]) == len(combinations)  # one line each


@pytest.mark.parametrize(
    ("budget", "message", "hint"),
    [
        ("50XB", "--budget must look like 50GB, got '50XB'", "a number, then"),
        ("much", "--budget must look like 50GB, got 'much'", "a number, then"),
        ("-5GB", "--budget must be more than 0, got '-5GB'", "omit --budget"),
        ("nan", "--budget must be more than 0, got 'nan'", "omit --budget"),
        ("1kB", "nothing fits 1.0 kB: --codec pca0.5 --pool 2 --layers every:4 still needs", "raise --budget"),
    ],
)
def test_an_invalid_or_too_small_budget_is_refused(
    small: list[str], capsys: pytest.CaptureFixture[str], budget: str, message: str, hint: str
) -> None:
    assert run(["-q", "cache", "plan", *small[1:], "--budget", budget]) == 2
    problem, advice = capsys.readouterr().err.strip().splitlines()
    assert message in problem
    assert hint in advice


def test_a_budget_without_a_plan_is_refused(capsys: pytest.CaptureFixture[str], small: list[str]) -> None:
    assert run([*small, "--budget", "1GB"]) == 2
    assert "--budget is an option of `imagewam cache plan`" in capsys.readouterr().err


def test_the_option_plan_prints_the_same_as_the_command_plan(
    capsys: pytest.CaptureFixture[str], tabletop: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    options = ["--editor", "instruct-pix2pix", "--dataset", str(tabletop), "--stride", "20", "--codec", "int8"]
    printed = []
    for command in (["cache", "plan"], ["cache", "--plan"]):
        assert run([*command, *options]) == 0
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1]
    assert "rows in" in printed[0].out


def test_an_option_before_a_sub_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "--pool", "2", "plan"]) == 2
    problem, advice = capsys.readouterr().err.strip().splitlines()
    assert "--pool has no effect before `plan`" in problem
    assert "imagewam cache plan --pool" in advice


def test_reported_bytes_count_all_files(capsys: pytest.CaptureFixture[str], tabletop: Path, tmp_path: Path) -> None:
    """Rows stored once per instruction are counted too, in the build and in the plan."""
    weights, out = build_pix2pix(tmp_path / "weights"), tmp_path / "cache"
    command = ["-q", "cache", "--editor", "instruct-pix2pix", "--weights", str(weights), "--dataset", str(tabletop)]
    command += ["--segments", "text,target", "--layers", "0,1", "--image-size", "64x64", "--stride", "40"]
    command += ["--format", "json"]
    assert run([*command, "--plan"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert run([*command, "--out", str(out)]) == 0
    reported = json.loads(capsys.readouterr().out)["bytes"]
    assert reported == sum(path.stat().st_size for path in (out / "shards").iterdir())
    assert reported == pytest.approx(planned["total_bytes"], rel=0.05)  # the plan ignores file headers
    assert (out / "shards" / "instructions.safetensors").stat().st_size > 0.1 * reported
