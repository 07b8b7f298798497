"""`imagewam eval --dataset`: which episodes are scored, foreign data, and options that have no effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.cli import app
from imagewam_cli.lock import write_lock
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import ExpertRecipe, FlowRecipe, PolicyRecipe, TrainRecipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Path:
    """A run of one step on three of the five episodes of `tabletop`."""
    recipe = TrainRecipe(
        steps=1,
        batch=2,
        validation_fraction=0.4,
        validation_rows=2,
        expert=ExpertRecipe(horizon=4, hidden=16),
        flow=FlowRecipe(inference_steps=1, draws=1),
        policy=PolicyRecipe(execute=2),
    )
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.warns(Warning, match="validation"):
        Trainer(CachedPrefixes(tiny_cache), recipe).train(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = app.run(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def edited(tabletop: Path, folder: Path, **changes: Any) -> Path:
    """Copy the dataset and change info.json: `names` of a feature by its key, or a key of the file."""
    shutil.copytree(tabletop, folder)
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    for key, value in changes.items():
        if key in ("action", "state"):
            info["features"][{"action": "action", "state": "observation.state"}[key]]["names"] = value
        else:
            info[key] = value
    path.write_text(json.dumps(info))
    return folder


def test_the_result_says_which_episodes_were_trained_on(
    capsys: pytest.CaptureFixture[str], trained: Path, tiny_weights: Path, tabletop: Path, tmp_path: Path
) -> None:
    base = ("--policy", trained, "--dataset", tabletop, "--weights", tiny_weights)
    code, out, err = run(capsys, *base, "--out", tmp_path / "all", "--episodes", 5)
    assert code == 0, err
    assert "scored 5 episodes: 3 that the policy was trained on, 2 held out from training" in out
    split = json.loads((trained / "run.json").read_text())["split"]
    code, out, err = run(capsys, *base, "--out", tmp_path / "held", "--held-out", "--format", "json")
    assert code == 0, err
    values = json.loads(out)
    assert values["training"] == {"trained_on": 0, "held_out": 2, "unknown": 0}
    assert ",".join(str(e["episode"]) for e in values["per_episode"]) == split["validation"].replace("-", ",")
    code, _, err = run(capsys, *base, "--held-out", "--only-episodes", split["train"])
    assert code == 1
    assert "was trained on every chosen episode" in err


def test_another_order_is_scored_by_name_and_the_same(
    capsys: pytest.CaptureFixture[str], trained: Path, tiny_weights: Path, tabletop: Path, tmp_path: Path
) -> None:
    """Only the names are exchanged, so the numbers of dx and dy are exchanged with them."""
    other = edited(tabletop, tmp_path / "other", action=["dy", "dx", "grip"])
    results = {}
    for dataset in (tabletop, other):
        code, out, err = run(
            capsys, "--policy", trained, "--dataset", dataset, "--weights", tiny_weights,
            "--out", tmp_path / "out", "--format", "json",
        )  # fmt: skip
        assert code == 0, err
        assert ("is read by name" in err) == (dataset == other)
        results[dataset] = json.loads(out)
    assert results[other]["action_names"] == ["dx", "dy", "grip"]
    plain, swapped = (results[d]["constant"]["absolute"] for d in (tabletop, other))
    assert [step[:2] for step in swapped] == [step[1::-1] for step in plain]
    assert "0 that the policy" not in err
    assert results[other]["training"]["unknown"] == 5  # a set with other names is another one


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"fps": 20}, "plans 10 actions per second, but", "use data at 10 Hz"),
        ({"action": ["a", "b", "grip"]}, "the names of the action's dimensions differ", "the policy was trained for"),
    ],
)
def test_other_rates_and_names_are_refused(
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    tiny_weights: Path,
    tabletop: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
    hint: str,
) -> None:
    dataset = edited(tabletop, tmp_path / "other", **change)
    out = tmp_path / "out"
    code, _, err = run(capsys, "--policy", trained, "--dataset", dataset, "--weights", tiny_weights, "--out", out)
    assert code == 1
    assert message in err
    assert hint in err
    assert not out.exists()


def test_a_camera_of_another_name_is_mapped_by_the_option_of_the_hint(
    capsys: pytest.CaptureFixture[str], trained: Path, tiny_weights: Path, tabletop: Path, tmp_path: Path
) -> None:
    policy = Path(shutil.copytree(trained, tmp_path / "run"))
    path = policy / "policy" / "policy.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "cameras": ["front"], "keys": {**config["keys"], "cameras": ["front"]}}))
    base = ("--policy", policy, "--dataset", tabletop, "--weights", tiny_weights)
    code, _, err = run(capsys, *base)
    assert code == 1
    assert "needs the camera front" in err
    assert "it has: top" in err
    assert "--camera top=front" in err
    code, _, err = run(capsys, *base, "--camera", "top=left")
    assert code == 2
    assert "has no camera 'left'" in err


@pytest.mark.parametrize(
    "option",
    [
        ("--env", "tabletop"), ("--split", "test"), ("--seed", "0"), ("--max-steps", "3"), ("--execute", "2"),
        ("--video", "gif"), ("--other-instructions",),
    ],
)  # fmt: skip
def test_options_of_a_simulator_are_refused_with_a_dataset(
    capsys: pytest.CaptureFixture[str], trained: Path, tabletop: Path, option: tuple[str, ...]
) -> None:
    code, _, err = run(capsys, "--policy", trained, "--dataset", tabletop, *option)
    assert code == 2
    assert f"{option[0]} has no effect with --dataset" in err
    assert f"omit {option[0]}" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "random", "--held-out"), "--held-out has no effect without --dataset"),
        (("--policy", "random", "--only-episodes", "1"), "--only-episodes has no effect without --dataset"),
        (("--policy", "random", "--compile"), "--compile has no effect with the baseline 'random'"),
        (("--policy", "random", "--camera", "a=b"), "--camera has no effect with the baseline 'random'"),
        (("--policy", "expert", "--execute", "3"), "--execute has no effect with the baseline 'expert'"),
        (("--policy", "expert", "--other-instructions"), "--other-instructions has no effect with the baseline"),
        (("--policy", "random", "--execute", "9"), "the policy plans only 8 actions"),
    ],
)
def test_options_without_an_effect_are_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err


def test_one_evaluation_at_a_time_writes_a_folder_and_old_pictures_go(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results"
    short = ("--policy", "expert", "--episodes", 1, "--max-steps", 1, "--split", "test", "--out", out)
    with write_lock(out):
        code, _, err = run(capsys, *short)
        assert code == 1
        assert "is being written by process" in err
        assert "--out" in err
    assert run(capsys, *short, "--video", "sheet")[0] == 0
    assert (out / "sheet.png").exists()
    assert run(capsys, *short)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["result.json"]
