"""Plot the size of a row against the attention error."""

from __future__ import annotations

from pathlib import Path

from imagewam_cli.cache_study.fidelity import FidelityResult, SettingErrors
from imagewam_cli.evaluation.plots import POLICY_COLOR, VALIDATION_COLOR, label_axes, new_figure, save_figure


def plot_fidelity(result: FidelityResult, path: Path) -> None:
    """Save a plot of bytes per row against the relative attention error.

    Each setting is a point. A line joins the Pareto front: settings that no smaller setting matches in error.

    Raises:
        ImagewamError: matplotlib is missing.
        UsageError: the suffix of `path` is not one of `SUFFIXES`.
    """
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot(1, 1, 1)
    for pool in sorted({s.pool for s in result.settings}):
        color = POLICY_COLOR if pool == 1 else VALIDATION_COLOR
        points = [s for s in result.settings if s.pool == pool]
        label = "every token" if pool == 1 else f"cells of {pool} x {pool}"
        axes.plot(
            [s.bytes_per_row / 1000 for s in points],
            [100 * s.attention for s in points],
            "o",
            color=color,
            label=label,
        )
        for s in points:
            axes.annotate(
                s.codec,
                (s.bytes_per_row / 1000, 100 * s.attention),
                fontsize=8,
                xytext=(4, 4),
                textcoords="offset points",
            )
    front = [s for s in result.settings if all(t.attention > s.attention for t in result.settings if _smaller(t, s))]
    axes.plot([s.bytes_per_row / 1000 for s in front], [100 * s.attention for s in front], color="grey", zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.01)  # fp32 is exact
    axes.set_ylim(-0.004, 300 * max((s.attention for s in result.settings), default=0.01))
    axes.margins(x=0.12)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    label_axes(axes, "kB per row", "attention error, %")
    save_figure(figure, path)


def _smaller(one: SettingErrors, other: SettingErrors) -> bool:
    return (one.bytes_per_row, one.attention) < (other.bytes_per_row, other.attention)
