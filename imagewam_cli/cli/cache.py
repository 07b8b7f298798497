"""`imagewam cache`."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from imagewam_cli.cli.auto_layers import auto_count, recorded_layers
from imagewam_cli.cli.editor_options import EditorOptions, choose_editor, takes_editor_options
from imagewam_cli.cli.options import (
    FormatName,
    FormatOption,
    WeightsOption,
    require_at_least_one,
    require_positive,
)
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import bytes_text, output
from imagewam_cli.cli.plan import plan_of
from imagewam_cli.cli.share import share_of
from imagewam_cli.cli.workers import EngineName, EngineOption, Hiring, ThreadsOption, WorkersOption, opened_maker

if TYPE_CHECKING:
    from imagewam_cli.kvcache.building.shard_plan import BuildPlan
    from imagewam_cli.kvcache.format.manifest import Share
    from imagewam_cli.kvcache.storage.location import Location


@takes_editor_options()
def cache_command(
    *,
    context: typer.Context,
    options: EditorOptions,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Folder or URL (s3://...) of the cache; by default caches/EDITOR-DATASET."),
    ] = None,
    codec: Annotated[
        str,
        typer.Option(
            "--codec",
            "--dtype",
            help="Number format: fp32, bf16, fp16, fp8, int8, int4, pca2, pca1, pca0.5 (docs/guide/caches.md).",
        ),
    ] = "bf16",
    batch: Annotated[int, typer.Option("--batch", help="Rows per forward pass.")] = 16,
    shard_mb: Annotated[float, typer.Option("--shard-mb", help="About how large a shard becomes.")] = 256.0,
    variants: Annotated[
        int, typer.Option("--variants", help="Views of each row: as recorded, and augmented ones.")
    ] = 1,
    plan: Annotated[
        bool, typer.Option("--plan", help="Measure this machine, print bytes, time and whether it pays; keep nothing.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option("--part", help="Build part i of N, as 0/3; SLURM arrays and torchrun give it by themselves."),
    ] = None,
    workers: WorkersOption = None,
    engine: EngineOption = EngineName.processes,
    threads: ThreadsOption = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="With --plan: settings within so many bytes, as 50GB.")
    ] = None,
    weights: WeightsOption = None,
    format: FormatOption = FormatName.human,
) -> None:
    """Precompute an editor's prefix keys and values over a dataset.

    The same command continues an interrupted build.

    Example: imagewam cache --editor tiny --dataset datasets/tabletop --out caches/tiny-tabletop

    Example: imagewam cache --editor tiny --dataset datasets/tabletop --out s3://bucket/caches/tiny-tabletop

    On four GPUs: imagewam cache --editor tiny --dataset datasets/tabletop --workers 4 --device cuda
    """
    if context.invoked_subcommand is not None:
        return
    from imagewam_cli.config import size_in_bytes
    from imagewam_cli.data.augmentation import Augmentation
    from imagewam_cli.errors import UsageError
    from imagewam_cli.kvcache.building.build import build_with, require_continuable
    from imagewam_cli.kvcache.building.shard_plan import BuildSettings, plan_build
    from imagewam_cli.kvcache.storage.location import location
    from imagewam_cli.kvcache.storage.manifests import storage_at
    from imagewam_cli.registry import Registry
    from imagewam_cli.workspace import CACHES

    require_at_least_one(stride=options.stride, batch=batch, variants=variants)
    require_positive(shard_mb=shard_mb)
    hiring = Hiring(workers=workers, engine=engine, threads=threads)
    hiring.require_sound(plan=plan)
    if budget is not None and not plan:
        raise UsageError("--budget is for --plan", "add --plan")
    within = None if budget is None else size_in_bytes(budget, "--budget")
    stored = Registry.installed().codecs.load(codec)
    share = share_of(part, os.environ)
    build = BuildSettings(
        stride=options.stride,
        augmentation=Augmentation(variants=variants),
        batch=batch,
        shard_mb=shard_mb,
        share=share,
    )
    chosen = choose_editor(options, weights, trial="--plan" if plan else None)
    rows, folder = chosen.dataset, location(out) if out is not None else CACHES / chosen.name
    require_writable(storage_at(folder).disk)
    if plan:
        output.result(*plan_of(chosen, stored, build, storage_at(folder).disk, within), format.value)
        return
    there = require_continuable(rows, chosen.kind.entry.name, folder, stored, build)
    count = auto_count(options.layers)
    if there is not None and count is not None:
        chosen = chosen.with_layers(recorded_layers(folder, there, count))
    chosen.kind.require_weights(weights)
    with opened_maker(hiring, chosen, folder, codec, build) as maker:
        planned = plan_build(rows, maker.spec, stored, build)
        with output.progress(planned.rows, "row") as bar:
            bar.set_postfix_str(f"{bytes_text(planned.bytes_per_row)}/row", refresh=False)
            manifest = build_with(
                maker,
                rows,
                folder,
                stored,
                build,
                on_start=partial(_say_start, folder, share),
                on_rows=bar.update,
                on_damage=_say_damage,
            )
    values = {
        "cache": str(folder),
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes": sum(entry.bytes for entry in manifest.entries),
        "fingerprint": manifest.digest,
    }
    output.result(values, f"{folder}: {manifest.rows} rows in {len(manifest.shards)} shards", format.value)


def _say_start(place: Location, share: Share | None, plan: BuildPlan) -> None:
    if share is not None:
        output.say(f"part {share.index} of {share.count}; `imagewam cache merge {place}` unites them")
    output.say(
        f"{place}: {plan.rows} rows, {bytes_text(plan.bytes_per_row)} each, {bytes_text(plan.total_bytes)} in all"
    )


def _say_damage(file: str) -> None:
    output.say(f"{file} was missing or damaged and is computed again")
