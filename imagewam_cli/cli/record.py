"""`imagewam record`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.options import EnvOption, SeedOption, from_home
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import output


def record_command(
    out: Annotated[Path, typer.Option("--out", callback=from_home, help="Folder of the new dataset.")],
    env: EnvOption = "tabletop",
    episodes: Annotated[int, typer.Option("--episodes", help="Demonstrations to record.")] = 200,
    seed: SeedOption = 0,
    codec: Annotated[str, typer.Option("--codec", help="h264, av1, or none for exact PNG pictures.")] = "h264",
    disturb: Annotated[
        float, typer.Option("--disturb", help="Share of steps at which the arm is pushed, to record recoveries.")
    ] = 0.0,
) -> None:
    """Record scripted demonstrations as a LeRobot v3.0 dataset.

    Example: imagewam record --env tabletop --episodes 200 --out datasets/tabletop
    """
    record_demonstrations(out, env, episodes, seed, codec, disturb)


def record_demonstrations(out: Path, env: str, episodes: int, seed: int, codec: str, disturb: float = 0.0) -> None:
    """Record, with progress."""
    from imagewam_cli.errors import UnknownNameError, UsageError
    from imagewam_cli.registry import Registry
    from imagewam_cli.sim.record import record

    codecs = {"h264": "h264", "av1": "av1", "none": None}
    if codec not in codecs:
        raise UnknownNameError("codec", codec, codecs)
    if episodes < 1:
        raise UsageError(f"cannot record {episodes} episodes", "ask for at least one")
    require_writable(out.parent)
    make = Registry.installed().environments.load(env)
    with output.progress(episodes, "episode") as bar:
        frames = record(
            make(), out, episodes, seed=seed, video_codec=codecs[codec], disturb=disturb, on_episode=bar.update
        )
    output.say(f"recorded {episodes} episodes, {frames} frames: {out}")
