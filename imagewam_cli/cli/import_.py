"""`imagewam import`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.help import ADVANCED, INPUT, OUTPUT
from imagewam_cli.cli.options import DeviceOption, FormatName, FormatOption, WeightsOption, from_home, require_existing
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import bytes_text, output


class RoundingName(StrEnum):
    exact = "exact"
    published_bf16 = "published-bf16"


def import_command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", callback=from_home, help="The published model.pt.")
    ],
    editor: Annotated[
        str,
        typer.Option(
            "--editor", metavar="NAME", help="Editor that the checkpoint was trained on.", rich_help_panel=INPUT
        ),
    ],
    robot: Annotated[
        str,
        typer.Option(
            "--robot",
            metavar="NAME",
            help="Cameras, normalization and gripper: libero or robotwin.",
            rich_help_panel=INPUT,
        ),
    ],
    stats: Annotated[
        Path,
        typer.Option(
            "--stats",
            metavar="FILE",
            callback=from_home,
            help="The dataset_stats.json of the checkpoint.",
            rich_help_panel=INPUT,
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            callback=from_home,
            help="The train_config.yaml of the checkpoint; by default the published settings.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option(
            "--camera",
            metavar="NAME",
            help="Your dataset's name for a camera; repeat it for every camera, in the robot's order.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    rounding: Annotated[
        RoundingName | None,
        typer.Option(
            "--rounding",
            help="Rounding of positions and times; by default that of the training.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            callback=from_home,
            help="Folder of the policy; by default exports/CHECKPOINT.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    format: FormatOption = FormatName.human,
) -> None:
    """Convert a published checkpoint into a policy.

    `eval`, `export` and `Policy.load` accept the result like any other policy.

    Examples:
        imagewam import model.pt --editor NAME --robot libero --stats stats.json
    """
    import dataclasses

    from imagewam_cli.config import to_dict
    from imagewam_cli.editors.loading.hardware import Hardware
    from imagewam_cli.errors import UsageError
    from imagewam_cli.published.importing import import_policy
    from imagewam_cli.published.robots import robot_preset
    from imagewam_cli.published.settings import TrainSettings, read_train_config
    from imagewam_cli.workspace import EXPORTS

    require_existing("the checkpoint", checkpoint, "pass the model.pt of a published policy")
    require_existing("--stats", stats, "pass the dataset_stats.json that was published with the checkpoint")
    if config is not None:
        require_existing("--config", config, "pass the checkpoint's train_config.yaml, or omit it")
    chosen = robot_preset(robot)
    if camera:
        if len(camera) != len(chosen.cameras):
            names = ", ".join(chosen.cameras)
            raise UsageError(
                f"{robot} has {len(chosen.cameras)} cameras, got {len(camera)}",
                f"pass one --camera for each of {names}",
            )
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
