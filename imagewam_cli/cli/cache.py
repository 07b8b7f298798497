"""`imagewam cache`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from imagewam_cli.cli.editor_options import EditorOptions, choose_editor, takes_editor_options
from imagewam_cli.cli.options import FormatName, FormatOption, WeightsOption, require_at_least_one, require_positive
from imagewam_cli.cli.output import bytes_text, output, seconds_text


@takes_editor_options
def cache_command(
    *,
    context: typer.Context,
    options: EditorOptions,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the cache; by default caches/EDITOR-DATASET.")
    ] = None,
    codec: Annotated[
        str, typer.Option("--codec", "--dtype", help="How numbers are stored: fp32, bf16, fp16, fp8, int8, int4.")
    ] = "bf16",
    batch: Annotated[int, typer.Option("--batch", help="Rows per forward pass.")] = 16,
    shard_mb: Annotated[float, typer.Option("--shard-mb", help="About how large a shard becomes.")] = 256.0,
    plan: Annotated[bool, typer.Option("--plan", help="Print bytes and time, write nothing.")] = False,
    weights: WeightsOption = None,
    format: FormatOption = FormatName.human,
) -> None:
    """Precompute an editor's prefix keys and values over a dataset.

    The same command continues an interrupted build.

    Example: imagewam cache --editor tiny --dataset datasets/tabletop --out caches/tiny-tabletop
    """
    if context.invoked_subcommand is not None:
        return
    from imagewam_cli.editor import TYPICAL_TEXT
    from imagewam_cli.errors import EditorError
    from imagewam_cli.kvcache.build import BuildSettings, build_cache, plan_build
    from imagewam_cli.registry import Registry
    from imagewam_cli.workspace import CACHES

    require_at_least_one(stride=options.stride, batch=batch)
    require_positive(shard_mb=shard_mb)
    stored = Registry.installed().codecs.load(codec)
    build = BuildSettings(stride=options.stride, batch=batch, shard_mb=shard_mb)
    chosen = choose_editor(options, weights, trial="--plan" if plan else None)
    rows = chosen.dataset
    try:
        chosen.kind.require_weights(chosen.entry, weights)
    except EditorError as error:
        described = chosen.kind.describe(chosen.entry, chosen.settings) if plan else None
        if described is None:
            raise
        output.say(
            f"{error.message}: without them the time is not known, and trimmed text counts as {TYPICAL_TEXT} tokens"
        )
        _print_plan(plan_build(rows, described, stored, build), None, format)
        return
    loaded = chosen.load()
    planned = plan_build(rows, loaded.spec, stored, build)
    if plan:
        _print_plan(planned, _seconds_per_row(loaded, rows, batch), format)
        return
    folder = out if out is not None else CACHES / chosen.name
    output.say(
        f"{folder}: {planned.rows} rows, {bytes_text(planned.bytes_per_row)} each, "
        f"{bytes_text(planned.total_bytes)} in all"
    )
    with output.progress(planned.rows, "row") as bar:
        bar.set_postfix_str(f"{bytes_text(planned.bytes_per_row)}/row", refresh=False)
        manifest = build_cache(rows, loaded, folder, stored, build, on_rows=bar.update, on_damage=_say_damage)
    values = {
        "cache": str(folder),
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes": sum(s.bytes for s in manifest.shards),
        "fingerprint": manifest.digest,
    }
    output.result(values, f"{folder}: {manifest.rows} rows in {len(manifest.shards)} shards", format.value)


def _say_damage(file: str) -> None:
    output.say(f"{file} was missing or damaged and is computed again")


def _seconds_per_row(editor: Any, dataset: Any, batch: int) -> float:
    """Measured on a few batches of the first episode, until they are in main memory, as a build needs them: a device
    that computes on its own has then finished."""
    from itertools import islice

    rows = list(islice(dataset.rows(episodes=[dataset.episodes()[0].index]), batch))
    images, instructions = [r.images for r in rows], [r.instruction for r in rows]
    editor.encode(images, instructions).to("cpu")
    started = time.monotonic()
    for _ in range(2):
        editor.encode(images, instructions).to("cpu")
    return (time.monotonic() - started) / (2 * len(rows))


def _print_plan(plan: Any, per_row: float | None, format: FormatName) -> None:
    values = {
        "rows": plan.rows,
        "shards": len(plan.shards),
        "bytes_per_row": plan.bytes_per_row,
        "total_bytes": plan.total_bytes,
        "seconds_per_row": per_row,
        "seconds": None if per_row is None else per_row * plan.rows,
    }
    text = (
        f"{plan.rows} rows in {len(plan.shards)} shards\n"
        f"{bytes_text(plan.bytes_per_row)} per row, {bytes_text(plan.total_bytes)} in all"
    )
    if per_row is not None:
        text += f"\n{1000 * per_row:.1f} ms per row on this machine, about {seconds_text(per_row * plan.rows)}"
    output.result(values, text, format.value)
