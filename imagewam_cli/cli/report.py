"""`imagewam cache report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from imagewam_cli.cli.origin import cache_origin
from imagewam_cli.cli.os_errors import require_writable
from imagewam_cli.cli.output import output


def report_command(
    cache: CacheOption = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", callback=from_home, help="Also how much this policy's actions and loss change."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="Rows to look at, spread over the cache.")] = 32,
    plot: Annotated[
        Path | None, typer.Option("--plot", callback=from_home, help="Picture of bytes against error, PNG, SVG or PDF.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", callback=from_home, help="Where the dataset has moved.")
    ] = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
    offload: OffloadOption = "none",
    format: FormatOption = FormatName.human,
) -> None:
    """What a cache's compact numbers cost: errors of K, V and attention against the editor itself.

    Also of other ways to store the same rows: every codec, with and without pooled picture tokens.

    Example: imagewam cache report --cache caches/tiny-tabletop --run runs/first --plot report.png
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
    recorded, editor = cache_origin(reader.manifest, dataset, weights, hardware)
    with output.progress(rows, "row") as bar:
        result = evaluate_fidelity(reader, recorded, editor, rows=rows, policy=policy, on_rows=bar.update)
    if plot is not None:
        plot_fidelity(result, plot)
    output.result(to_dict(result), fidelity_table(result), format.value)
