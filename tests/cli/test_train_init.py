"""`imagewam train-expert --init`: the initial weights, the record in the run, and unknown values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagewam_cli.cli import app
from imagewam_cli.config import load_yaml
from imagewam_cli.editors.installed import installed_editor
from imagewam_cli.expert.initialization import resized
from imagewam_cli.training.recipe import TrainRecipe

SMALL = ["--steps", "1", "--batch", "2", "--set", "expert.hidden=16", "--set", "expert.horizon=2"]
SMALL += ["--set", "policy.execute=1", "--set", "validation_fraction=0", "--set", "optimizer.learning_rate=1.0e-12"]


@pytest.mark.parametrize("how", ["published", "repaired"])
def test_a_run_starts_from_the_editors_weights(
    tiny_cache: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    out = tmp_path / "run"
    command = ["train-expert", "--cache", str(tiny_cache), "--out", str(out)]
    assert app.run([*command, "--weights", str(tiny_weights), "--init", how, *SMALL]) == 0
    assert load_yaml(out / "config.yaml", TrainRecipe).expert.init == how
    editor = installed_editor("tiny").released_weights(tiny_weights)
    name = "double_blocks.0.img_attn.proj.weight"  # not fused, so "published" and "repaired" agree
    trained = load_file(out / "policy" / "expert.safetensors")[name]
    torch.testing.assert_close(trained, resized(editor[name].float(), trained.shape), atol=1e-4, rtol=1e-3)
    assert app.run([*command, "--init", "none", *SMALL]) == 1
    assert f"holds a run with expert.init = {how}, but this run has none" in capsys.readouterr().err


def test_an_unknown_init_is_refused(tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train-expert", "--cache", str(tiny_cache), "--out", str(tmp_path / "run"), "--init", "publshed"]
    assert app.run(command) == 2
    assert "expert.init is 'publshed'" in capsys.readouterr().err


def test_weights_that_nothing_reads_are_refused(
    tiny_cache: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert app.run(["train-expert", "--cache", str(tiny_cache), "--out", str(out), "--weights", str(tiny_weights)]) == 2
    assert "--weights has no effect on a cache with --init none" in capsys.readouterr().err
    assert not out.exists()
