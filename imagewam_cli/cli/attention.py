"""`imagewam attention`."""

from __future__ import annotations

import re
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from imagewam_cli.cli.options import (
    CompileOption,
    DeviceOption,
    FormatName,
    FormatOption,
    OffloadOption,
    WeightsOption,
    chosen_hardware,
    existing_dataset,
    existing_policy,
    from_home,
    newest_instead_of,
)
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import output

_SHEET_ROWS = 8
_PAGE = re.compile(r"episode-\d{6,}-frame-\d{6,}\.png")


class TargetName(StrEnum):
    horizon = "horizon"
    end = "end"


def attention_command(
    dataset: Annotated[Path, typer.Option("--dataset", callback=from_home, help="Recorded episodes to look at.")],
    policy: Annotated[
        Path | None,
        typer.Option("--policy", callback=from_home, help="A run or bundle folder; by default the newest run."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="Frames to look at, spread over the episodes.")] = 32,
    target: Annotated[
        TargetName, typer.Option("--target", help="Compare with the frame after the chunk, or with the episode's end.")
    ] = TargetName.horizon,
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=from_home, help="Folder of numbers and pictures; by default beside the policy."),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "none",
    compile: CompileOption = False,
    format: FormatOption = FormatName.human,
) -> None:
    """Show where a policy's action tokens look, and measure whether they look at what is going to change.

    Rows are of episodes that the policy's run held out, where it knows this dataset.

    Example: imagewam attention --policy runs/first --dataset datasets/tabletop --rows 32
    """
    from imagewam_cli.cli.tables import attention_table
    from imagewam_cli.config import to_dict
    from imagewam_cli.data.formats import open_dataset
    from imagewam_cli.data.types import KeyMap
    from imagewam_cli.evaluation.attention.measurement import evaluate_attention
    from imagewam_cli.policy.bundle import find_bundle
    from imagewam_cli.policy.policy import Policy
    from imagewam_cli.training.held_out import held_out_episodes

    if policy is None:
        policy = newest_instead_of("--policy", "run")
    _refuse_onnx(existing_policy("--policy", policy))
    existing_dataset(dataset)  # before the policy is loaded for nothing
    folder = out if out is not None else policy / "attention" / dataset.resolve().name
    require_writable(folder)
    acting = Policy.load(policy, hardware=chosen_hardware(device, offload, compile), weights=weights)
    recorded = open_dataset(dataset, KeyMap(cameras=acting.cameras))
    held_out = held_out_episodes(find_bundle(policy), recorded)
    if len(held_out) < 2:
        output.say(
            f"{len(held_out)} episodes are known to be held out: rows are of all, the policy may have trained on some"
        )
        held_out = ()
    with output.progress(rows, "row") as bar:
        result, glances = evaluate_attention(
            acting, recorded, rows=rows, target=target.value, held_out=held_out, on_rows=bar.update
        )
    _write(folder, result, glances)
    of = f"{result.episodes} held-out episodes" if result.held_out else f"{result.episodes} episodes"
    left_out = f", {result.still} more left out: nothing changes in them" if result.still else ""
    text = f"{attention_table(result)}\n{result.rows} rows of {of}{left_out}\n{folder}"
    output.result(to_dict(result) | {"folder": str(folder)}, text, format.value)


def _refuse_onnx(policy: Path) -> None:
    from imagewam_cli.errors import UsageError
    from imagewam_cli.workspace import ONNX_MARKER

    if (policy / ONNX_MARKER).exists():
        raise UsageError(
            f"{policy} is an ONNX export: its attention cannot be looked into", "name the run that it was exported from"
        )


def _write(folder: Path, result: Any, glances: Any) -> None:
    """All pictures are drawn aside before the first of them, and the pages of an earlier run, are replaced."""
    from imagewam_cli.config import dump_json, to_dict
    from imagewam_cli.evaluation.attention.pictures import page, sheet
    from imagewam_cli.evaluation.pictures import spaced, write_picture
    from imagewam_cli.files import write_atomically

    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".attention-", dir=folder) as scratch:
        drawn = Path(scratch)
        for glance in glances:
            name = f"episode-{glance.row.episode:06d}-frame-{glance.row.frame:06d}.png"
            write_picture(drawn / name, page(glance))
        shown = spaced(len(glances), _SHEET_ROWS)
        write_picture(folder / "sheet.png", sheet([glances[i] for i in shown]))
        for path in rows.iterdir():
            if _PAGE.fullmatch(path.name):  # the folder may hold what is not ours
                path.unlink()
        for path in drawn.iterdir():
            path.replace(rows / path.name)
    write_atomically(folder / "result.json", dump_json(to_dict(result)).encode())
