"""`imagewam export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.options import FormatName, WeightsOption, existing_policy, from_home, newest_instead_of
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import bytes_text, output


def export_command(
    run: Annotated[
        Path | None, typer.Option("--run", callback=from_home, help="The run; by default the newest in runs/.")
    ] = None,
    to: Annotated[str, typer.Option("--format", help="What to write: onnx, bundle, or a plugin's format.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option("--out", callback=from_home, help="Folder to write; by default exports/RUN-FORMAT.")
    ] = None,
    weights: WeightsOption = None,
    report: Annotated[FormatName, typer.Option("--report", help="How to print the result.")] = FormatName.human,
) -> None:
    """Export a policy. Every export is compared with torch on real rows and fails where it differs.

    Example: imagewam export --run runs/first --format onnx --out exports/first-onnx
    """
    from imagewam_cli.policy.bundle import find_bundle
    from imagewam_cli.registry import Registry
    from imagewam_cli.workspace import EXPORTS

    if run is None:
        run = newest_instead_of("--run", "run")
    exporter = Registry.installed().exporters.load(to)()
    folder = out if out is not None else EXPORTS / f"{run.resolve().name}-{to}"
    require_writable(folder.parent)
    written = exporter.export(find_bundle(existing_policy("--run", run)), folder, weights=weights)
    lines = [f"{folder}:"]
    lines += [f"  {name}  {bytes_text(size)}" for name, size in written.files.items()]
    lines += [f"  {check}: greatest difference from torch {error:.1e}" for check, error in written.errors.items()]
    lines += [f"  note: {note}" for note in written.notes]
    values = {
        "folder": str(folder),
        "files": dict(written.files),
        "errors": dict(written.errors),
        "notes": list(written.notes),
    }
    output.result(values, "\n".join(lines), report.value)
