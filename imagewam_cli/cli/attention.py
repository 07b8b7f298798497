"""`imagewam attention`."""

from __future__ import annotations

import re
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagewam_cli.cli.dataset_options import DatasetOptions, takes_dataset_options
from imagewam_cli.cli.help import INPUT, OUTPUT
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
    newest_with_notice,
)
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewam_cli.evaluation.attention.measurement import AttentionResult, AttentionSample

_SHEET_ROWS = 8
_PAGE = re.compile(r"episode-\d{6,}-frame-\d{6,}\.png")


class TargetName(StrEnum):
    horizon = "horizon"
    end = "end"


@takes_dataset_options(of_policy=True)
def attention_command(
    *,
    dataset: Annotated[
        Path,
        typer.Option(
            "--dataset",
            metavar="FOLDER",
            callback=from_home,
            help="Recorded episodes to measure on.",
            rich_help_panel=INPUT,
        ),
    ],
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            metavar="FOLDER",
            callback=from_home,
            help="A run or a bundle; by default the newest run.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option("--rows", metavar="N", help="Number of frames, spread over the episodes.", rich_help_panel=INPUT),
    ] = 32,
    target: Annotated[
        TargetName,
        typer.Option(
            "--target",
            help="Frame to compare with: the one after the action chunk (horizon), or the last of the episode (end).",
            rich_help_panel=INPUT,
        ),
    ] = TargetName.horizon,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            callback=from_home,
            help="Folder for the results; by default POLICY/attention/DATASET.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "none",
    compile: CompileOption = False,
    reading: DatasetOptions,
    format: FormatOption = FormatName.human,
) -> None:
    """Show which parts of the picture a policy attends to.

    Measures how much of that attention falls on the pixels that are about to change. Uses the episodes that training
    held out, if the policy was trained on this dataset.

    Examples:
        imagewam attention --policy runs/first --dataset datasets/tabletop
    """
    from imagewam_cli.cli.tables import attention_table
    from imagewam_cli.config import to_dict
    from imagewam_cli.evaluation.attention.measurement import evaluate_attention
    from imagewam_cli.policy.policy import Policy
    from imagewam_cli.training.held_out import held_out_episodes

    if policy is None:
        policy = newest_with_notice("--policy", "run")
    _refuse_onnx(existing_policy("--policy", policy))
    existing_dataset(dataset)  # fail before loading the policy
    folder = out if out is not None else policy / "attention" / dataset.resolve().name
    require_writable(folder)
    acting = Policy.load(policy, hardware=chosen_hardware(device, offload, compile), weights=weights)
    recorded, cameras = reading.open_for(acting, dataset)
    held_out = held_out_episodes(acting, recorded)
    if len(held_out) < 2:
        output.say(
            f"only {len(held_out)} held-out episodes are known: using all chosen episodes, "
            "some of which may have been used for training"
        )
        held_out = ()
    with output.progress(rows, "row") as bar:
        result, samples = evaluate_attention(
            acting, recorded, rows=rows, target=target.value, held_out=held_out, cameras=cameras, on_rows=bar.update
        )
    _write(folder, result, samples)
    of = f"{result.episodes} held-out episodes" if result.held_out else f"{result.episodes} episodes"
    left_out = f"; skipped {result.still} rows in which nothing changes" if result.still else ""
    text = f"{attention_table(result)}\n{result.rows} rows of {of}{left_out}\n{folder}"
    output.result(to_dict(result) | {"folder": str(folder)}, text, format.value)


def _refuse_onnx(policy: Path) -> None:
    from imagewam_cli.errors import UsageError
    from imagewam_cli.workspace import ONNX_MARKER

    if (policy / ONNX_MARKER).exists():
        raise UsageError(
            f"{policy} is an ONNX export, which does not expose attention weights",
            "pass the run that it was exported from",
        )


def _write(folder: Path, result: AttentionResult, samples: Sequence[AttentionSample]) -> None:
    """Write the pictures and numbers. Pages of an earlier run are replaced only after all pictures are drawn."""
    from imagewam_cli.config import dump_json, to_dict
    from imagewam_cli.evaluation.attention.pictures import page, sheet
    from imagewam_cli.evaluation.pictures import spaced, write_picture
    from imagewam_cli.files import write_atomically

    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".attention-", dir=folder) as scratch:
        drawn = Path(scratch)
        for sample in samples:
            name = f"episode-{sample.row.episode:06d}-frame-{sample.row.frame:06d}.png"
            write_picture(drawn / name, page(sample))
        shown = spaced(len(samples), _SHEET_ROWS)
        write_picture(folder / "sheet.png", sheet([samples[i] for i in shown]))
        for path in rows.iterdir():
            if _PAGE.fullmatch(path.name):  # the folder may hold files of the user
                path.unlink()
        for path in drawn.iterdir():
            path.replace(rows / path.name)
    write_atomically(folder / "result.json", dump_json(to_dict(result)).encode())
