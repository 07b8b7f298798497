"""`imagewam import`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.options import DeviceOption, FormatName, FormatOption, WeightsOption, existing, from_home
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import bytes_text, output


class RoundingName(StrEnum):
    exact = "exact"
    published_bf16 = "published-bf16"


def import_command(
    checkpoint: Annotated[Path, typer.Argument(callback=from_home, help="The model.pt of a published policy.")],
    editor: Annotated[str, typer.Option("--editor", help="The editor that it was trained on.")],
    robot: Annotated[str, typer.Option("--robot", help="libero or robotwin: cameras, normalisation, grippers.")],
    stats: Annotated[Path, typer.Option("--stats", callback=from_home, help="Its dataset_stats.json.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", callback=from_home, help="Its train_config.yaml; without it, the published defaults."),
    ] = None,
    camera: Annotated[
        list[str] | None, typer.Option("--camera", help="Your names of the cameras, in the robot's order.")
    ] = None,
    rounding: Annotated[
        RoundingName | None,
        typer.Option("--rounding", help="How positions and times are rounded; by default as it was trained."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=from_home, help="Folder of the policy; by default exports/CHECKPOINT."),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    format: FormatOption = FormatName.human,
) -> None:
    """Make a policy of a published checkpoint: one that eval, export and Policy.load run like any other.

    Example: imagewam import model.pt --editor flux2-klein-base-4b --robot libero --stats dataset_stats.json
    """
    import dataclasses

    from imagewam_cli.config import to_dict
    from imagewam_cli.editors.loading.hardware import Hardware
    from imagewam_cli.errors import UsageError
    from imagewam_cli.published.importing import import_policy
    from imagewam_cli.published.robots import robot as preset
    from imagewam_cli.published.settings import TrainSettings, read_train_config
    from imagewam_cli.workspace import EXPORTS

    existing("the checkpoint", checkpoint, "pass the model.pt of a published policy")
    existing("--stats", stats, "pass the dataset_stats.json that was published with the checkpoint")
    if config is not None:
        existing("--config", config, "pass the checkpoint's train_config.yaml, or leave it out")
    chosen = preset(robot)
    if camera:
        if len(camera) != len(chosen.cameras):
            names = ", ".join(chosen.cameras)
            raise UsageError(f"{robot} has {len(chosen.cameras)} cameras, not {len(camera)}", f"name these: {names}")
        chosen = dataclasses.replace(chosen, cameras=tuple(camera))
    folder = out if out is not None else EXPORTS / checkpoint.stem
    require_writable(folder.parent)
    imported = import_policy(
        checkpoint,
        stats,
        folder,
        editor=editor,
        robot=chosen,
        train=read_train_config(config) if config is not None else TrainSettings(),
        rounding=rounding.value if rounding is not None else None,
        weights=weights,
        hardware=Hardware(device=device),
    )
    lines = [f"{imported.folder}: {', '.join(f'{n} {what}' for what, n in imported.sizes.items())}"]
    lines += [f"  {name}  {bytes_text(size)}" for name, size in imported.files.items()]
    lines.append(f"  rounding: {imported.rounding}")
    output.result(to_dict(imported), "\n".join(lines), format.value)
