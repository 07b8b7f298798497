"""`imagewam demo`: the whole way, each step the public command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.options import from_home


def demo_command(
    out: Annotated[Path, typer.Option("--out", callback=from_home, help="Folder of the demo.")] = Path("imagewam-demo"),
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Demonstrations to record.")] = 1200,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 1000,
    scenes: Annotated[int, typer.Option("--scenes", min=1, help="Scenes per split to evaluate on.")] = 50,
) -> None:
    """Record, cache, train, evaluate, export, evaluate the export; then a report. Interrupted, it continues.

    Example: imagewam demo --out imagewam-demo
    """
    from imagewam_cli.cli.demo_steps import Demo, write_report
    from imagewam_cli.cli.output import output

    demo = Demo(folder=out, episodes=episodes, steps=steps, scenes=scenes)
    for step in demo.steps_to_do():
        output.say(f"\n$ imagewam {' '.join(step.arguments)}")
        step.run()
    output.result(None, write_report(demo))
