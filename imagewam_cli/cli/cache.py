"""`imagewam cache`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from imagewam_cli.cli.auto_layers import auto_count, recorded_layers
from imagewam_cli.cli.build_options import (
    BatchOption,
    CacheOutOption,
    CodecOption,
    ShardMbOption,
    VariantsOption,
    build_settings,
    cache_location,
)
from imagewam_cli.cli.editor_options import EditorOptions, editor_setup, takes_editor_options
from imagewam_cli.cli.help import ADVANCED
from imagewam_cli.cli.options import FormatName, FormatOption, WeightsOption
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import bytes_text, output
from imagewam_cli.cli.plan import print_plan
from imagewam_cli.cli.workers import (
    EngineName,
    EngineOption,
    ThreadsOption,
    WorkerOptions,
    WorkersOption,
    open_producer,
)

if TYPE_CHECKING:
    from imagewam_cli.kvcache.building.shard_plan import BuildPlan
    from imagewam_cli.kvcache.format.manifest import BuildPart
    from imagewam_cli.kvcache.storage.location import Location


@takes_editor_options()
def cache_command(
    *,
    context: typer.Context,
    options: EditorOptions,
    out: CacheOutOption = None,
    codec: CodecOption = "bf16",
    batch: BatchOption = 16,
    shard_mb: ShardMbOption = 256.0,
    variants: VariantsOption = 1,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Build one of N parts, such as 0/3; by default the part that SLURM or torchrun assigns.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    workers: WorkersOption = None,
    engine: EngineOption = EngineName.processes,
    threads: ThreadsOption = None,
    plan: Annotated[bool, typer.Option("--plan", hidden=True, help="Alias of `cache plan`.")] = False,
    budget: Annotated[str | None, typer.Option("--budget", hidden=True, help="Option of `cache plan`.")] = None,
    weights: WeightsOption = None,
    format: FormatOption = FormatName.human,
) -> None:
    """Precompute an editor's prefix keys and values over a dataset.

    Run the same command again to resume an interrupted build. `imagewam cache COMMAND --help` shows the options of a
    command that works on a cache.

    Examples:
        imagewam cache --editor tiny --dataset datasets/tabletop
        imagewam cache --dataset datasets/tabletop --out s3://bucket/caches/mine
        imagewam cache --dataset datasets/tabletop --device cuda --workers 4
    """
    if context.invoked_subcommand is not None:
        _require_no_options(context, context.invoked_subcommand)
        return
    from imagewam_cli.errors import UsageError
    from imagewam_cli.kvcache.building.build import build_with, require_resumable
    from imagewam_cli.kvcache.building.shard_plan import plan_build
    from imagewam_cli.kvcache.storage.manifests import storage_at
    from imagewam_cli.registry import Registry

    build = build_settings(stride=options.stride, batch=batch, shard_mb=shard_mb, variants=variants, part=part)
    worker_options = WorkerOptions(workers=workers, engine=engine, threads=threads)
    worker_options.require_valid(plan=plan)
    if plan:
        print_plan(options, weights, out=out, codec=codec, build=build, budget=budget, format=format, named="--plan")
        return
    if budget is not None:
        raise UsageError("--budget is an option of `imagewam cache plan`", "imagewam cache plan --budget 50GB")
    stored = Registry.installed().codecs.load(codec)
    chosen = editor_setup(options, weights)
    rows, folder = chosen.dataset, cache_location(out, chosen)
    require_writable(storage_at(folder).disk)
    there = require_resumable(rows, chosen.kind.entry.name, folder, stored, build)
    count = auto_count(options.prefix.layers)
    if there is not None and count is not None:
        chosen = chosen.with_layers(recorded_layers(folder, there, count))
    chosen.kind.require_weights(weights)
    with open_producer(worker_options, chosen, folder, codec, build) as producer:
        planned = plan_build(rows, producer.spec, stored, build)
        with output.progress(planned.rows, "row") as bar:
            bar.set_postfix_str(f"{bytes_text(planned.bytes_per_row)}/row", refresh=False)
            manifest = build_with(
                producer,
                rows,
                folder,
                stored,
                build,
                on_start=partial(_say_start, folder, build.part),
                on_rows=bar.update,
                on_damage=_say_damage,
                on_checksums=_say_checksums,
            )
    values = {
        "cache": str(folder),
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes": sum(entry.bytes for entry in manifest.entries),
        "fingerprint": manifest.digest,
    }
    output.result(values, f"{folder}: {manifest.rows} rows in {len(manifest.shards)} shards", format.value)


def _require_no_options(context: typer.Context, command: str) -> None:
    """Check that no build option precedes the name of a sub-command, which would ignore it.

    Raises:
        UsageError: a build option precedes the name.
    """
    from imagewam_cli.errors import UsageError

    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} has no effect before `{command}`", f"imagewam cache {command} {option} ...")


def _say_start(address: Location, part: BuildPart | None, plan: BuildPlan) -> None:
    if part is not None:
        output.say(f"building part {part.index} of {part.count}; join the parts with `imagewam cache merge {address}`")
    output.say(
        f"{address}: {plan.rows} rows, {bytes_text(plan.bytes_per_row)} each, {bytes_text(plan.total_bytes)} in total"
    )


def _say_damage(file: str) -> None:
    output.say(f"{file} is missing or damaged: recomputing it")


def _say_checksums(files: int) -> None:
    output.say(f"recording the checksums of {files} files of the dataset")
