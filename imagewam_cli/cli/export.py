"""`imagewam export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.help import INPUT, OUTPUT
from imagewam_cli.cli.options import FormatName, WeightsOption, existing_policy, from_home, newest_with_notice
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import bytes_text, output


def export_command(
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="FOLDER",
            callback=from_home,
            help="A run; by default the newest one in runs/.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Format to write: onnx, bundle or a plugin's format.",
            rich_help_panel=OUTPUT,
        ),
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            callback=from_home,
            help="Folder to write; by default exports/RUN-FORMAT.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    weights: WeightsOption = None,
    report: Annotated[
        FormatName,
        typer.Option("--report", help="Print the result as text or as JSON.", rich_help_panel=OUTPUT),
    ] = FormatName.human,
) -> None:
    """Export a policy for deployment, to ONNX or to a bundle.

    Compares the export with torch on real rows and fails if the actions differ.

    Examples:
        imagewam export --run runs/first --out exports/first-onnx
        imagewam export --run runs/first --format bundle
    """
    from imagewam_cli.api import export_policy
    from imagewam_cli.workspace import EXPORTS

    if run is None:
        run = newest_with_notice("--run", "run")
    folder = out if out is not None else EXPORTS / f"{run.resolve().name}-{to}"
    require_writable(folder.parent)
    written = export_policy(existing_policy("--run", run), folder, format=to, weights=weights)
    lines = [f"{folder}:"]
    lines += [f"  {name}  {bytes_text(size)}" for name, size in written.files.items()]
    lines += [f"  {check}: largest difference from torch {error:.1e}" for check, error in written.errors.items()]
    lines += [f"  note: {note}" for note in written.notes]
    values = {
        "folder": str(folder),
        "files": dict(written.files),
        "errors": dict(written.errors),
        "notes": list(written.notes),
    }
    output.result(values, "\n".join(lines), report.value)
