"""Rotate keys by their position ids and undo the rotation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from imagewam_cli.prefix.positions import layer_ids, rotate_keys, tables, unrotate
from imagewam_cli.prefix.rotary import rotate
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec, SegmentSpec, TokenPositions

ROPE = RopeSpec(axes=(4, 4), theta=100.0, action_axis=1, action_ids=(0, 0))
TEXT = SegmentSpec(name="text", tokens=3, positions=TokenPositions(origin=(0.0, 7.0), moves=((1,),)))
PICTURE = SegmentSpec(
    name="reference", tokens=4, grid=(2, 2), positions=TokenPositions(origin=(300.0, 0.0), moves=((0,), (1,)))
)


def layer(*segments: SegmentSpec) -> LayerSpec:
    return LayerSpec(name="a", block="parallel", heads=2, kv_heads=2, head_dim=8, segments=segments)


def test_layer_ids_join_the_ids_of_its_segments() -> None:
    ids = layer_ids(layer(TEXT, PICTURE))
    assert ids is not None
    assert ids.tolist() == [[0, 7], [0, 8], [0, 9], [300, 0], [300, 1], [301, 0], [301, 1]]
    assert layer_ids(layer(dataclasses.replace(TEXT, positions=None), PICTURE)) is None


def test_keys_are_rotated_like_pairs_of_complex_numbers() -> None:
    ids, k = layer_ids(layer(PICTURE)), torch.randn(2, 4, 2, 8, dtype=torch.float64)
    assert ids is not None
    frequencies = torch.tensor([1.0, 0.1], dtype=torch.float64)  # 100 ** -(2 j / 4)
    angles = (ids.double()[:, :, None] * frequencies).flatten(1)
    rotated = torch.view_as_complex(k.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.view_as_real(rotated).flatten(-2)
    assert torch.allclose(rotate_keys(k, ids, ROPE).double(), expected, atol=1e-5)
    assert torch.allclose(unrotate(expected, ids, ROPE).double(), k, atol=1e-5)


@pytest.mark.parametrize("rounding", ["exact", "published-bf16"])
def test_unrotate_inverts_rotate_keys(rounding: str) -> None:
    ids, k = layer_ids(layer(TEXT, PICTURE)), torch.randn(2, 7, 2, 8)
    rope = dataclasses.replace(ROPE, rounding=rounding)  # type: ignore[arg-type]
    assert ids is not None
    assert torch.allclose(unrotate(rotate_keys(k, ids, rope), ids, rope), k, atol=1e-5)
    assert not torch.allclose(rotate_keys(k, ids, rope), k, atol=0.1)


def test_rounding_changes_the_rotation() -> None:
    ids, k = layer_ids(layer(PICTURE)), torch.randn(1, 4, 1, 8)
    assert ids is not None
    rounded = dataclasses.replace(ROPE, rounding="published-bf16")
    assert not torch.allclose(rotate_keys(k, ids, rounded), rotate_keys(k, ids, ROPE), atol=1e-2)


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 7, 1, 32), (3, 1, 2, 6)])
def test_rotate_keys_equals_the_experts_rotation_bit_for_bit(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    k = 100 * torch.randn(shape, generator=generator)
    k[:, :, :, ::3] = 0.0
    rope = RopeSpec(axes=(shape[-1],), theta=100.0, action_axis=0, action_ids=(0,))
    ids = 1000 * torch.randn(shape[1], 1, generator=generator)
    expected = rotate(k, *tables(ids, rope))
    assert torch.equal(rotate_keys(k, ids, rope).view(torch.int32), expected.view(torch.int32))
    swapped = k.transpose(0, 2).contiguous().transpose(0, 2)  # the memory layout that some editors return
    assert torch.equal(rotate_keys(swapped, ids, rope), expected)
