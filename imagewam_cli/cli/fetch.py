"""`imagewam fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.help import ADVANCED, INPUT, OUTPUT
from imagewam_cli.cli.options import FormatName, FormatOption, from_home
from imagewam_cli.cli.output import bytes_text, output


def fetch_command(
    editor: Annotated[str, typer.Argument(metavar="EDITOR", help="Name of the editor; `imagewam editors` lists them.")],
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="REV", help="Branch, tag or commit.", rich_help_panel=INPUT),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="GLOB",
            help="Download files that match this pattern instead of those that the editor needs; may be repeated.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="GLOB",
            help="Skip files that match this pattern; may be repeated.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    local_dir: Annotated[
        Path | None,
        typer.Option(
            "--local-dir",
            metavar="FOLDER",
            callback=from_home,
            help="Download into this folder instead of the Hub's cache.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="FOLDER",
            callback=from_home,
            help="Use this folder as the Hub's cache.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            metavar="TOKEN",
            help="Hub access token; by default that of `hf auth login`.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    max_workers: Annotated[
        int,
        typer.Option(
            "--max-workers", min=1, metavar="N", help="Number of parallel downloads.", rich_help_panel=ADVANCED
        ),
    ] = 8,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the files and their sizes; download nothing.", rich_help_panel=OUTPUT),
    ] = False,
    format: FormatOption = FormatName.human,
) -> None:
    """Download an editor's weights from the Hugging Face Hub.

    Downloads only the safetensors files that the editor needs, and skips those that are complete. The other commands
    automatically find the default branch in the Hub's cache. If you fetch with --revision, --local-dir or --cache-dir,
    pass the printed folder to them as --weights.

    Examples:
        imagewam fetch instruct-pix2pix
        imagewam fetch flux2-klein-4b --dry-run
    """
    from imagewam_cli.config import to_dict
    from imagewam_cli.editors.loading.hub import fetch, plan_fetch
    from imagewam_cli.editors.loading.hub_cache import is_default_snapshot
    from imagewam_cli.editors.loading.hub_options import FetchOptions
    from imagewam_cli.registry import Registry

    entry = Registry.installed().editors.get(editor)
    options = FetchOptions(
        revision=revision,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        local_dir=local_dir,
        cache_dir=cache_dir,
        token=token,
        max_workers=max_workers,
    )
    plan = plan_fetch(entry, options, say=output.say)
    lines = [f"{'present' if f.present else bytes_text(f.bytes).rjust(9)}  {f.name}" for f in plan.files]
    summary = (
        f"{plan.repo} at {plan.revision[:12]}: {len(plan.files)} files, {bytes_text(plan.total_bytes)}, "
        f"{bytes_text(plan.missing_bytes)} to download"
    )
    values = to_dict(plan)
    if dry_run:
        output.result(values, "\n".join([*lines, summary]), format.value)
        return
    output.say(summary)
    with output.progress(plan.missing_bytes, "B") as bar:
        folder = fetch(entry, options, plan, on_bytes=bar.update, say=output.say)
    if not is_default_snapshot(entry, folder):
        output.say(f"pass it to the other commands as --weights {folder}")
    output.result(values | {"folder": str(folder)}, str(folder), format.value)
