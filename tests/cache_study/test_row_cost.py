"""Test `cache_study.row_cost`: the break-even arithmetic, and a real measurement that leaves no files."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from imagewam_cli.cache_study import row_cost as row_cost_module
from imagewam_cli.cache_study.row_cost import RowCost, measure
from imagewam_cli.cli.tables import storing_advice
from imagewam_cli.kvcache.building.shard_plan import bytes_per_row
from imagewam_cli.kvcache.codecs.integer import INT4
from imagewam_cli.kvcache.codecs.pca import PCA1
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset


def row_cost(**changed: float) -> RowCost:
    values = {"row_bytes": 5_000_000, "forward": 0.060, "write": 0.010, "read": 0.015, "decode": 0.005} | changed
    return RowCost(**values)  # type: ignore[arg-type]


def test_break_even_is_when_building_and_reading_cost_less_than_computing() -> None:
    """70 ms to build a row, 40 ms saved in each pass: 1.75 passes."""
    paying = row_cost()
    assert paying.break_even_epochs == pytest.approx(1.75)
    for passes, better in ((1, False), (2, True)):
        stored = paying.forward + paying.write + passes * paying.load
        assert (stored < passes * paying.forward) == better
    assert storing_advice(paying) == (
        "a cache pays off: 5.00 MB/row reads in 20.0 ms, recomputing costs 60.0 ms; breaks even after 1.8 epochs"
    )


@pytest.mark.parametrize("forward", [0.020, 0.001])
def test_a_cache_never_pays_off_if_computing_is_as_fast_as_reading(forward: float) -> None:
    losing = row_cost(forward=forward)
    assert losing.break_even_epochs is None
    assert storing_advice(losing).startswith("a cache does not pay off: 5.00 MB/row reads in 20.0 ms")
    assert "--online" in storing_advice(losing)


def test_a_row_of_break_even_size_is_read_as_fast_as_it_is_computed() -> None:
    found = row_cost()
    assert found.read * found.break_even_bytes / found.row_bytes == pytest.approx(found.forward)


def test_a_real_shard_is_measured_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake clock advances one second per call, so each stage costs one second divided by its rows.

    The editor and the codec process 9 rows. The shard holds them 28 times, because 256 rows are the limit.
    """
    monkeypatch.setattr(row_cost_module, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    rows = list(MemoryDataset((5, 4)).rows())
    editor, stored = ArithmeticEditor(), 28 * 9
    for found, codec in zip(measure(editor, [INT4, PCA1], rows, tmp_path), (INT4, PCA1), strict=True):
        assert found.row_bytes == bytes_per_row(editor.spec, codec)
        assert found.forward == pytest.approx(1 / 9)
        assert found.write == pytest.approx(1 / 9 + 1 / stored)
        assert (found.read, found.decode) == (pytest.approx(1 / stored), pytest.approx(1 / stored))
    assert not list(tmp_path.iterdir())
