"""Define the steps of `imagewam demo`: public commands in order, the check that a step is done, and the report."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagewam_cli.config import dump_json
from imagewam_cli.errors import ImagewamError, UsageError, install_hint
from imagewam_cli.files import write_atomically

_TIMES = "times.json"
_NUMBERS = "demo.json"
_PACKAGES = ("gymnasium", "matplotlib", "onnx", "onnxscript", "onnxruntime", "tokenizers")
_STRIDE = 10
"""Neighboring frames are similar, so many scenes with few frames each teach more."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the demo. It is done when its last file, `result`, exists."""

    name: str
    arguments: tuple[str, ...]
    result: Path
    folder: Path

    def run(self) -> None:
        """Run the command in a separate process and record its time.

        Raises:
            ImagewamError: the command failed; it has already printed its error.
        """
        started = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "imagewam_cli", *self.arguments], check=False).returncode
        if code != 0:
            raise ImagewamError(
                f"`imagewam {self.name}` failed with exit code {code}",
                "run the same `imagewam demo` command again to resume",
            )
        times = _read(self.folder / _TIMES)
        times[self.name] = round(time.monotonic() - started, 1)
        write_atomically(self.folder / _TIMES, dump_json(times).encode())


def require_packages() -> None:
    """Check, before the first step, that the packages of the last steps are installed.

    Raises:
        UsageError: a package is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}", install_hint("demo"))


@dataclass(frozen=True, kw_only=True)
class Demo:
    """record > cache > train-expert > eval (policy, random, export)."""

    folder: Path
    episodes: int
    steps: int
    scenes: int

    def commands(self) -> list[Step]:
        """Return all steps in order."""
        f = self.folder
        dataset, cache, run, onnx = f / "dataset", f / "cache", f / "run", f / "onnx"
        scenes = ("--env", "tabletop", "--episodes", str(self.scenes))
        table: list[tuple[str, list[str], Path]] = [
            (
                "record",
                ["record", "--env", "tabletop", "--episodes", str(self.episodes), "--out", str(dataset)],
                dataset / "meta" / "info.json",
            ),
            (
                "cache",
                ["cache", "--editor", "tiny", "--dataset", str(dataset), "--stride", str(_STRIDE), "--out", str(cache)],
                f / "cache.done",
            ),
            (
                "train-expert",
                ["train-expert", "--cache", str(cache), "--steps", str(self.steps), "--out", str(run)],
                run / "result.json",
            ),
            (
                "eval",
                ["eval", "--policy", str(run), *scenes, "--video", "sheet,gif", "--out", str(f / "eval-policy")],
                f / "eval-policy" / "result.json",
            ),
            (
                "eval random",
                ["eval", "--policy", "random", *scenes, "--split", "test", "--out", str(f / "eval-random")],
                f / "eval-random" / "result.json",
            ),
            ("export", ["export", "--run", str(run), "--format", "onnx", "--out", str(onnx)], onnx / "onnx.json"),
            (
                "eval export",
                ["eval", "--policy", str(onnx), *scenes, "--split", "test", "--out", str(f / "eval-onnx")],
                f / "eval-onnx" / "result.json",
            ),
        ]
        return [Step(name=n, arguments=tuple(a), result=r, folder=f) for n, a, r in table]

    def steps_to_do(self) -> Iterator[Step]:
        """Yield each step that is not done by the time it is due.

        Raises:
            UsageError: the folder holds a demo with other numbers.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._require_same_numbers()
        for step in self.commands():
            if not step.result.exists():
                yield step
                if step.name == "cache":
                    step.result.touch()

    def _require_same_numbers(self) -> None:
        """Check that an interrupted or finished demo in the folder has the same numbers: its results are kept."""
        here = {"episodes": self.episodes, "steps": self.steps, "scenes": self.scenes}
        there = _read(self.folder / _NUMBERS)
        for name, number in here.items():
            if there.get(name, number) != number:
                raise UsageError(
                    f"{self.folder} holds a demo with --{name} {there[name]}, but this one has {number}",
                    f"pass --{name} {there[name]} to resume it, or choose another folder with --out",
                )
        write_atomically(self.folder / _NUMBERS, dump_json(here).encode())


def write_report(demo: Demo) -> str:
    """Write report.md and its plot. Return the text for the terminal."""
    from imagewam_cli.evaluation.plots import plot_losses
    from imagewam_cli.training.metrics import read_metrics

    f = demo.folder
    plot_losses(read_metrics(f / "run" / "metrics.jsonl"), f / "loss.png")
    rates = [
        ("policy, unseen scenes", _rate(f / "eval-policy", "test")),
        ("policy, held-out color pairs", _rate(f / "eval-policy", "heldout")),
        ("exported policy (ONNX), unseen scenes", _rate(f / "eval-onnx", "test")),
        ("random policy, unseen scenes", _rate(f / "eval-random", "test")),
    ]
    times = _read(f / _TIMES)
    width = max(len(name) for name, _ in rates)
    lines = [f"{name.ljust(width)}  {text}" for name, text in rates]
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
    files = "\n".join(
        f"- {what}: `{path}`"
        for what, path in [
            ("demonstrations", f / "dataset"),
            ("prefix cache", f / "cache"),
            ("run and policy", f / "run"),
            ("export", f / "onnx"),
            ("results", f / "eval-policy" / "result.json"),
        ]
    )
    report = (
        "# imagewam demo\n\n"
        f"{demo.episodes} demonstrations, {demo.steps} training steps, {demo.scenes} scenes each.\n\n"
        "| success | rate (95 % interval) |\n|---|---|\n"
        + "".join(f"| {name} | {text} |\n" for name, text in rates)
        + f"\nTime: {took}.\n\n## Rollouts\n\n![rollouts](eval-policy/sheet.png)\n\n"
        f"![rollouts, moving](eval-policy/rollouts.gif)\n\n## Loss\n\n![loss](loss.png)\n\n## Files\n\n{files}\n"
    )
    write_atomically(f / "report.md", report.encode())
    return "\n".join(["", *lines, f"time: {took}", f"report: {f / 'report.md'}"])


def _rate(folder: Path, split: str) -> str:
    rate = _read(folder / "result.json")["splits"][split]["total"]["success"]
    return (
        f"{rate['successes']} of {rate['trials']} = {100 * rate['rate']:.0f} % "
        f"({100 * rate['low']:.0f} to {100 * rate['high']:.0f})"
    )


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return values
