"""Test that plots are written without opening a window, and that errors name what is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewam_cli.errors import ImagewamError, UsageError
from imagewam_cli.evaluation.open_loop import ActionError, ChunkErrors, EpisodeError, OpenLoopResult
from imagewam_cli.evaluation.plots import plot_losses, plot_open_loop, plot_success
from imagewam_cli.evaluation.statistics import Rate

RATES = {"expert": Rate.of(50, 50), "policy, unseen scenes": Rate.of(43, 50), "random": Rate.of(0, 50)}
VALIDATION = {"validation_loss": 0.4, "validation_action_error": 0.2, "validation_constant_error": 0.9}
METRICS = [{"step": 10 * i, "loss": 1.0 / i} | (VALIDATION if i % 3 == 0 else {}) for i in range(1, 10)]


def open_loop_result(joints: int) -> OpenLoopResult:
    def errors(scale: float) -> ChunkErrors:
        values = tuple(tuple(scale * (step + joint) for joint in range(joints)) for step in range(1, 7))
        return ChunkErrors(absolute=values, squared=values, mean_absolute=scale, mean_squared=scale)

    names = tuple(f"joint {i}" for i in range(joints))
    return OpenLoopResult(
        action_names=names,
        horizon=6,
        stride=8,
        episodes=2,
        rows=9,
        policy=errors(0.1),
        constant=errors(0.3),
        ratio_to_constant=0.33,
        per_action=tuple(ActionError(name=n, policy=0.1, constant=0.3, ratio=0.33) for n in names),
        per_episode=(EpisodeError(episode=0, rows=9, mean_absolute=0.1, mean_squared=0.1),),
    )


PLOTS: dict[str, Callable[[Path], None]] = {
    "success": lambda path: plot_success(RATES, path),
    "losses": lambda path: plot_losses(METRICS, path),
    "open loop": lambda path: plot_open_loop(open_loop_result(3), path),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_drawn_without_pyplot(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    path = tmp_path / "plots" / "plot.png"
    PLOTS[name](path)
    with Image.open(path) as image:
        assert image.width > 400
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels.max(-1).astype(int) - pixels.min(-1) > 60).sum() > 100, "no coloured line or bar"
    assert [p.name for p in path.parent.iterdir()] == ["plot.png"]


def test_many_joints_fill_several_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = []
    for joints in (4, 9):
        plot_open_loop(open_loop_result(joints), tmp_path / "p.png")
        with Image.open(tmp_path / "p.png") as image:
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 2 * sizes[0][1]


def test_without_validation_only_the_training_loss_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    widths = []
    for metrics in (METRICS, [{"step": m["step"], "loss": m["loss"]} for m in METRICS]):
        plot_losses(metrics, tmp_path / "p.png")
        with Image.open(tmp_path / "p.png") as image:
            widths.append(image.width)
    assert widths[1] == pytest.approx(widths[0] / 2, abs=2)


def test_vector_formats_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_success(RATES, tmp_path / "p.svg")
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize("name", PLOTS)
def test_without_matplotlib_the_error_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImagewamError, match="matplotlib") as caught:
        PLOTS[name](tmp_path / "p.png")
    assert caught.value.hint == "pip install 'imagewam[plots]'"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=r"cannot plot to p\.docx"):
        plot_success(RATES, tmp_path / "p.docx")


def test_an_empty_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no success rates"):
        plot_success({}, tmp_path / "p.png")
    with pytest.raises(UsageError, match="no loss"):
        plot_losses([{"step": 3, "learning_rate": 0.1}], tmp_path / "p.png")
