"""Results as aligned text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagewam_cli.cache_study.fidelity import FidelityResult
    from imagewam_cli.evaluation.attention.measurement import AttentionResult
    from imagewam_cli.evaluation.closed_loop import ClosedLoopResult, Outcome
    from imagewam_cli.evaluation.open_loop import OpenLoopResult
    from imagewam_cli.evaluation.statistics import Mean


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, two spaces apart: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def closed_loop_table(result: ClosedLoopResult) -> str:
    """The result as aligned text for a terminal: a line per split, below it one per kind where it has several."""
    lines: list[tuple[str, ...]] = [("split", "kind", "success", "rate", "95 % interval", "steps")]
    for name, split in result.splits.items():
        lines.append(_line(name, "all", split.total))
        if len(split.kinds) > 1:
            lines.extend(_line("", kind, outcome) for kind, outcome in split.kinds.items())
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_aligned(line, widths) for line in lines)


def open_loop_table(result: OpenLoopResult) -> str:
    """Mean absolute error and ratio per action dimension, and over all, as aligned text for a terminal."""
    lines = [("action", "policy", "constant", "ratio of squares")]
    lines += [(e.name, f"{e.policy:.4g}", f"{e.constant:.4g}", f"{e.ratio:.3f}") for e in result.per_action]
    whole = (result.policy.mean_absolute, result.constant.mean_absolute)
    lines.append(("all", f"{whole[0]:.4g}", f"{whole[1]:.4g}", f"{result.ratio_to_constant:.3f}"))
    return aligned(lines)


def attention_table(result: AttentionResult) -> str:
    """The numbers per layer as aligned text for a terminal."""
    kinds = list(result.average.shares)
    lines = [["layer", *kinds, "on change", "area", "lift (95 %)", "others' change", "untrained", "others' change"]]
    for layer in (*result.layers, result.average):
        numbers = [f"{100 * layer.shares.get(kind, 0.0):.0f} %" for kind in kinds]
        numbers += [f"{100 * layer.mass:.1f} %", f"{100 * layer.area:.1f} %", _interval(layer.trained.own)]
        numbers += [f"{m.mean:.2f}" for m in (layer.trained.others, layer.untrained.own, layer.untrained.others)]
        lines.append([layer.layer, *numbers])
    return aligned(lines)


def _interval(mean: Mean) -> str:
    return f"{mean.mean:.2f} ({mean.low:.2f} to {mean.high:.2f})"


def fidelity_table(result: FidelityResult) -> str:
    """For a terminal."""
    layers = [("layer", "K", "V", "attention")] + [
        (e.layer, _percent(e.k), _percent(e.v), _percent(e.attention)) for e in result.layers
    ]
    settings = [("codec", "pool", "kB a row", "attention")] + [
        (s.codec, str(s.pool), f"{s.bytes_per_row / 1000:.1f}", _percent(s.attention)) for s in result.settings
    ]
    parts = [f"{result.codec}, {result.rows} rows, {result.bytes_per_row / 1000:.1f} kB each\n{aligned(layers)}"]
    parts += [f"other ways to store these\n{aligned(settings)}"] if result.settings else []
    if result.policy is not None:
        change = result.policy
        parts.append(
            f"policy: actions change by {change.action:.4f}, loss {change.exact_loss:.4f} -> {change.stored_loss:.4f}"
        )
    return "\n\n".join(parts)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _line(split: str, kind: str, outcome: Outcome) -> tuple[str, ...]:
    rate = outcome.success
    return (
        split,
        kind,
        f"{rate.successes}/{rate.trials}",
        f"{100 * rate.rate:.1f} %",
        f"{100 * rate.low:.1f} - {100 * rate.high:.1f} %",
        "-" if outcome.mean_steps is None else f"{outcome.mean_steps:.1f}",
    )


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
    return "  ".join(cells).rstrip()
