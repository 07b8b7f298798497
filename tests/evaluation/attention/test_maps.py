"""Test attention maps, changed regions and lifts on hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest

from imagewam_cli.errors import CaptureError, RunError
from imagewam_cli.evaluation.attention.maps import (
    changed,
    combined,
    differences,
    lift,
    lifts,
    picture_map,
    resampled,
    shares,
)
from imagewam_cli.prefix.spec import LayerSpec, SegmentSpec

TEXT = SegmentSpec(name="text", tokens=2)
REFERENCE = SegmentSpec(name="reference", tokens=4, grid=(2, 2))
TARGET = SegmentSpec(name="target", tokens=4, grid=(2, 2))
OWN = 3


def layer(*segments: SegmentSpec) -> LayerSpec:
    return LayerSpec(name="a", block="parallel", heads=1, kv_heads=1, head_dim=2, segments=segments)


def test_shares_and_map_of_text_and_one_image() -> None:
    weights = np.array([0.1, 0.1, 0.0, 0.2, 0.0, 0.2, 0.2, 0.1, 0.1])
    both = layer(TEXT, REFERENCE)
    assert shares(weights, both, OWN) == pytest.approx({"text": 0.2, "reference": 0.4, "own": 0.4})
    np.testing.assert_allclose(picture_map(weights, both, OWN), [[0.0, 0.5], [0.0, 0.5]])


@pytest.mark.parametrize("text", [1, 5], ids=["shorter", "longer"])
def test_text_may_be_shorter_or_longer_than_in_the_cache(text: int) -> None:
    weights = np.concatenate([np.full(text, 0.4 / text), [0.3, 0.0, 0.0, 0.1], np.full(OWN, 0.2 / OWN)])
    both = layer(TEXT, REFERENCE)
    assert shares(weights, both, OWN) == pytest.approx({"text": 0.4, "reference": 0.4, "own": 0.2})
    np.testing.assert_allclose(picture_map(weights, both, OWN), [[0.75, 0.0], [0.0, 0.25]])


def test_images_of_one_kind_are_side_by_side_and_kinds_are_added() -> None:
    references = np.array([0.1, 0.0, 0.1, 0.0]), np.array([0.0, 0.2, 0.0, 0.0])
    two = layer(TEXT, REFERENCE, REFERENCE)
    weights = np.concatenate([[0.0, 0.0], *references, [0.6, 0.0, 0.0]])
    np.testing.assert_allclose(picture_map(weights, two, OWN), [[0.25, 0, 0, 0.5], [0.25, 0, 0, 0]])
    kinds = layer(REFERENCE, TARGET)
    weights = np.concatenate([*references, [0.6, 0.0, 0.0]])
    np.testing.assert_allclose(picture_map(weights, kinds, OWN), [[0.25, 0.5], [0.25, 0]])
    assert shares(weights, kinds, OWN) == pytest.approx({"reference": 0.2, "target": 0.2, "own": 0.6})


def test_a_cell_over_the_edge_covers_only_its_part_of_the_image() -> None:
    """Pool 5 columns in cells of 2: the last cell covers a fifth of the width, and its attention counts only there."""
    pooled = SegmentSpec(name="reference", tokens=3, grid=(1, 3), extent=(1.0, 2.5))
    weights = np.array([0.4, 0.4, 0.2, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(picture_map(weights, layer(pooled), OWN), [[1 / 3] * 3], atol=1e-12)
    weights = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(picture_map(weights, layer(pooled), OWN), [[0.0, 0.0, 1.0]], atol=1e-12)
    weights = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # from 2/5 to 4/5; the middle third ends at 2/3
    np.testing.assert_allclose(picture_map(weights, layer(pooled), OWN), [[0.0, 2 / 3, 1 / 3]], atol=1e-12)


def test_the_only_target_of_several_cameras_is_the_first_cameras() -> None:
    apart = layer(TARGET, REFERENCE, REFERENCE)
    target, first, second = [0.2, 0.0, 0.0, 0.2], [0.1, 0.0, 0.1, 0.0], [0.0, 0.2, 0.0, 0.2]
    weights = np.array([*target, *first, *second, 0.0, 0.0, 0.0])
    expected = [[0.3, 0.0, 0.0, 0.2], [0.1, 0.2, 0.0, 0.2]]
    np.testing.assert_allclose(picture_map(weights, apart, OWN, pictures=2), expected)
    alone = np.array([*target, 0.6, 0.0, 0.0])
    expected = [[0.5, 0, 0, 0, 0, 0], [0, 0.5, 0, 0, 0, 0]]
    np.testing.assert_allclose(picture_map(alone, layer(TARGET), OWN, pictures=3), expected)


def test_more_tokens_than_the_segments_have_are_an_error() -> None:
    with pytest.raises(CaptureError, match="layer a has 5 prefix tokens, but its segments have 4"):
        shares(np.full(8, 1 / 8), layer(REFERENCE), OWN)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_zero_or_nan_attention_on_the_images_is_an_error(value: float) -> None:
    with pytest.raises(RunError, match="the attention on the pictures of layer a is"):
        picture_map(np.full(9, value), layer(TEXT, REFERENCE), OWN)


def test_resampling_spreads_a_cells_attention_over_its_area() -> None:
    np.testing.assert_allclose(resampled(np.array([[4.0, 8.0]]), (2, 4)), [[1, 1, 2, 2], [1, 1, 2, 2]])
    np.testing.assert_allclose(resampled(np.array([[1.0, 2.0], [3.0, 4.0]]), (1, 1)), [[10.0]])
    np.testing.assert_allclose(resampled(np.array([[6.0, 3.0, 6.0]]), (1, 2)), [[7.5, 7.5]])
    uneven = np.random.default_rng(0).random((5, 7))
    np.testing.assert_allclose(resampled(uneven, (3, 4)).sum(), uneven.sum())
    np.testing.assert_allclose(resampled(uneven, (5, 7)), uneven)


def test_maps_of_several_resolutions_are_added_on_the_finest_grid() -> None:
    whole = combined([np.array([[1.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])])
    np.testing.assert_allclose(whole, [[0.25, 1.25], [0.25, 0.25]])


def picture(*values: int) -> np.ndarray:
    """Return an image of 4 x 4 pixels, four for each of the 2 x 2 tokens, each token of one grey value."""
    grey = np.array(values, dtype=np.uint8).reshape(2, 2).repeat(2, axis=0).repeat(2, axis=1)
    return grey[:, :, None].repeat(3, axis=2)


def test_differences_are_means_over_a_tokens_pixels_and_channels() -> None:
    now, later = picture(10, 10, 200, 0), picture(30, 10, 100, 0)
    later[2, 2] = (60, 0, 0)  # the last token: one of its four pixels, one of three channels
    np.testing.assert_allclose(differences(now, later, (2, 2)), [[20, 0], [100, 5]])
    np.testing.assert_allclose(differences(now, later, (1, 1)), [[125 / 4]])


def test_tokens_above_a_quarter_of_the_greatest_difference_have_changed() -> None:
    now = picture(0, 0, 0, 0)
    region = changed(now, picture(100, 25, 26, 0), (2, 2))
    assert region.tolist() == [[True, False], [True, False]]
    fainter = changed(now, picture(20, 5, 6, 0), (2, 2))
    assert fainter.tolist() == region.tolist()  # the region does not depend on the contrast
    assert not changed(now, now, (2, 2)).any()


def test_lift_is_mass_over_area() -> None:
    attention = np.array([[0.5, 0.25], [0.25, 0.0]])
    assert lift(attention, np.array([[True, False], [False, False]])) == pytest.approx(2.0)
    assert lift(attention, np.array([[True, True], [False, False]])) == pytest.approx(1.5)
    assert lift(attention, np.array([[False, False], [False, True]])) == 0.0
    assert lift(np.full((2, 2), 0.25), np.array([[True, True], [True, False]])) == pytest.approx(1.0)


def test_lifts_of_every_map_on_every_region() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((3, 2, 4))
    maps /= maps.sum(axis=(1, 2), keepdims=True)
    regions = rng.random((3, 2, 4)) > 0.5
    expected = [[lift(m, region) for region in regions] for m in maps]
    np.testing.assert_allclose(lifts(maps, regions), expected)
