"""Progress without a terminal: whole lines, now and then."""

from __future__ import annotations

import contextlib
import sys

import pytest

from imagewam_cli import progress as module
from imagewam_cli.progress import ProgressLines, is_terminal, progress, write_line


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module.time, "monotonic", made)
    return made


def test_a_line_is_printed_every_30_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLines(400, "row") as bar:
        for _ in range(40):
            clock.now += 3
            bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "100 of 400 rows, 3.33 row/s, 1 min 30 s left",
        "200 of 400 rows, 3.33 row/s, 1 min 0 s left",
        "300 of 400 rows, 3.33 row/s, 30 s left",
        "400 of 400 rows, 3.33 row/s, 2 min 0 s in total",
        "400 of 400 rows, 3.33 row/s, 2 min 0 s in total",
    ]


def test_slow_units_bytes_and_values_are_written_out(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLines(9, "episode", initial=5) as bar:
        clock.now = 60
        bar.set_postfix({"loss": "0.5"}, refresh=False)
        bar.update()
        bar.n = 9
    with ProgressLines(4_000_000, "B") as bar:
        bar.set_postfix_str("2 files", refresh=False)
        clock.now += 40
        bar.update(1_000_000)
    out = capsys.readouterr().err.splitlines()
    assert out[0] == "6 of 9 episodes, 60 s/episode, 3 min 0 s left, loss 0.5"
    assert out[2] == "1.0 MB of 4.0 MB, 25.0 kB/s, 2 min 0 s left, 2 files"


def test_short_work_and_failed_work_end_without_a_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLines(9, "row") as bar:
        bar.update(9)
    bar = ProgressLines(9, "row")
    with contextlib.suppress(ValueError), bar:
        clock.now += 5
        bar.update(1)
        raise ValueError
    with ProgressLines(9, "row"):
        clock.now += 5
    assert capsys.readouterr().err == ""


def test_a_dumb_terminal_gets_lines_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal()
    assert isinstance(progress(3, "row"), ProgressLines)
    assert not isinstance(progress(3, "row", shown=False), ProgressLines)
    write_line("one line")
    assert capsys.readouterr().err == "one line\n"
