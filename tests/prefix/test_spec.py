"""`prefix.spec`: row sizes and position ids computed by hand, and the ways to choose layers."""

from __future__ import annotations

import pytest

from imagewam_cli.prefix.spec import KVSpec, LayerSpec, RopeSpec, SegmentSpec, TokenPositions, select_layers


def spec(*layers: LayerSpec) -> KVSpec:
    return KVSpec(
        mode="prefix",
        timestep=0.0,
        layers=layers,
        rope=None,
        text_padding="trim",
        cameras=("top",),
        image_size=(224, 448),
        prompt_template="{instruction}",
    )


def layer(heads: int, kv_heads: int, head_dim: int, tokens: int, text: int = 0) -> LayerSpec:
    reference = SegmentSpec(name="reference", tokens=tokens - text)
    segments = (SegmentSpec(name="text", tokens=text), reference) if text else (reference,)
    return LayerSpec(name="x", block="parallel", heads=heads, kv_heads=kv_heads, head_dim=head_dim, segments=segments)


def test_a_row_of_flux2_4b_takes_128_megabytes() -> None:
    # 25 layers x (K, V) x 418 tokens x 24 heads x 128 numbers x 2 bytes, multiplied out by hand
    assert spec(*[layer(24, 24, 128, 418)] * 25).bytes_per_row(2) == 128_409_600


def test_bytes_per_row_sum_over_layers_of_different_sizes() -> None:
    # (K, V) x 3 tokens x 2 key heads x 5 = 60 numbers, and (K, V) x 7 x 1 x 4 = 56
    assert spec(layer(8, 2, 5, 3), layer(4, 1, 4, 7)).bytes_per_row(4) == 4 * (60 + 56)


def test_tokens_of_a_layer_sum_over_its_segments() -> None:
    assert layer(1, 1, 2, 418, text=26).tokens == 26 + 392


def test_position_ids_of_a_grid() -> None:
    positions = TokenPositions(origin=(10.0, -1.0, 0.5), moves=((1,), (1, 2)), step=2.0)
    segment = SegmentSpec(name="reference", tokens=4, grid=(2, 2), positions=positions)
    assert segment.position_ids is not None
    assert segment.position_ids.tolist() == [[10, -1, 0.5], [10, 1, 2.5], [10, 1, 0.5], [10, 3, 2.5]]


def test_position_ids_of_text() -> None:
    for moves, expected in (((), [[3, 4]] * 3), ((1,), [[3, 4], [3, 5], [3, 6]])):
        positions = TokenPositions(origin=(3.0, 4.0), moves=(moves,))
        ids = SegmentSpec(name="text", tokens=3, positions=positions).position_ids
        assert ids is not None
        assert ids.tolist() == expected
    assert SegmentSpec(name="text", tokens=3).position_ids is None


def test_positions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 2 axes"):
        TokenPositions(origin=(0.0, 0.0), moves=((2,),))
    flat = TokenPositions(origin=(0.0, 0.0), moves=((1,),))
    with pytest.raises(ValueError, match="does not fit a grid"):
        SegmentSpec(name="reference", tokens=4, grid=(2, 2), positions=flat)
    with pytest.raises(ValueError, match="does not fit a row of tokens"):
        SegmentSpec(name="text", tokens=4, positions=TokenPositions(origin=(0.0,), moves=((0,), (0,))))
    text = SegmentSpec(name="text", tokens=4, positions=flat)
    held = LayerSpec(name="x", block="parallel", heads=1, kv_heads=1, head_dim=4, segments=(text,))
    with pytest.raises(ValueError, match="positions on 2 axes, but the rope has 0"):
        spec(held)


@pytest.mark.parametrize("extent", [(1.0, 2.0), (2.5, 2.0), (2.0, 1.0)])
def test_an_extent_that_does_not_fill_the_grid_is_refused(extent: tuple[float, float]) -> None:
    SegmentSpec(name="reference", tokens=4, grid=(2, 2), extent=(1.5, 2.0))
    with pytest.raises(ValueError, match="does not fill a grid"):
        SegmentSpec(name="reference", tokens=4, grid=(2, 2), extent=extent)


def unet(*text: int) -> KVSpec:
    """Return a layer with 16 picture tokens, then one with only text for each given length."""
    target = SegmentSpec(name="target", tokens=16, grid=(4, 4))
    texts = [SegmentSpec(name="text", tokens=n) for n in text]
    return spec(
        *(
            LayerSpec(name="x", block="sequential", heads=1, kv_heads=1, head_dim=4, segments=(segment,))
            for segment in (target, *texts)
        )
    )


def test_valid_tokens_is_the_width_of_the_layers_with_text() -> None:
    assert spec(layer(1, 1, 2, 418, text=26)).valid_tokens == 418
    assert unet(77, 77).valid_tokens == 77
    assert unet().valid_tokens == 0
    with pytest.raises(ValueError, match=r"the same number of tokens, got \[26, 77\]"):
        unet(77, 26)


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6)),
        ("every:1", (0, 1, 2, 3, 4, 5, 6)),
        ("every:3", (0, 3, 6)),
        ("every:9", (0,)),
        ("4", (4,)),
        ("5,0,2", (0, 2, 5)),
        ("2,2,1", (1, 2)),
    ],
)
def test_layers_are_chosen_in_three_ways(choice: str, chosen: tuple[int, ...]) -> None:
    assert select_layers(choice, 7) == chosen


@pytest.mark.parametrize("choice", ["", "none", "every:", "every:x", "every:0", "every:-1", "1,,2", "1-3", "0.5"])
def test_another_choice_of_layers_is_refused_with_the_three_forms(choice: str) -> None:
    with pytest.raises(ValueError, match=r"'all', 'every:N' or a list like '0,4,9'"):
        select_layers(choice, 7)


@pytest.mark.parametrize("choice", ["7", "0,7", "-1", "-1,3"])
def test_a_layer_that_does_not_exist_is_refused_with_the_range(choice: str) -> None:
    with pytest.raises(ValueError, match="layers 0 to 6"):
        select_layers(choice, 7)


@pytest.mark.parametrize(("axes", "ids"), [((4, 4), (0,)), ((3, 5), (0, 0))])
def test_rope_axes_are_even_and_match_the_ids(axes: tuple[int, ...], ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rope axes"):
        RopeSpec(axes=axes, theta=1.0, action_axis=0, action_ids=ids)
