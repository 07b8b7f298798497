"""Test `kvcache.codecs.integer`: compare the error of each number with the bound of the format, in numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from imagewam_cli.kvcache.codecs.float8 import FLOAT8, _from_e4m3
from imagewam_cli.kvcache.codecs.integer import INT4, INT8, GroupedIntegerCodec
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.positions import layer_ids, rotate_keys
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec, SegmentSpec, TokenPositions

TOKENS, HEADS, SIZE = 150, 3, 40
"""Two whole groups of 64 tokens and a part of one; 120 channels, one group of 64 and a part."""
LAYER = LayerSpec(
    name="a",
    block="sequential",
    heads=HEADS,
    kv_heads=HEADS,
    head_dim=SIZE,
    segments=(SegmentSpec(name="text", tokens=50), SegmentSpec(name="reference", tokens=100)),
)
CODECS: list[Any] = [INT8, INT4, FLOAT8, GroupedIntegerCodec("int4", 4, group=32)]


@pytest.fixture(scope="module")
def kv() -> LayerKV:
    """Return values like an editor's: a few channels of K are large in every token, those of V are not."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 4, TOKENS, HEADS, SIZE, generator=generator)
    k[..., :3] = 8 * k[..., :3] + 20
    return LayerKV(k, v)


def round_trip(codec: Any, kv: LayerKV, **given: Any) -> LayerKV:
    decoded: LayerKV = codec.decode(codec.encode(kv, LAYER, **given), LAYER)
    return decoded


@pytest.mark.parametrize("codec", CODECS)
def test_parts_describe_the_stored_tensors(codec: Any, kv: LayerKV) -> None:
    stored, parts = codec.encode(kv, LAYER), codec.parts(LAYER)
    assert stored.keys() == parts.keys()
    for name, part in parts.items():
        assert (tuple(stored[name].shape[1:]), stored[name].dtype) == (part.shape, part.dtype)


@pytest.mark.parametrize("codec", CODECS)
def test_a_row_has_the_same_bytes_in_every_batch(codec: Any, kv: LayerKV) -> None:
    together = codec.encode(kv, LAYER)
    for i in range(4):
        for name, tensor in codec.encode(LayerKV(kv.k[i : i + 1], kv.v[i : i + 1]), LAYER).items():
            assert torch.equal(tensor.float(), together[name][i : i + 1].float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 1000])
def test_errors_are_at_most_half_a_step_of_the_group(bits: Any, group: int, kv: LayerKV) -> None:
    found = round_trip(GroupedIntegerCodec("x", bits, group), kv)
    for part, axis in (("k", 1), ("v", 2)):
        values, decoded = (getattr(x, part).numpy().astype(np.float64) for x in (kv, found))
        if part == "v":
            values, decoded = (x.reshape(4, TOKENS, -1) for x in (values, decoded))
        for first in range(0, values.shape[axis], group):
            members = np.take(values, range(first, min(first + group, values.shape[axis])), axis)
            near = np.take(decoded, range(first, min(first + group, values.shape[axis])), axis)
            assert (np.abs(near - members) <= bound(members, axis, bits)).all()


def bound(members: npt.NDArray[np.float64], axis: int, bits: int) -> npt.NDArray[np.float64]:
    """Return half a step plus the rounding of `low` and `step` to 11 bits."""
    low, high = members.min(axis, keepdims=True), members.max(axis, keepdims=True)
    rounding = np.abs(low) * 2.0**-11 + (high - low + np.abs(low) * 2.0**-11) * 2.0**-11
    bounds: npt.NDArray[np.float64] = 0.5 * (high - low) / (2**bits - 1) + 2 * rounding + 1e-6
    return bounds


def test_four_bit_numbers_are_packed_with_the_first_in_the_low_bits() -> None:
    layer = dataclasses.replace(
        LAYER, head_dim=4, heads=1, kv_heads=1, segments=(SegmentSpec(name="reference", tokens=2),)
    )
    v = torch.tensor([[[[0.0, 15.0, 3.0, 8.0]], [[0.0, 15.0, 1.0, 2.0]]]])
    stored = INT4.encode(LayerKV(v, v), layer)
    assert stored["v"].flatten().tolist() == [0xF0, 0x83, 0xF0, 0x21]
    assert torch.equal(INT4.decode(stored, layer).v, v)


@pytest.mark.parametrize("codec", [INT8, INT4])
def test_padding_does_not_widen_the_groups_of_keys(codec: GroupedIntegerCodec, kv: LayerKV) -> None:
    """The error of valid keys is bounded by the step of the valid tokens, whatever the padding holds."""
    valid = torch.ones(4, TOKENS, dtype=torch.bool)
    valid[:, 40:50] = False
    k = kv.k.clone() + 100  # far from zero
    k[:, 40:50] = 0
    padded = round_trip(codec, LayerKV(k, kv.v), valid=valid)
    group = k[:, [*range(40), *range(50, 64)]]
    step = (group.amax(1) - group.amin(1)) / (2**codec.bits - 1)
    error = (padded.k[:, :40] - k[:, :40]).abs().amax(1)
    assert bool((error <= 0.5 * step + 0.15).all()), "float16 numbers near 130 are 0.06 apart"


def test_a_group_of_padding_alone_is_finite(kv: LayerKV) -> None:
    valid = torch.ones(4, TOKENS, dtype=torch.bool)
    valid[:, :64] = False
    assert bool(torch.isfinite(round_trip(INT4, kv, valid=valid).k).all())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [0.0, -3.5])
def test_equal_numbers_are_restored_exactly(codec: Any, value: float) -> None:
    same = torch.full((1, TOKENS, HEADS, SIZE), value)
    found = round_trip(codec, LayerKV(same, same))
    assert torch.allclose(found.k, same, rtol=1e-6)
    assert torch.allclose(found.v, same, rtol=1e-6)


def test_fp8_errors_are_those_of_three_mantissa_bits_scaled_per_head(kv: LayerKV) -> None:
    found = round_trip(FLOAT8, kv)
    for values, decoded in ((kv.k, found.k), (kv.v, found.v)):
        least = values.abs().amax((1, 3), keepdim=True) / 448 * 2.0**-9  # half a step of subnormal numbers
        assert bool(((decoded - values).abs() <= values.abs() * 2.0**-4 + least).all())


@pytest.mark.parametrize("codec", [INT8, INT4])
def test_numbers_beyond_float16_are_stored_as_non_finite(codec: GroupedIntegerCodec, kv: LayerKV) -> None:
    stored = codec.encode(LayerKV(kv.k * 1e6, kv.v), LAYER)
    assert not bool(torch.isfinite(stored["k.low"]).all() and torch.isfinite(stored["k.step"]).all())


def test_four_bits_are_at_most_a_third_of_bfloat16(kv: LayerKV) -> None:
    stored = sum(part.row_bytes for part in INT4.parts(LAYER).values())
    assert stored * 3 < LAYER.numbers_per_row * 2


def test_keys_are_stored_without_their_rotation() -> None:
    """Keys that are equal in every token before rotation form groups of equal numbers, so they are restored closely."""
    rope = RopeSpec(axes=(16, 24), theta=100.0, action_axis=0, action_ids=(0, 0))
    positions = TokenPositions(origin=(3.0, 1.0), moves=((0,), (1,)))
    layer = dataclasses.replace(
        LAYER, segments=(SegmentSpec(name="reference", tokens=150, grid=(10, 15), positions=positions),)
    )
    still = torch.randn(1, 1, HEADS, SIZE, generator=torch.Generator().manual_seed(0)).expand(1, TOKENS, HEADS, SIZE)
    ids = layer_ids(layer)
    assert ids is not None
    k = rotate_keys(still, ids, rope)
    found = INT4.decode(INT4.encode(LayerKV(k, k), layer, rope=rope), layer, rope=rope).k
    assert torch.allclose(found, k, atol=5e-3), "the error exceeds the float16 rounding"
    assert float((INT4.decode(INT4.encode(LayerKV(k, k), layer), layer).k - k).abs().max()) > 0.05


@pytest.mark.parametrize("codec", [INT8, INT4, GroupedIntegerCodec("int4", 4, group=32)])
def test_decoded_numbers_match_the_documented_format_exactly(codec: GroupedIntegerCodec, kv: LayerKV) -> None:
    """Compute x = low + q * step from the stored bytes, in float32 with each operation rounded."""
    stored = {name: tensor.numpy() for name, tensor in codec.encode(kv, LAYER).items()}
    found = codec.decode({name: torch.from_numpy(x) for name, x in stored.items()}, LAYER)

    def numbers(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        halves = packed if codec.bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(4, TOKENS, HEADS, SIZE)
        return halves.astype(np.float32)

    def spread(name: str, axis: int, count: int) -> npt.NDArray[np.float32]:
        return np.repeat(stored[name].astype(np.float32), codec.group, axis).take(range(count), axis)

    k = numbers(stored["k"]) * spread("k.step", 1, TOKENS) + spread("k.low", 1, TOKENS)
    v = numbers(stored["v"]).reshape(4, TOKENS, -1)
    v = v * spread("v.step", 2, HEADS * SIZE) + spread("v.low", 2, HEADS * SIZE)
    np.testing.assert_array_equal(found.k.numpy(), k)
    np.testing.assert_array_equal(found.v.numpy(), v.reshape(4, TOKENS, HEADS, SIZE))


def test_every_finite_e4m3_number_is_read_as_torch_reads_it() -> None:
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    expected = every.float()
    finite = expected.isfinite()
    assert finite.sum() == 254
    found = _from_e4m3(every)
    assert torch.equal(found[finite].view(torch.int32), expected[finite].view(torch.int32))
