"""Datasets as other projects name them go through every command, and nothing on disk is renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.cli.app import run
from imagewam_cli.data.formats import open_dataset
from imagewam_cli.kvcache.storage.manifests import read_manifest
from imagewam_cli.policy.bundle import read_bundle
from tests.support.feature_sets import LENGTHS
from tests.support.key_styles import STYLES, TOTAL

USUAL = "lerobot"


def results(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run a command that must succeed; return what it prints as JSON."""
    code = run([*map(str, arguments), "--format", "json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("styles")
    return {name: style.write(folder / name) for name, style in STYLES.items()}


@pytest.mark.parametrize("name", STYLES)
def test_a_policy_keeps_the_keys_of_its_dataset(
    name: str, datasets: dict[str, Path], tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only `cache` is told the keys; training, judging, attention maps and export are not."""
    style, dataset = STYLES[name], datasets[name]
    cache, trained, exported = (tmp_path / part for part in ("cache", "run", "bundle"))
    small = ["--weights", tiny_weights, "--image-size", "64x64", "--stride", 2, "--layers", 0]
    results(capsys, "cache", "--dataset", dataset, *small, "--out", cache, *style.options)
    manifest = read_manifest(cache)
    assert sorted(manifest.instructions) == sorted(style.instructions)
    assert list(manifest.dataset.state_names) == list(style.state_names)
    assert list(manifest.dataset.action_names) == list(style.action_names)
    described = results(capsys, "info", cache)
    assert (described["sentences"], described["episodes"]) == (list(manifest.instructions), "all 3")
    assert described["keys"]["action"] == manifest.dataset.keys.action

    results(capsys, "train-expert", "--cache", cache, "--steps", 2, "--batch", 4, "--out", trained)
    assert read_bundle(trained / "policy").config.keys == manifest.dataset.keys
    judged = results(capsys, "eval", "--policy", trained, "--dataset", dataset, "--weights", tiny_weights)
    assert list(judged["action_names"]) == list(style.action_names)
    maps = results(
        capsys, "attention", "--policy", trained, "--dataset", dataset, "--weights", tiny_weights, "--rows", 6,
        "--target", "end",
    )  # fmt: skip
    assert {row["instruction"] for row in maps["per_row"]} <= set(style.instructions)
    bundle = ["--format", "bundle", "--weights", str(tiny_weights)]
    assert run(["export", "--run", str(trained), "--out", str(exported), *bundle]) == 0
    capsys.readouterr()
    again = results(capsys, "eval", "--policy", exported, "--dataset", dataset, "--weights", tiny_weights)
    assert again["ratio_to_constant"] == judged["ratio_to_constant"]


@pytest.mark.parametrize("name", STYLES)
def test_training_without_a_cache_keeps_the_keys_too(
    name: str, datasets: dict[str, Path], tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    style, trained = STYLES[name], tmp_path / "run"
    small = ["--weights", tiny_weights, "--image-size", "64x64", "--stride", 4, "--layers", 0]
    steps = ["--steps", 1, "--batch", 2, "--out", trained]
    results(capsys, "train-expert", "--online", "--dataset", datasets[name], *small, *steps, *style.options)
    keys = read_bundle(trained / "policy").config.keys
    assert keys is not None
    assert list(open_dataset(datasets[name], keys).info.state_names) == list(style.state_names)


@pytest.mark.parametrize("name", STYLES)
def test_info_lists_every_feature_and_the_options_to_pass(
    name: str, datasets: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options name the state and action that the style means."""
    style = STYLES[name]
    values = results(capsys, "info", datasets[name])
    shown = {feature["key"]: feature for feature in values["features"]}
    for key, column in style.columns.items():
        assert (shown[key]["dtype"], shown[key]["shape"]) == (column.dtype, list(column.shape))
    assert {key for key, feature in shown.items() if feature["kind"] == "camera"} == set(style.cameras)
    proposed = dict(zip(values["options"].split()[::2], values["options"].split()[1::2], strict=True))
    wanted = dict(zip(style.options[::2], style.options[1::2], strict=True))
    instruction = wanted.pop("--instruction-key", None)
    assert proposed == wanted
    assert instruction is None or values["instruction_features"][0] == instruction
    assert (values["state"], values["action"]) == (list(style.state_names), list(style.action_names))

    tasks = {sentence["text"] for sentence in values["sentences"]}
    assert tasks == {style.tasks[i % len(style.tasks)] for i in range(len(LENGTHS))}  # also an empty one

    chosen = results(capsys, "info", datasets[name], *style.options)
    assert {sentence["text"] for sentence in chosen["sentences"]} == set(style.instructions)
    assert sum(sentence["frames"] for sentence in chosen["sentences"]) == TOTAL
    assert run(["info", str(datasets[name])]) == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in style.columns)


@pytest.mark.parametrize("name", [name for name in STYLES if "--state-key" in STYLES[name].options])
def test_a_command_without_the_options_proposes_them_at_once(
    name: str, datasets: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    style = STYLES[name]
    assert run(["cache", "plan", "--dataset", str(datasets[name])]) == 1
    hint = capsys.readouterr().err.partition("hint: ")[2]
    wanted = " ".join(style.options).partition(" --instruction-key")[0]
    assert f"pass {wanted}, or other features" in hint


def test_another_set_is_judged_with_options(
    datasets: dict[str, Path], tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy without keys, as they were made before, reads the usual ones and says so."""
    dataset, trained = datasets["groot"], tmp_path / "run"
    small = ["--weights", tiny_weights, "--image-size", "64x64", "--stride", 4, "--layers", 0]
    steps = ["--steps", 1, "--batch", 2, "--out", trained]
    results(capsys, "train-expert", "--online", "--dataset", dataset, *small, *steps)
    path = trained / "policy" / "policy.json"
    policy = json.loads(path.read_text())
    del policy["keys"]
    path.write_text(json.dumps(policy))
    judge = ["eval", "--policy", trained, "--dataset", dataset, "--weights", tiny_weights]
    assert run([*map(str, judge)]) == 0
    assert "does not say which features" in capsys.readouterr().err
    results(capsys, *judge, "--state-key", "observation.state", *STYLES["groot"].options)
    assert run([*map(str, judge), "--state-key", "nothing"]) == 1
    assert "has no feature 'nothing' for the state" in capsys.readouterr().err
