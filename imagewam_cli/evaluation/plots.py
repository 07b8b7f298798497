"""Plot results as curves and bars. matplotlib (the extra `plots`) is imported only when a plot is drawn.

Figures use matplotlib's object interface on the Agg canvas, which needs neither a window nor global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagewam_cli.errors import ImagewamError, UsageError, install_hint
from imagewam_cli.evaluation.open_loop import OpenLoopResult
from imagewam_cli.evaluation.statistics import Rate
from imagewam_cli.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

POLICY_COLOR = "#1f5fd0"
REFERENCE_COLOR = "#8a8d96"
VALIDATION_COLOR = "#d2691e"
_MAX_COLUMNS = 4
_DOTS_PER_INCH = 144


def plot_open_loop(result: OpenLoopResult, path: Path) -> None:
    """Plot the mean absolute errors of policy and constant chunk over the steps, one panel per action dimension.

    Raises:
        ImagewamError: matplotlib is missing.
        UsageError: the suffix of `path` is not one of `SUFFIXES`.
    """
    names = result.action_names
    columns = min(_MAX_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(3.2 * columns + 0.6, 2.4 * rows + 0.8)
    steps = range(1, result.horizon + 1)
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        constant, policy = ([step[i] for step in errors.absolute] for errors in (result.constant, result.policy))
        axes.plot(steps, constant, color=REFERENCE_COLOR, linestyle="--", label="constant chunk")
        axes.plot(steps, policy, color=POLICY_COLOR, label="policy")
        axes.set_title(name, fontsize=10)
        axes.set_ylim(bottom=0)
        label_axes(axes, "step", "mean absolute error" if i % columns == 0 else "")
    figure.axes[0].legend(frameon=False, fontsize=8)
    title = f"{result.rows} frames of {result.episodes} episodes, MSE ratio to constant {result.ratio_to_constant:.3f}"
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def plot_losses(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot training and validation curves of a run's metrics.

    Args:
        metrics: records with "step" and any of "loss", "validation_loss" (left), "validation_action_error" and
            "validation_constant_error" (right panel, omitted if no record has them), as in a run's `metrics.jsonl`.

    Raises:
        ImagewamError: matplotlib is missing.
        UsageError: no record has a loss, or the suffix of `path` is not one of `SUFFIXES`.
    """
    losses = [
        ("loss", "training", POLICY_COLOR, "-"),
        ("validation_loss", "held-out episodes", VALIDATION_COLOR, "-"),
    ]
    errors = [
        ("validation_constant_error", "constant chunk", REFERENCE_COLOR, "--"),
        ("validation_action_error", "policy", POLICY_COLOR, "-"),
    ]
    panels = [("flow loss", losses), ("squared error of the chunk, held-out episodes", errors)]
    drawn = [(title, lines) for title, lines in panels if any(_series(metrics, key)[0] for key, *_ in lines)]
    if not drawn:
        raise UsageError("the metrics contain no loss", "plot a run after its first logged step")
    figure = new_figure(5.0 * len(drawn), 3.4)
    for position, (title, lines) in enumerate(drawn, start=1):
        axes = figure.add_subplot(1, len(drawn), position)
        for key, label, color, style in lines:
            steps, values = _series(metrics, key)
            if steps:
                marker = "." if len(steps) < 20 else None
                axes.plot(steps, values, color=color, linestyle=style, marker=marker, linewidth=1.4, label=label)
        if lines is losses and all(v > 0 for key, *_ in lines for v in _series(metrics, key)[1]):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        label_axes(axes, "step", "")
    save_figure(figure, path)


def plot_success(named: Mapping[str, Rate], path: Path) -> None:
    """Plot success rates as horizontal bars with 95 % intervals and counts.

    Raises:
        ImagewamError: matplotlib is missing.
        UsageError: `named` is empty, or the suffix of `path` is not one of `SUFFIXES`.
    """
    if not named:
        raise UsageError("no success rates to plot", "evaluate a policy first")
    figure = new_figure(6.4, 0.9 + 0.45 * len(named))
    axes = figure.add_subplot(1, 1, 1)
    for position, rate in enumerate(named.values()):
        share = 100 * rate.rate
        below, above = max(0.0, share - 100 * rate.low), max(0.0, 100 * rate.high - share)
        axes.barh(position, share, height=0.6, color=POLICY_COLOR, alpha=0.85)
        axes.errorbar(share, position, xerr=[[below], [above]], color="black", capsize=3, linewidth=1.2)
        axes.text(100 * rate.high + 2, position, f"{rate.successes}/{rate.trials}", va="center", fontsize=9)
    axes.set_yticks(range(len(named)), list(named))
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 20))
    label_axes(axes, "success, %", "")
    axes.grid(visible=False, axis="y")
    save_figure(figure, path)


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the records that have `key`."""
    points = [(int(m["step"]), float(m[key])) for m in metrics if m.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of the given size in inches.

    Raises:
        ImagewamError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImagewamError("plots need matplotlib, which is not installed", install_hint("plots")) from None
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Label the axes, draw a faint grid and remove the box."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def require_suffix(path: Path) -> None:
    """Check that plots can be written to `path`.

    Raises:
        UsageError: the suffix of `path` is not one of `SUFFIXES`.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"cannot plot to {path.name}", "end the name in one of " + ", ".join(SUFFIXES))


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure atomically, in the format of the suffix.

    Raises:
        UsageError: the suffix of `path` is not one of `SUFFIXES`.
    """
    require_suffix(path)
    with atomic_file(path) as temporary:
        figure.savefig(temporary)
