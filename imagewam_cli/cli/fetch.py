"""`imagewam fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.options import FormatName, FormatOption, from_home
from imagewam_cli.cli.output import bytes_text, output


def fetch_command(
    editor: Annotated[str, typer.Argument(help="Name of the editor; see `imagewam editors`.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Patterns of files, instead of what the plugin reads.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Patterns of files to leave out.")] = None,
    local_dir: Annotated[
        Path | None, typer.Option("--local-dir", callback=from_home, help="A folder instead of the Hub's cache.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", callback=from_home, help="Another place for the Hub's cache.")
    ] = None,
    token: Annotated[str | None, typer.Option("--token", help="Instead of that of `hf auth login`.")] = None,
    max_workers: Annotated[int, typer.Option("--max-workers", min=1, help="Files at a time.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be downloaded.")] = False,
    format: FormatOption = FormatName.human,
) -> None:
    """Download an editor's weights from the Hugging Face Hub.

    The parts that its plugin reads, as safetensors; complete files are kept. The other commands find the default branch
    in the default cache by themselves; what --revision, --local-dir or --cache-dir fetched is passed as --weights.

    Example: imagewam fetch instruct-pix2pix
    """
    from imagewam_cli.config import to_dict
    from imagewam_cli.editors.loading.hub import FetchOptions, fetch, finds_itself, plan_fetch
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
    plan = plan_fetch(entry, options)
    lines = [f"{'present' if f.present else bytes_text(f.bytes).rjust(9)}  {f.name}" for f in plan.files]
    summary = (
        f"{plan.repo} at {plan.revision[:12]}: {len(plan.files)} files, {bytes_text(plan.total_bytes)}, "
        f"of which {bytes_text(plan.missing_bytes)} to download"
    )
    values = to_dict(plan)
    if dry_run:
        output.result(values, "\n".join([*lines, summary]), format.value)
        return
    output.say(summary)
    folder = fetch(entry, options, plan, bars=not output.quiet)
    if not finds_itself(entry, folder):
        output.say(f"pass it to the other commands as --weights {folder}")
    output.result(values | {"folder": str(folder)}, str(folder), format.value)
