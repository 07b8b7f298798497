"""`imagewam record`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.help import ADVANCED, INPUT, OUTPUT
from imagewam_cli.cli.options import EnvOption, SeedOption, from_home
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import output


def record_command(
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FOLDER", callback=from_home, help="Folder of the new dataset.", rich_help_panel=OUTPUT
        ),
    ],
    env: EnvOption = "tabletop",
    episodes: Annotated[
        int,
        typer.Option("--episodes", metavar="N", help="Number of demonstrations to record.", rich_help_panel=INPUT),
    ] = 200,
    seed: SeedOption = 0,
    codec: Annotated[
        str,
        typer.Option(
            "--codec",
            metavar="NAME",
            help="Video codec: h264, av1, or none for lossless PNG pictures.",
            rich_help_panel=OUTPUT,
        ),
    ] = "h264",
    disturb: Annotated[
        float,
        typer.Option(
            "--disturb",
            metavar="FRACTION",
            help="Fraction of steps, 0 to 0.5, that execute a random action, to record how the demonstrator recovers.",
            rich_help_panel=ADVANCED,
        ),
    ] = 0.0,
) -> None:
    """Record demonstrations in a simulator as a LeRobot dataset.

    Examples:
        imagewam record --episodes 200 --out datasets/tabletop
    """
    record_demonstrations(out, env, episodes, seed, codec, disturb)


def record_demonstrations(out: Path, env: str, episodes: int, seed: int, codec: str, disturb: float = 0.0) -> None:
    """Record demonstrations of the scripted demonstrator, with a progress bar.

    Raises:
        UsageError: the codec or environment is unknown, `episodes` is below 1, or `disturb` is outside [0, 0.5].
    """
    from imagewam_cli.errors import UnknownNameError, UsageError
    from imagewam_cli.sim.environment import load_environment
    from imagewam_cli.sim.record import record

    codecs = {"h264": "h264", "av1": "av1", "none": None}
    if codec not in codecs:
        raise UnknownNameError("codec", codec, codecs)
    if episodes < 1:
        raise UsageError(f"--episodes must be at least 1, got {episodes}", "omit it for the default")
    require_writable(out.parent)
    make = load_environment(env)
    with output.progress(episodes, "episode") as bar:
        frames = record(
            make(), out, episodes, seed=seed, video_codec=codecs[codec], disturb=disturb, on_episode=bar.update
        )
    output.say(f"recorded {episodes} episodes, {frames} frames: {out}")
