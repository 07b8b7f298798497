"""`imagewam cache --plan`: bytes, time, and whether storing pays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from imagewam_cli.cli.output import bytes_text, seconds_text

if TYPE_CHECKING:
    from imagewam_cli.data.types import Dataset, Row
    from imagewam_cli.kvcache.economy import Economy
    from imagewam_cli.kvcache.plan import BuildPlan

RECOMMENDED = "pca1"
"""The codec that is planned beside the one that was asked for: a sixteenth of bf16, with the error of int4
(docs/cache.md)."""


def first_rows(dataset: Dataset, batch: int) -> list[Row]:
    """A batch to measure with."""
    return list(islice(dataset.rows(episodes=[dataset.episodes()[0].index]), batch))


def plan_result(plans: Sequence[BuildPlan], economies: Sequence[Economy], *, layers: str) -> tuple[dict[str, Any], str]:
    """Values and text. plans: of the codec that was asked for, and of the recommended one where that is another;
    economies: theirs, or none where there are no weights to measure with."""
    values, lines = _one(plans[0], economies[0] if economies else None)
    values["layers"] = layers
    if len(plans) > 1 and plans[1].bytes_per_row < plans[0].bytes_per_row:
        smaller, advice = _one(plans[1], economies[1] if economies else None)
        values["recommended"] = {"codec": RECOMMENDED, **smaller}
        lines += [f"recommended: --codec {RECOMMENDED}: {advice[1]}", *advice[-1:][: len(economies)]]
    return values, "\n".join(lines)


def _one(plan: BuildPlan, economy: Economy | None) -> tuple[dict[str, Any], list[str]]:
    from imagewam_cli.config import to_dict
    from imagewam_cli.kvcache.economy import verdict

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
        f"{bytes_text(plan.bytes_per_row)} per row, {bytes_text(plan.total_bytes)} in all",
    ]
    if economy is not None:
        seconds = (economy.forward + economy.write) * plan.rows
        values |= {"seconds_per_row": economy.forward, "seconds": seconds}
        values["economy"] = to_dict(economy) | {"pays": economy.pays, "passes": economy.passes}
        lines += [
            f"{1000 * economy.forward:.1f} ms per row on this machine, about {seconds_text(seconds)}",
            f"reading and computing a row take equally long at {bytes_text(economy.break_even_bytes)}",
            verdict(economy),
        ]
    return values, lines
