"""`imagewam cache plan`: size, time, and whether a cache pays off."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from imagewam_cli.cli.help import KEEP
from imagewam_cli.cli.options import FormatName, FormatOption, WeightsOption
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import bytes_text, output, seconds_text

if TYPE_CHECKING:
    from imagewam_cli.cache_study.budget import Choice
    from imagewam_cli.cache_study.row_cost import RowCost
    from imagewam_cli.cli.editor_options import EditorSetup
    from imagewam_cli.data.types import Dataset, Row
    from imagewam_cli.editors.contract import Editor
    from imagewam_cli.kvcache.building.shard_plan import BuildPlan, BuildSettings
    from imagewam_cli.kvcache.codecs.contract import Codec
    from imagewam_cli.prefix.spec import KVSpec

RECOMMENDED = "pca1"
"""Codec that a plan also shows: a sixteenth of the size of bf16, with the error of int4
(docs/guide/caches.md)."""


@takes_editor_options()
def plan_command(
    *,
    options: EditorOptions,
    out: CacheOutOption = None,
    codec: CodecOption = "bf16",
    batch: BatchOption = 16,
    shard_mb: ShardMbOption = 256.0,
    variants: VariantsOption = 1,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="Also list the settings that fit this size, such as 50GB, and mark the best.",
            rich_help_panel=KEEP,
        ),
    ] = None,
    weights: WeightsOption = None,
    format: FormatOption = FormatName.human,
) -> None:
    """Measure the size, the time and the break-even of a cache.

    Encodes a few rows, writes them to the disk of --out, reads them back and deletes them.

    Examples:
        imagewam cache plan --dataset datasets/tabletop
        imagewam cache plan --dataset datasets/tabletop --budget 50GB
    """
    build = build_settings(stride=options.stride, batch=batch, shard_mb=shard_mb, variants=variants, part=None)
    print_plan(options, weights, out=out, codec=codec, build=build, budget=budget, format=format, named="cache plan")


def print_plan(
    options: EditorOptions,
    weights: Path | None,
    *,
    out: str | None,
    codec: str,
    build: BuildSettings,
    budget: str | None,
    format: FormatName,
    named: str,
) -> None:
    """Measure and print the plan of a build. named: the command or option that the user typed, for errors.

    Raises:
        UsageError: --dataset is missing, or no setting fits the budget.
        EditorError: the layout is unknown without the weights.
    """
    from imagewam_cli.config import size_in_bytes
    from imagewam_cli.kvcache.storage.manifests import storage_at
    from imagewam_cli.registry import Registry

    within = None if budget is None else size_in_bytes(budget, "--budget")
    stored = Registry.installed().codecs.load(codec)
    chosen = editor_setup(options, weights, trial=named)
    disk = storage_at(cache_location(out, chosen)).disk
    require_writable(disk)
    output.result(*_plan_of(chosen, stored, build, disk, within), format.value)


def _plan_of(
    chosen: EditorSetup, codec: Codec, build: BuildSettings, disk: Path, budget: float | None
) -> tuple[dict[str, Any], str]:
    """Return the plan as JSON values and as text.

    Args:
        disk: Folder on the disk of the cache; it need not exist.
        budget: Bytes that the cache may take.

    Raises:
        EditorError: the layout is unknown without the weights.
        UsageError: no setting fits the budget.
    """
    from imagewam_cli.cache_study.row_cost import measure
    from imagewam_cli.cli.tables import budget_table
    from imagewam_cli.config import to_dict
    from imagewam_cli.kvcache.building.shard_plan import plan_build

    rows, codecs = chosen.dataset, _with_recommended(codec)
    spec = _spec_without_weights(chosen)
    if spec is not None:
        plans = [plan_build(rows, spec, each, build) for each in codecs]
        return _plan_result(plans, [], layers=chosen.settings.layers)
    editor, sample = chosen.load(), _first_rows(rows, build.batch)
    plans = [plan_build(rows, editor.spec, each, build) for each in codecs]
    measured = measure(editor, codecs, sample, _existing_parent(disk))
    values, text = _plan_result(plans, measured, layers=editor.settings.layers)
    if budget is not None:
        found = choices_within(editor, rows, build.stride, sample, plans[0].rows, budget)
        values |= {"choice": to_dict(found[0]), "choices": [to_dict(choice) for choice in found]}
        text += f"\n{budget_table(found, budget)}"
    return values, text


def choices_within(
    editor: Editor, dataset: Dataset, stride: int, sample: Sequence[Row], rows: int, budget: float
) -> tuple[Choice, ...]:
    """Return the settings that fit a budget of bytes, the recommended one first; errors are measured on the sample.

    Raises:
        UsageError: no setting fits; the message names the smallest.
    """
    import torch

    from imagewam_cli.cache_study.budget import choices, fitting
    from imagewam_cli.errors import UsageError
    from imagewam_cli.kvcache.building.encoding import instructions_of
    from imagewam_cli.kvcache.codecs.fitting import sample_prefixes
    from imagewam_cli.registry import Registry

    entries = Registry.installed().codecs
    codecs = {entry.name: entries.load(entry.name) for entry in entries}
    exact = editor.encode([r.images for r in sample], [r.instruction for r in sample]).to("cpu", torch.float32)
    settings = editor.settings
    tried = choices(
        editor.spec,
        exact,
        codecs,
        rows=rows,
        instructions=len(instructions_of(dataset)),
        samples=sample_prefixes(editor, dataset, stride),
        layers=settings.layers,
        pool=settings.pool,
    )
    found = fitting(tried, budget)
    if not found:
        smallest = min(tried, key=lambda choice: choice.total_bytes)
        raise UsageError(
            f"nothing fits {bytes_text(budget)}: {smallest.options} still needs {bytes_text(smallest.total_bytes)}",
            "raise --budget, or use fewer rows with --stride",
        )
    return found


def _spec_without_weights(chosen: EditorSetup) -> KVSpec | None:
    """Return the layout that the editor describes if its weights are missing here; None if they are present.

    Raises:
        EditorError: the weights are missing and the layout depends on them.
    """
    from imagewam_cli.cli.auto_layers import auto_count
    from imagewam_cli.editors.contract import TYPICAL_TEXT
    from imagewam_cli.errors import EditorError

    try:
        chosen.kind.require_weights(chosen.weights)
    except EditorError as error:
        auto = auto_count(chosen.settings.layers) is not None
        described = None if auto else chosen.kind.describe(chosen.settings)
        if described is None:
            raise
        output.say(f"{error.message}: the plan assumes {TYPICAL_TEXT} tokens of trimmed text and gives no time")
        return described
    return None


def _with_recommended(codec: Codec) -> list[Codec]:
    """Return the codec of the build, followed by the recommended codec if they differ."""
    from imagewam_cli.registry import Registry

    recommended: Codec = Registry.installed().codecs.load(RECOMMENDED)
    return [codec] if codec.name == RECOMMENDED else [codec, recommended]


def _first_rows(dataset: Dataset, batch: int) -> list[Row]:
    """Return a batch of the first episode to measure with."""
    return list(islice(dataset.rows(episodes=[dataset.episodes()[0].index]), batch))


def _existing_parent(folder: Path) -> Path:
    """Return the folder or its nearest parent that exists, to write a sample to the same disk."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _plan_result(plans: Sequence[BuildPlan], measured: Sequence[RowCost], *, layers: str) -> tuple[dict[str, Any], str]:
    """Return JSON values and text.

    Args:
        plans: Plan of the build, followed by the plan with the recommended codec.
        measured: Measurements for each plan; empty without weights.
    """
    values, lines = _one(plans[0], measured[0] if measured else None)
    values["layers"] = layers
    if len(plans) > 1 and plans[1].bytes_per_row < plans[0].bytes_per_row:
        smaller, advice = _one(plans[1], measured[1] if measured else None)
        values["recommended"] = {"codec": RECOMMENDED, **smaller}
        lines += [f"recommended: --codec {RECOMMENDED}: {advice[1]}", *advice[-1:][: len(measured)]]
    return values, "\n".join(lines)


def _one(plan: BuildPlan, cost: RowCost | None) -> tuple[dict[str, Any], list[str]]:
    from imagewam_cli.cli.tables import storing_advice
    from imagewam_cli.config import to_dict

    values: dict[str, Any] = {
        "rows": plan.rows,
        "shards": len(plan.shards),
        "bytes_per_row": plan.bytes_per_row,
        "total_bytes": plan.total_bytes,
        "seconds_per_row": None,
        "seconds": None,
    }
    lines = [
        f"{plan.rows} rows in {len(plan.shards)} shards",
        f"{bytes_text(plan.bytes_per_row)} per row, {bytes_text(plan.total_bytes)} in total",
    ]
    if cost is not None:
        seconds = (cost.forward + cost.write) * plan.rows
        values |= {"seconds_per_row": cost.forward, "seconds": seconds}
        values["economy"] = to_dict(cost) | {
            "pays": cost.worth_storing,
            "passes": cost.break_even_epochs,
        }
        lines += [
            f"{1000 * cost.forward:.1f} ms per row on this machine, about {seconds_text(seconds)}",
            f"reading is faster than recomputing for rows smaller than {bytes_text(cost.break_even_bytes)}",
            storing_advice(cost),
        ]
    return values, lines
