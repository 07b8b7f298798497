"""`imagewam demo`: the whole pipeline; each step runs a public command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.help import OUTPUT, RECIPE
from imagewam_cli.cli.options import from_home


def demo_command(
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FOLDER", callback=from_home, help="Folder for all results.", rich_help_panel=OUTPUT
        ),
    ] = Path("imagewam-demo"),
    episodes: Annotated[
        int,
        typer.Option(
            "--episodes", min=1, metavar="N", help="Number of demonstrations to record.", rich_help_panel=RECIPE
        ),
    ] = 1200,
    steps: Annotated[
        int, typer.Option("--steps", min=1, metavar="N", help="Number of training steps.", rich_help_panel=RECIPE)
    ] = 1000,
    scenes: Annotated[
        int,
        typer.Option(
            "--scenes", min=1, metavar="N", help="Number of scenes per split to evaluate on.", rich_help_panel=RECIPE
        ),
    ] = 50,
) -> None:
    """Run the whole pipeline on a small built-in task.

    Records demonstrations, caches them, trains, evaluates, exports, evaluates the export and writes a report. Run the
    same command again to resume an interrupted demo.

    Examples:
        imagewam demo --out imagewam-demo
    """
    from imagewam_cli.cli.demo_steps import Demo, require_packages, write_report
    from imagewam_cli.cli.output import output
    from imagewam_cli.errors import RunError
    from imagewam_cli.lock import write_lock

    require_packages()
    demo = Demo(folder=out, episodes=episodes, steps=steps, scenes=scenes)
    with write_lock(out, error=RunError, hint="wait for it to end, or choose another folder with --out"):
        for step in demo.steps_to_do():
            output.say(f"\n$ imagewam {' '.join(step.arguments)}")
            step.run()
        output.result(None, write_report(demo))
