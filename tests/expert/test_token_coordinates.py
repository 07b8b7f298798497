"""Test that token coordinates are correct and are added to values only."""

import math

import pytest
import torch

from imagewam_cli.errors import ConfigError
from imagewam_cli.expert.model import ActionExpert, ExpertConfig
from imagewam_cli.expert.token_coordinates import (
    COORDINATE_FEATURES,
    TokenCoordinates,
    coordinate_features,
    picture_features,
)
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.pooling import cell_means, pooled_segment
from imagewam_cli.prefix.spec import LayerSpec, SegmentSpec

TEXT, PICTURE = SegmentSpec(name="text", tokens=3), SegmentSpec(name="reference", tokens=8, grid=(2, 4))


def layer(*segments: SegmentSpec) -> LayerSpec:
    return LayerSpec(name="a", block="parallel", heads=2, kv_heads=1, head_dim=4, segments=segments)


LAYER = layer(TEXT, PICTURE)


def test_coordinates_are_the_centres_of_the_tokens() -> None:
    features = coordinate_features((2, 4))
    assert features.shape == (8, COORDINATE_FEATURES)
    second_row_last_column = features[7]
    assert second_row_last_column[:2].tolist() == [0.5, 0.75]
    angles = [math.pi * 2**k * c for k in range(3) for c in (0.5, 0.75)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert second_row_last_column[2:].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_token_at_the_edge_covers_only_its_part_of_the_image() -> None:
    """Pool 5 columns in cells of 2: the last cell is the fifth column, from 3/5 to 1."""
    features = coordinate_features((1, 3), (1.0, 2.5))
    assert features[:, 0].tolist() == [0.0] * 3
    assert features[:, 1].tolist() == pytest.approx([-0.6, 0.2, 0.8], abs=1e-6)


def test_coordinates_of_pooled_tokens_are_the_means_of_their_tokens_coordinates() -> None:
    for grid, size in (((4, 6), 2), ((5, 7), 3), ((3, 4), 5)):
        picture = SegmentSpec(name="reference", tokens=grid[0] * grid[1], grid=grid)
        cells = pooled_segment(picture, size)
        places = coordinate_features(grid)[None, :, None, :2]
        assert torch.allclose(picture_features([cells])[:, :2], cell_means(places, grid, size)[0, :, 0], atol=1e-6)


def test_only_values_of_image_tokens_change() -> None:
    kv = LayerKV(torch.randn(2, 11, 1, 4), torch.randn(2, 11, 1, 4))
    places = TokenCoordinates((LAYER,))
    (placed,) = places((kv,))
    added = (placed.v - kv.v).detach()
    assert torch.equal(placed.k, kv.k)
    assert added[:, :3].abs().max() == 0
    assert torch.allclose(added[0, 3:, 0], coordinate_features((2, 4)) @ places.maps["0"].linear.weight.T, atol=1e-6)


def test_several_images_of_a_layer_are_distinguished() -> None:
    other = SegmentSpec(name="target", tokens=2, grid=(1, 2))
    kv = LayerKV(torch.randn(2, 21, 1, 4), torch.randn(2, 21, 1, 4))
    places = TokenCoordinates((layer(TEXT, other, PICTURE, PICTURE),))
    (placed,) = places((kv,))
    weight = places.maps["0"].linear.weight
    assert weight.shape == (4, COORDINATE_FEATURES + 3)
    where, which = weight[:, :COORDINATE_FEATURES], weight[:, COORDINATE_FEATURES:]
    added = (placed.v - kv.v)[0, :, 0]
    assert added[:3].abs().max() == 0
    for i, (start, grid) in enumerate([(3, (1, 2)), (5, (2, 4)), (13, (2, 4))]):
        expected = coordinate_features(grid) @ where.T + which[:, i]
        assert torch.allclose(added[start : start + len(expected)], expected, atol=1e-6)


def test_a_layer_with_one_image_keeps_its_shape() -> None:
    assert TokenCoordinates((LAYER,)).maps["0"].linear.weight.shape == (4, COORDINATE_FEATURES)


def test_attending_to_a_token_returns_its_position() -> None:
    """Only an expert with token coordinates distinguishes two images with swapped tokens."""
    config = {"layers": (LAYER,), "rope": None, "action_dim": 2, "state_dim": 0, "horizon": 3, "hidden": 8}
    torch.manual_seed(2)
    kv = LayerKV(torch.randn(1, 11, 1, 4), torch.randn(1, 11, 1, 4))
    order = torch.tensor([0, 1, 2, *reversed(range(3, 11))])
    shuffled = LayerKV(kv.k[:, order], kv.v[:, order])
    chunk, t = torch.randn(1, 3, 2), torch.tensor([0.5])
    for aware in (False, True):
        torch.manual_seed(0)
        expert = ActionExpert(ExpertConfig(**config, places=aware))  # type: ignore[arg-type]
        for parameter in expert.parameters():
            torch.nn.init.normal_(parameter)
        a, b = (expert(chunk, t, None, PrefixKV((entry,), None)) for entry in (kv, shuffled))
        assert torch.allclose(a, b, atol=1e-4) is not aware


def test_text_may_have_another_length_than_in_the_spec() -> None:
    kv = LayerKV(torch.randn(2, 13, 1, 4), torch.randn(2, 13, 1, 4))
    places = TokenCoordinates((LAYER,))
    (longer,) = places((kv,))
    (shorter,) = places((LayerKV(kv.k[:, 5:], kv.v[:, 5:]),))
    assert torch.equal(longer.v[:, 5:], shorter.v)


def test_a_text_only_layer_is_not_changed() -> None:
    kv = tuple(LayerKV(torch.randn(1, n, 1, 4), torch.randn(1, n, 1, 4)) for n in (3, 8))
    text, picture = TokenCoordinates((layer(TEXT), layer(PICTURE)))(kv)
    assert text is kv[0]
    assert not torch.equal(picture.v, kv[1].v)


@pytest.mark.parametrize(
    ("segments", "problem"),
    [((TEXT,), "expert.places needs picture tokens"), ((PICTURE, TEXT), "expert.places needs text before pictures")],
)
def test_coordinates_require_images_after_the_text(segments: tuple[SegmentSpec, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        TokenCoordinates((layer(*segments),))


def test_a_grid_must_match_the_token_count() -> None:
    with pytest.raises(ValueError, match="but the segment has 7 tokens"):
        SegmentSpec(name="reference", tokens=7, grid=(2, 4))
