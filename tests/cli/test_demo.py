"""Run a small demo end to end on the embedded editor, then the example on its result."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from imagewam_cli.cli.demo_steps import Demo, write_report
from imagewam_cli.errors import UsageError
from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    demo = Demo(folder=tmp_path_factory.mktemp("demo") / "demo", episodes=4, steps=3, scenes=1)
    for step in demo.steps_to_do():
        step.run()
    return demo


def test_every_step_writes_its_result_and_no_step_runs_twice(finished: Demo) -> None:
    assert all(step.result.exists() for step in finished.commands())
    assert list(finished.steps_to_do()) == []


def test_a_step_without_its_result_runs_again(finished: Demo) -> None:
    result = finished.folder / "eval-random" / "result.json"
    kept = result.read_bytes()
    result.unlink()
    assert [step.name for step in finished.steps_to_do()] == ["eval random"]
    result.write_bytes(kept)


def test_the_report_names_every_evaluation(finished: Demo) -> None:
    text = write_report(finished)
    report = (finished.folder / "report.md").read_text()
    for name in ("policy, unseen scenes", "held-out color pairs", "ONNX", "random policy"):
        assert name in text
        assert name in report
    assert (finished.folder / "loss.png").exists()
    assert (finished.folder / "eval-policy" / "sheet.png").exists()


def test_the_export_acts_like_the_policy(finished: Demo) -> None:
    """One scene takes the same number of steps with torch and with onnxruntime."""
    results = [json.loads((finished.folder / f / "result.json").read_text()) for f in ("eval-policy", "eval-onnx")]
    steps = [next(e["steps"] for e in r["episodes"] if e["split"] == "test") for r in results]
    assert steps[0] == steps[1]


def test_the_example_runs_the_policy(finished: Demo) -> None:
    command = [sys.executable, str(EXAMPLES / "act.py"), str(finished.folder / "run"), "--scene", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    instruction, outcome = result.stdout.splitlines()
    assert "zone" in instruction or "area" in instruction or " the " in instruction
    assert "after" in outcome


def test_a_demo_with_other_numbers_is_not_mixed_into_the_first(tmp_path: Path) -> None:
    first = Demo(folder=tmp_path, episodes=4, steps=3, scenes=1)
    assert next(first.steps_to_do()).name == "record"
    assert next(first.steps_to_do()).name == "record"
    with pytest.raises(UsageError, match="holds a demo with --steps 3, but this one has 5") as error:
        next(dataclasses.replace(first, steps=5).steps_to_do())
    assert error.value.hint == "pass --steps 3 to resume it, or choose another folder with --out"
