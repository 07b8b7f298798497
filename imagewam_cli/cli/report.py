"""`imagewam cache report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagewam_cli.cli.cache_source import needs_every_episode, open_cache_source
from imagewam_cli.cli.help import INPUT, OUTPUT
from imagewam_cli.cli.options import (
    CacheOption,
    DeviceOption,
    FormatName,
    FormatOption,
    OffloadOption,
    WeightsOption,
    chosen_cache,
    chosen_hardware,
    existing_policy,
    from_home,
    require_at_least_one,
)
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import output


def report_command(
    cache: CacheOption = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="FOLDER",
            callback=from_home,
            help="Also measure how much the actions and the loss of this policy change.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option("--rows", metavar="N", help="Number of rows, spread over the cache.", rich_help_panel=INPUT),
    ] = 32,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            callback=from_home,
            help="Plot bytes against error into this PNG, SVG or PDF.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            metavar="FOLDER",
            callback=from_home,
            help="The dataset, if it was moved since the cache was built.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "none",
    format: FormatOption = FormatName.human,
) -> None:
    """Measure the error of a cache's codec.

    Compares K, V and attention with the editor itself, and does the same for every other codec, with and without pooled
    picture tokens.

    Examples:
        imagewam cache report --cache caches/tiny-tabletop --plot report.png
        imagewam cache report --cache caches/tiny-tabletop --run runs/first
    """
    from imagewam_cli.cache_study.fidelity import evaluate_fidelity
    from imagewam_cli.cache_study.plot import plot_fidelity
    from imagewam_cli.cli.tables import fidelity_table
    from imagewam_cli.config import to_dict
    from imagewam_cli.evaluation.plots import require_suffix
    from imagewam_cli.kvcache.reading.reader import CacheReader
    from imagewam_cli.policy.policy import Policy

    require_at_least_one(rows=rows)
    if plot is not None:
        require_suffix(plot)
        require_writable(plot.parent)
    reader = CacheReader(chosen_cache(cache))
    hardware = chosen_hardware(device, offload, False)
    policy = None if run is None else Policy.load(existing_policy("--run", run), hardware=hardware, weights=weights)
    with needs_every_episode():
        recorded, editor = open_cache_source(reader.storage, reader.manifest, dataset, weights, hardware)
    with needs_every_episode(), output.progress(rows, "row") as bar:
        result = evaluate_fidelity(reader, recorded, editor, rows=rows, policy=policy, on_rows=bar.update)
    if plot is not None:
        plot_fidelity(result, plot)
    output.result(to_dict(result), fidelity_table(result), format.value)
