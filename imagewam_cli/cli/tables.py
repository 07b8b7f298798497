"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagewam_cli.cli.output import bytes_text

if TYPE_CHECKING:
    from imagewam_cli.cache_study.budget import Choice
    from imagewam_cli.cache_study.fidelity import FidelityResult
    from imagewam_cli.cache_study.row_cost import RowCost
    from imagewam_cli.evaluation.attention.measurement import AttentionResult
    from imagewam_cli.evaluation.closed_loop import ClosedLoopResult, Outcome
    from imagewam_cli.evaluation.open_loop import OpenLoopResult
    from imagewam_cli.evaluation.statistics import Mean


def table(lines: Sequence[Sequence[str]], *, left: int | None = None) -> str:
    """Format lines of cells as columns, two spaces apart.

    left: number of leading columns to align left, the rest right; None: align all left.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = len(widths) if left is None else left

    def text(line: Sequence[str]) -> str:
        cells = enumerate(zip(line, widths, strict=True))
        return "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in cells).rstrip()

    return "\n".join(text(line) for line in lines)


def closed_loop_table(result: ClosedLoopResult) -> str:
    """Format the success rates: one line per split, followed by one per kind of scene if the split has several."""
    lines: list[tuple[str, ...]] = [("split", "kind", "success", "rate", "95 % interval", "steps")]
    for name, split in result.splits.items():
        lines.append(_line(name, "all", split.total))
        if len(split.kinds) > 1:
            lines.extend(_line("", kind, outcome) for kind, outcome in split.kinds.items())
    return table(lines, left=2)


def open_loop_table(result: OpenLoopResult) -> str:
    """Format the mean absolute errors, and the ratio of the squared ones, per action dimension and over all of them."""
    lines = [("action", "policy error", "constant error", "MSE ratio")]
    lines += [(e.name, f"{e.policy:.4g}", f"{e.constant:.4g}", f"{e.ratio:.3f}") for e in result.per_action]
    whole = (result.policy.mean_absolute, result.constant.mean_absolute)
    lines.append(("all", f"{whole[0]:.4g}", f"{whole[1]:.4g}", f"{result.ratio_to_constant:.3f}"))
    return table(lines, left=1)


def open_loop_summary(result: OpenLoopResult, total: int) -> str:
    """Say in one line how many episodes were scored, and how many of them the policy was trained on.

    total: number of episodes that could have been scored.
    """
    counts = {use: result.count(use) for use in ("trained on", "held out", "unknown")}
    words = {
        "trained on": "{} that the policy was trained on",
        "held out": "{} held out from training",
        "unknown": "{} of which it is unknown whether the policy was trained on them",
    }
    found = [words[use].format(count) for use, count in counts.items() if count]
    of = f" of {total}" if total != result.episodes else ""
    return f"scored {result.episodes}{of} episodes: {', '.join(found)}"


def attention_table(result: AttentionResult) -> str:
    """Format the attention shares and lifts of each layer."""
    kinds = list(result.average.shares)
    lifts = ["lift (95 %)", "lift, other episodes", "untrained lift", "untrained, other episodes"]
    lines = [["layer", *kinds, "on changes", "area", *lifts]]
    for layer in (*result.layers, result.average):
        numbers = [f"{100 * layer.shares.get(kind, 0.0):.0f} %" for kind in kinds]
        numbers += [f"{100 * layer.mass:.1f} %", f"{100 * layer.area:.1f} %", _interval(layer.trained.own)]
        numbers += [f"{m.mean:.2f}" for m in (layer.trained.others, layer.untrained.own, layer.untrained.others)]
        lines.append([layer.layer, *numbers])
    return table(lines, left=1)


def _interval(mean: Mean) -> str:
    return f"{mean.mean:.2f} ({mean.low:.2f} to {mean.high:.2f})"


def fidelity_table(result: FidelityResult) -> str:
    """Format the errors of each layer, of other codecs and pools, and of the policy if one was measured."""
    layers = [("layer", "K", "V", "attention")] + [
        (e.layer, _percent(e.k), _percent(e.v), _percent(e.attention)) for e in result.layers
    ]
    settings = [("codec", "pool", "kB per row", "attention")] + [
        (s.codec, str(s.pool), f"{s.bytes_per_row / 1000:.1f}", _percent(s.attention)) for s in result.settings
    ]
    parts = [f"{result.codec}, {result.rows} rows, {result.bytes_per_row / 1000:.1f} kB each\n{table(layers, left=1)}"]
    parts += [f"other settings for the same rows\n{table(settings, left=1)}"] if result.settings else []
    if result.policy is not None:
        change = result.policy
        parts.append(
            f"policy: actions change by {change.action:.4f}, loss {change.exact_loss:.4f} -> {change.stored_loss:.4f}"
        )
    return "\n\n".join(parts)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def budget_table(found: Sequence[Choice], budget: float) -> str:
    """Format the best codec for each pooling and choice of layers that fits a budget in bytes, and mark the first."""
    from imagewam_cli.cache_study.budget import best_codecs

    lines = [["codec", "pool", "layers", "per row", "total", "attention error", ""]]
    for choice in best_codecs(found):
        sizes = [bytes_text(choice.bytes_per_row), bytes_text(choice.total_bytes)]
        mark = "<- recommended" if choice is found[0] else ""
        lines.append([choice.codec, str(choice.pool), choice.layers, *sizes, f"{100 * choice.attention:.2f} %", mark])
    return (
        f"settings within {bytes_text(budget)}, ranked: reduce precision first, then tokens, then layers "
        f"(errors are comparable only between settings with the same layers)\n{table(lines)}\n{found[0].options}"
    )


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


def storing_advice(cost: RowCost) -> str:
    """Return one line that says whether a cache pays off, and why."""
    row, load, forward = cost.row_bytes / 1e6, 1000 * cost.load, 1000 * cost.forward
    sizes = f"{row:.2f} MB/row reads in {load:.1f} ms, recomputing costs {forward:.1f} ms"
    if cost.break_even_epochs is None:
        return (
            f"a cache does not pay off: {sizes}; train with --online, or store fewer bytes (--codec, --pool, --layers)"
        )
    return f"a cache pays off: {sizes}; breaks even after {cost.break_even_epochs:.1f} epochs"
