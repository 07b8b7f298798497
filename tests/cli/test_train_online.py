"""`imagewam train-expert --online`: the same losses as with a float32 cache; other commands accept such a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagewam_cli.cli import app
from imagewam_cli.data.formats import open_dataset
from imagewam_cli.training.metrics import read_metrics

SMALL = ["--steps", "6", "--batch", "8", "--set", "expert.hidden=16", "--set", "expert.horizon=4"]
SMALL += ["--set", "policy.execute=2", "--set", "save_every=3", "--set", "log_every=1", "--set", "validate_every=3"]
SMALL += ["--set", "flow.inference_steps=2", "--set", "precision=float32", "--set", "flow.draws=3"]
STRIDE = 4


@pytest.fixture(scope="module")
def source(tabletop: Path, tiny_weights: Path) -> list[str]:
    """Return options that encode the rows of `tiny_cache`."""
    inputs = ["--editor", "tiny", "--weights", str(tiny_weights), "--dataset", str(tabletop)]
    return ["--online", *inputs, "--image-size", "64x64", "--stride", str(STRIDE), "--encode-batch", "3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path, source: list[str]) -> tuple[Path, Path]:
    """Train with the cache and online, on the same rows with the same recipe; return both runs."""
    folder = tmp_path_factory.mktemp("runs")
    cached, online = folder / "cached", folder / "online"
    assert app.run(["--quiet", "train-expert", "--cache", str(tiny_cache), "--out", str(cached), *SMALL]) == 0
    assert app.run(["--quiet", "train-expert", *source, "--out", str(online), *SMALL]) == 0
    return cached, online


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without measured times."""
    return [
        {k: v for k, v in record.items() if not k.endswith("seconds_per_step")}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def test_losses_equal_those_with_a_float32_cache(runs: tuple[Path, Path]) -> None:
    cached, online = (metrics_of(run) for run in runs)
    assert [record["step"] for record in online] == list(range(1, 7))
    assert "validation_action_error" in online[-1]
    for expected, found in zip(cached, online, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    losses = [record["loss"] for record in online]
    assert max(losses) - min(losses) > 1e-3  # losses change, so the comparison above means something


def test_policies_name_the_same_editor(runs: tuple[Path, Path], tabletop: Path) -> None:
    cached, online = (json.loads((run / "policy" / "policy.json").read_text()) for run in runs)
    assert online == cached
    cached_run, online_run = (json.loads((run / "run.json").read_text()) for run in runs)
    assert online_run.pop("codec") == "none"
    assert cached_run.pop("codec") == "fp32"
    assert online_run.pop("online") == str(tabletop.resolve())
    assert cached_run.pop("cache")
    assert online_run == cached_run


def test_a_resumed_run_gives_the_same_numbers(
    runs: tuple[Path, Path], source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imagewam_cli.training import loop

    original = loop.Trainer.step

    def step(self: loop.Trainer, number: int, batch: Any) -> float:
        if number == 4:
            raise KeyboardInterrupt
        return original(self, number, batch)

    command = ["--quiet", "train-expert", *source, "--out", str(tmp_path / "run"), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", step)
        assert app.run(command) == 130
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert app.run(command) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(runs[1])
    for name in ("expert.safetensors", "samples.safetensors", "policy.json"):
        assert (tmp_path / "run" / "policy" / name).read_bytes() == (runs[1] / "policy" / name).read_bytes()


def test_other_commands_accept_an_online_run(
    runs: tuple[Path, Path], tabletop: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, weights = str(runs[1]), ["--weights", str(tiny_weights)]
    assert app.run(["info", run]) == 0
    assert "codec: none" in capsys.readouterr().out
    dataset = ["--dataset", str(tabletop)]
    evaluated = ["eval", "--policy", run, *dataset, *weights, "--out", str(tmp_path / "eval"), "--format", "json"]
    assert app.run(evaluated) == 0
    capsys.readouterr()
    looked = ["attention", "--policy", run, *dataset, *weights, "--out", str(tmp_path / "attention")]
    assert app.run(looked) == 0
    assert app.run(["export", "--run", run, *weights, "--format", "bundle", "--out", str(tmp_path / "bundle")]) == 0


def test_a_dry_run_reports_the_disk_space_of_pictures(
    source: list[str], tabletop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-expert", *source, "--out", str(tmp_path / "run"), *SMALL, "--steps", "100", "--dry-run"]
    assert app.run([*command, "--format", "json"]) == 0
    dataset = open_dataset(tabletop)
    height, width = dataset.info.cameras["top"]
    rows = sum(-(-episode.length // STRIDE) for episode in dataset.episodes())
    assert json.loads(capsys.readouterr().out)["scratch_bytes"] == rows * height * width * 3
    assert app.run(command) == 0
    printed = capsys.readouterr()
    assert "of disk for pictures while training" in printed.out
    assert "into a temporary file of" in printed.err
    assert not (tmp_path / "run").exists()


def test_the_expert_can_start_from_the_editors_weights(source: list[str], tmp_path: Path) -> None:
    command = ["--quiet", "train-expert", *source, "--out", str(tmp_path / "run"), *SMALL, "--steps", "1"]
    assert app.run([*command, "--init", "repaired"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--online", "--cache", "caches/one"], "--online trains without a cache"),
        (["--editor", "tiny"], "--editor has no effect without --online"),
        (["--cache", "caches/one", "--dataset", "mine"], "--dataset has no effect without --online"),
        (["--camera", "top"], "--camera has no effect without --online"),
        (["--image-size", "64x64"], "--image-size has no effect without --online"),
        (["--encode-batch", "4"], "--encode-batch has no effect without --online"),
        (["--online", "--dry-run"], "--dry-run needs --dataset"),
        (["--online", "--dataset", "{tabletop}", "--stride", "0"], "stride"),
        (["--online", "--load", "read"], "--load has no effect with --online"),
        (["--online", "--editor", "tinny"], "unknown editor 'tinny'"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str],
    message: str,
    tabletop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(["train-expert", *(text.format(tabletop=tabletop) for text in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[0]
    assert len(lines) <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_decodes_only_the_pictures_of_its_steps(
    source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs three steps of two rows, and only counts the rows for validation."""
    arguments = [*source, "--dry-run", "--format", "json", *SMALL, "--batch", "2", "--set", "validation_fraction=0.4"]
    assert app.run(["train-expert", *arguments]) == 0
    printed = capsys.readouterr()
    assert "decoding the pictures of 6 rows" in printed.err
    assert json.loads(printed.out)["validation_rows"] > 6
