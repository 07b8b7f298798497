"""Compare pooled picture tokens with means over cells computed in numpy, with loops and complex rotations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from imagewam_cli.editors.installed import load_editor
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import UsageError
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.pooling import cell_means, pooled, pooled_layer, pooled_segment
from imagewam_cli.prefix.positions import layer_ids, unrotate
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec, SegmentSpec, TokenPositions

ROPE = RopeSpec(axes=(4, 4), theta=100.0, action_axis=1, action_ids=(0, 0))
POSITIONS = TokenPositions(origin=(10.0, -2.0), moves=((0,), (1,)))
GRIDS = [((4, 6), 2), ((5, 7), 2), ((5, 7), 3), ((2, 3), 4)]


def picture(grid: tuple[int, int], positions: TokenPositions | None = POSITIONS) -> SegmentSpec:
    return SegmentSpec(name="reference", tokens=grid[0] * grid[1], grid=grid, positions=positions)


def means(values: np.ndarray, grid: tuple[int, int], size: int) -> np.ndarray:
    """Average each cell: (tokens, ...) -> (cells, ...)."""
    square = values.reshape(*grid, *values.shape[1:])
    return np.stack(
        [
            square[row : row + size, column : column + size].mean((0, 1))
            for row in range(0, grid[0], size)
            for column in range(0, grid[1], size)
        ]
    )


def rotated(k: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rotate keys (tokens, heads, 8) by ids (tokens, 2) with `ROPE`."""
    frequencies = np.array([1.0, 0.1])
    angles = (ids[:, :, None] * frequencies).reshape(len(ids), 1, 4)
    pairs = (k[..., ::2] + 1j * k[..., 1::2]) * np.exp(1j * angles)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(k.shape)


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_pooled_values_are_means_of_cells(grid: tuple[int, int], size: int) -> None:
    v = torch.randn(2, grid[0] * grid[1], 3, 8)
    kv = pooled(LayerKV(v, v), picture(grid), size, None)
    for row in range(2):
        expected = means(v[row].numpy(), grid, size)
        np.testing.assert_allclose(kv.v[row].numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(
            kv.k[row].numpy(), expected, atol=1e-6
        )  # without a rope, keys are pooled like values


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_keys_are_averaged_unrotated_then_rotated_to_the_cell_centre(grid: tuple[int, int], size: int) -> None:
    plain = np.random.default_rng(0).normal(size=(grid[0] * grid[1], 2, 8))
    ids = np.array([(10 + row, -2 + column) for row in range(grid[0]) for column in range(grid[1])])
    k = torch.from_numpy(rotated(plain, ids)).float()[None]
    found = pooled(LayerKV(k, k), picture(grid), size, ROPE).k[0].numpy()
    middle = (size - 1) / 2
    centres = np.array(
        [
            (10 + row + middle, -2 + column + middle)
            for row in range(0, grid[0], size)
            for column in range(0, grid[1], size)
        ]
    )
    np.testing.assert_allclose(found, rotated(means(plain, grid, size), centres), atol=1e-5)
    position_ids = pooled_segment(picture(grid), size).position_ids
    assert position_ids is not None
    np.testing.assert_allclose(position_ids, centres)


def test_pooling_keeps_a_constant_picture() -> None:
    constant = torch.full((1, 35, 2, 8), 0.3)
    assert torch.allclose(cell_means(constant, (5, 7), 3), torch.full((1, 6, 2, 8), 0.3), atol=1e-7)


def test_pooling_a_segment_by_2_twice_equals_pooling_by_4() -> None:
    once, twice = pooled_segment(picture((8, 8)), 4), pooled_segment(pooled_segment(picture((8, 8)), 2), 2)
    assert once == twice
    assert (once.grid, once.extent, once.tokens) == ((2, 2), None, 4)
    assert pooled_segment(picture((5, 8)), 2).extent == (2.5, 4.0)


def test_text_is_not_pooled_and_pool_1_changes_nothing() -> None:
    text = SegmentSpec(name="text", tokens=4, positions=TokenPositions(origin=(0.0, 0.0), moves=((1,),)))
    kv = LayerKV(torch.randn(1, 4, 1, 8), torch.randn(1, 4, 1, 8))
    assert pooled(kv, text, 2, ROPE) is kv
    assert pooled_segment(text, 2) is text
    assert pooled(kv, picture((2, 2)), 1, ROPE) is kv


def test_rotated_keys_without_positions_cannot_be_pooled() -> None:
    layer = LayerSpec(
        name="a", block="parallel", heads=1, kv_heads=1, head_dim=8, segments=(picture((2, 2), positions=None),)
    )
    with pytest.raises(UsageError, match="reference tokens cannot be pooled: their keys are rotated") as caught:
        pooled_layer(layer, 2, ROPE)
    assert "--pool" in (caught.value.hint or "")
    assert pooled_layer(layer, 1, ROPE) == layer
    assert pooled_layer(layer, 2, None).tokens == 1


@pytest.mark.parametrize("pool", [0, -2])
def test_a_pool_below_1_is_refused(pool: int) -> None:
    with pytest.raises(UsageError, match="pool must be at least 1"):
        PrefixOptions(pool=pool)


def tiny(**settings: Any) -> Any:
    chosen = PrefixOptions(cameras=("top",), image_size=(64, 80), **settings)
    return load_editor("tiny", chosen, instructions=["go left", "go"])


def test_an_editor_with_pool_2_gives_the_means_of_its_unpooled_tokens() -> None:
    """The grid has 4 x 5 tokens, so the last cells hold two. Text, validity and padding do not change."""
    rows = [{"top": x} for x in np.random.default_rng(0).integers(0, 256, (2, 64, 80, 3), dtype=np.uint8)]
    whole, fewer = tiny(), tiny(pool=2)
    before, after = (editor.encode(rows, ["go left", "go"]) for editor in (whole, fewer))
    assert whole.fingerprint() != fewer.fingerprint()
    text = whole.spec.layers[0].segments[0].tokens
    assert torch.equal(after.valid[:, :text], before.valid[:, :text])
    assert after.valid[:, text:].all()
    assert not after.valid.all()
    for spec, pooled_spec, a, b in zip(whole.spec.layers, fewer.spec.layers, before.layers, after.layers, strict=True):
        assert b.k.shape[1] == text + 6 == pooled_spec.tokens
        assert torch.equal(b.k[:, :text], a.k[:, :text])
        assert torch.equal(b.v[:, :text], a.v[:, :text])
        plain, mean = (
            unrotate(kv.k, layer_ids(layer), whole.spec.rope)[:, text:].numpy()
            for kv, layer in ((a, spec), (b, pooled_spec))
        )
        for row in range(2):
            np.testing.assert_allclose(mean[row], means(plain[row], (4, 5), 2), atol=1e-5)
            np.testing.assert_allclose(b.v[row, text:], means(a.v[row, text:].numpy(), (4, 5), 2), atol=1e-5)


def test_pool_1_keeps_the_recorded_bits() -> None:
    editor, row = tiny(pool=1), [{"top": np.zeros((64, 80, 3), np.uint8)}]
    recorded: dict[str, LayerKV] = {}
    keep = editor.keep_segments

    def look(layers: Any, valid: Any) -> Any:
        recorded.update(layers)
        return keep(layers, valid)

    editor.keep_segments = look
    prefix = editor.encode(row, ["go left"])
    for name, kv in zip(editor.layer_names, prefix.layers, strict=True):
        assert torch.equal(kv.k, recorded[name].k)
        assert torch.equal(kv.v, recorded[name].v)
