"""Test `kvcache.format.row_layout`: offsets of a row's tensors, against torch views of the same memory."""

from __future__ import annotations

import torch

from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.kvcache.format.row_layout import RowLayout

ROWS = 3
TENSORS = {
    "mask": torch.arange(ROWS * 5).reshape(ROWS, 5) % 2 == 0,
    "codes": torch.arange(ROWS * 7, dtype=torch.uint8).reshape(ROWS, 7),
    "k": torch.arange(ROWS * 6).reshape(ROWS, 2, 3).to(torch.bfloat16),
    "scale": torch.arange(ROWS, dtype=torch.float32).reshape(ROWS, 1),
}
PARTS = {name: Part(tuple(t.shape[1:]), t.dtype) for name, t in TENSORS.items()}


def test_tensors_are_views_of_the_rows() -> None:
    layout = RowLayout.from_parts(PARTS)
    rows = torch.from_numpy(layout.blank(ROWS))
    for name, view in layout.tensors(rows).items():
        assert view.shape == TENSORS[name].shape
        assert view.dtype == TENSORS[name].dtype
        view.copy_(TENSORS[name])
    for i, row in enumerate(rows):
        expected = [TENSORS[name][i : i + 1].flatten().view(torch.uint8).tolist() for name in layout.parts]
        assert row.tolist() == [byte for part in expected for byte in part] + [0] * (len(row) - layout.bytes)


def test_wide_numbers_come_first_and_rows_start_at_cache_lines() -> None:
    layout = RowLayout.from_parts(PARTS)
    assert list(layout.parts) == ["scale", "k", "mask", "codes"]
    rows = torch.from_numpy(layout.blank(ROWS))
    assert [row.data_ptr() % 64 for row in rows] == [0] * ROWS
    assert layout.bytes == 4 + 2 * 6 + 5 + 7


def test_narrow_numbers_before_wide_ones_are_refused() -> None:
    assert RowLayout.from_parts(PARTS).aligned
    assert not RowLayout({name: PARTS[name] for name in ("mask", "scale")}).aligned


def test_rows_can_use_given_memory() -> None:
    given = RowLayout.from_parts(PARTS).blank(ROWS)
    given[:] = 7
    blank = RowLayout.from_parts(PARTS).blank(ROWS, lambda size: given.reshape(-1)[:size])
    assert blank.base is given.base
    assert blank[:, RowLayout.from_parts(PARTS).bytes :].max() == 0
