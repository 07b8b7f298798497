"""Test `kvcache.codecs.pca`: sizes, errors compared with theory and other codecs, and its state in a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
from imagewam_cli.kvcache.codecs.contract import FittedCodec
from imagewam_cli.kvcache.codecs.integer import INT4
from imagewam_cli.kvcache.codecs.pca import (
    PCA1,
    PCA2,
    PCACodec,
    SegmentBasis,
    _allocate_bits,
    _concatenate_heads,
    _pack,
    _unpack,
)
from imagewam_cli.kvcache.format.manifest import CODEC
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.positions import layer_ids, rotate_keys
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, RopeSpec, SegmentSpec, TokenPositions
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.faults import flip, stop_after
from tests.support.folders import files

TEXT, PICTURE = 6, 16
ROPE = RopeSpec(axes=(8, 8), theta=100.0, action_axis=1, action_ids=(7, 0))
SEGMENTS = (
    SegmentSpec(name="text", tokens=TEXT, positions=TokenPositions(origin=(0.0, 0.0), moves=((1,),))),
    SegmentSpec(
        name="reference", tokens=PICTURE, grid=(4, 4), positions=TokenPositions(origin=(1.0, 0.0), moves=((0,), (1,)))
    ),
)


PLAIN = tuple(dataclasses.replace(segment, positions=None) for segment in SEGMENTS)


def layer(kv_heads: int = 3, head_dim: int = 16, name: str = "a", rope: bool = True) -> LayerSpec:
    return LayerSpec(
        name=name,
        block="parallel",
        heads=kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        segments=SEGMENTS if rope else PLAIN,
    )


def spec(*layers: LayerSpec, rope: RopeSpec | None = ROPE) -> KVSpec:
    return KVSpec(
        mode="prefix",
        timestep=0.0,
        layers=layers,
        rope=rope,
        text_padding="trim",
        cameras=("top",),
        image_size=(64, 64),
        prompt_template="{instruction}",
    )


def prefix(layers: tuple[LayerSpec, ...], rows: int, seed: int, inner: int = 8) -> PrefixKV:
    """Return V, and K before its rotation, as linear functions of a hidden state of `inner` numbers.

    The last text token is padding in every other row.
    """
    maps = torch.Generator().manual_seed(7)
    state = torch.randn(rows, TEXT + PICTURE, inner, generator=torch.Generator().manual_seed(seed))
    kept = []
    for x in layers:
        shape = (rows, TEXT + PICTURE, x.kv_heads, x.head_dim)
        k, v = (
            (state @ torch.randn(inner, x.kv_heads * x.head_dim, generator=maps) + offset).reshape(shape)
            for offset in (5.0, 0.0)
        )
        ids = layer_ids(x)
        kept.append(LayerKV(k if ids is None else rotate_keys(k, ids, ROPE), v))
    valid = torch.ones(rows, TEXT + PICTURE, dtype=torch.bool)
    valid[::2, TEXT - 1] = False
    return PrefixKV(tuple(kept), valid)


def round_trip(codec: PCACodec, layout: KVSpec, given: PrefixKV) -> list[LayerKV]:
    return [
        codec.decode(codec.encode(kv, x, rope=layout.rope, valid=given.valid), x, rope=layout.rope)
        for kv, x in zip(given.layers, layout.layers, strict=True)
    ]


def error(found: LayerKV, expected: LayerKV, valid: Tensor | None) -> float:
    """Return the root mean square error, relative to the standard deviation of the numbers."""
    assert valid is not None
    pairs = [(a[valid], b[valid]) for a, b in ((found.k, expected.k), (found.v, expected.v))]
    return max(float(((a - b).square().mean() / b.var()).sqrt()) for a, b in pairs)


@pytest.mark.parametrize("codec", [PCA2, PCA1])
def test_a_token_takes_the_declared_number_of_bits(codec: PCACodec) -> None:
    """Compute the size by hand: a token has 2 x 3 heads x 16 numbers."""
    layout = spec(layer())
    fitted = codec.fitted(layout, [prefix(layout.layers, 8, 0)])
    stored = fitted.encode(prefix(layout.layers, 2, 1).layers[0], layout.layers[0], rope=ROPE)
    assert stored["codes"].shape == (2, TEXT + PICTURE, int(96 * codec.bits / 8))
    (part,) = codec.parts(layout.layers[0]).values()
    assert part.row_bytes == stored["codes"][0].nbytes


@pytest.mark.parametrize("head_dim", [16, 300])
def test_numbers_with_few_degrees_of_freedom_are_restored(head_dim: int) -> None:
    """96 numbers with 8 degrees of freedom get 96 bits, at least 8 per degree, which gives an error of 1 % (Max).

    With 300 channels the codec transforms heads one at a time, and each head depends on all 8 degrees.
    """
    rope = ROPE if head_dim == 16 else None
    layout = spec(layer(3 if rope else 2, head_dim, rope=rope is not None), rope=rope)
    one_bit = PCACodec("one", 1.0)
    fitted = one_bit.fitted(layout, [prefix(layout.layers, 64, 0)])
    given = prefix(layout.layers, 16, 1)
    (found,) = round_trip(fitted, layout, given)
    assert error(found, given.layers[0], given.valid) < 0.03


def test_the_error_is_below_that_of_integers_with_twice_the_bytes() -> None:
    """For correlated numbers, two bits on principal axes give a smaller error than four or more bits of `int4`."""
    layout = spec(layer())
    given = prefix(layout.layers, 16, 1, inner=24)
    fitted = PCA2.fitted(layout, [prefix(layout.layers, 64, 0, inner=24)])
    (ours,) = round_trip(fitted, layout, given)
    (x,) = layout.layers
    theirs = INT4.decode(INT4.encode(given.layers[0], x, rope=ROPE, valid=given.valid), x, rope=ROPE)
    ours_bytes, theirs_bytes = (sum(p.row_bytes for p in c.parts(x).values()) for c in (fitted, INT4))
    assert 2 * ours_bytes < theirs_bytes
    assert error(ours, given.layers[0], given.valid) < error(theirs, given.layers[0], given.valid)


def test_independent_gaussian_numbers_have_the_theoretical_error_of_two_bits() -> None:
    """All axes are equal, so every number gets 2 bits, whose smallest error is 0.1188 of the variance (Max)."""
    layout = spec(layer(rope=False), rope=None)
    fit, given = (
        PrefixKV(
            (LayerKV(*torch.randn(2, n, TEXT + PICTURE, 3, 16, generator=torch.Generator().manual_seed(n))),), None
        )
        for n in (256, 32)
    )
    two_bits = PCACodec("two", 2.0)
    (found,) = round_trip(two_bits.fitted(layout, [fit]), layout, given)
    squared = (found.k - given.layers[0].k).square().mean()
    assert float(squared) == pytest.approx(0.1188, rel=0.06)


def test_a_row_has_the_same_bytes_in_every_batch() -> None:
    layout = spec(layer(), layer(name="b"))
    fitted = PCA1.fitted(layout, [prefix(layout.layers, 8, 0)])
    given = prefix(layout.layers, 9, 1)
    whole = fitted.encode(given.layers[0], layout.layers[0], rope=ROPE)["codes"]
    for row in range(9):
        alone = LayerKV(given.layers[0].k[row : row + 1], given.layers[0].v[row : row + 1])
        assert torch.equal(fitted.encode(alone, layout.layers[0], rope=ROPE)["codes"][0], whole[row])


def test_state_restores_the_codec_and_fitting_is_deterministic() -> None:
    layout = spec(layer(), layer(name="b"))
    samples = [prefix(layout.layers, 8, seed) for seed in (0, 1)]
    first, again = (PCA2.fitted(layout, samples) for _ in range(2))
    assert first.state().keys() == again.state().keys()
    assert all(torch.equal(first.state()[name], again.state()[name]) for name in first.state())
    restored = PCA2.restored(layout, first.state())
    assert isinstance(restored, FittedCodec)
    given = prefix(layout.layers, 4, 2)
    for a, b in zip(round_trip(first, layout, given), round_trip(restored, layout, given), strict=True):
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)


def test_padding_does_not_affect_the_fit() -> None:
    """The values of padded tokens do not change the codec."""
    layout = spec(layer())
    given = prefix(layout.layers, 8, 0)
    assert given.valid is not None
    wild = PrefixKV(
        tuple(
            LayerKV(*(x.masked_fill(~given.valid[..., None, None], 1e6) for x in (kv.k, kv.v))) for kv in given.layers
        ),
        given.valid,
    )
    a, b = (PCA1.fitted(layout, [p]).state() for p in (given, wild))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_constant_numbers_are_restored() -> None:
    """A layer with the same value for every token has no variance to store."""
    layout = spec(layer(rope=False), rope=None)
    constant = PrefixKV((LayerKV(*(torch.full((4, TEXT + PICTURE, 3, 16), x) for x in (2.0, -1.0))),), None)
    (found,) = round_trip(PCA1.fitted(layout, [constant]), layout, constant)
    assert torch.allclose(found.k, constant.layers[0].k, atol=1e-6)
    assert torch.allclose(found.v, constant.layers[0].v, atol=1e-6)


@pytest.mark.parametrize(("heads", "size", "together"), [(3, 16, 3), (5, 128, 2), (2, 300, 1)])
def test_blocks_hold_k_of_a_few_heads_then_v_of_them(heads: int, size: int, together: int) -> None:
    k, v = torch.randn(2, 2, 7, heads, size)
    side = _concatenate_heads(k, v, layer(heads, size))
    assert side.shape == (2, 7, 2 * heads * size)
    assert torch.equal(side[..., : together * size], k[:, :, :together].flatten(2))
    assert torch.equal(side[..., together * size : 2 * together * size], v[:, :, :together].flatten(2))
    assert torch.equal(side[..., -size:], v[:, :, -1])


def test_bit_planes_are_unpacked_exactly() -> None:
    bits = torch.tensor([5] * 8 + [3] * 16 + [1] * 8)
    codes = torch.stack([torch.arange(32) * i % 2**bits for i in range(10)]).to(torch.uint8)
    packed = _pack(codes, bits)
    assert packed.shape == (10, (8 * 5 + 16 * 3 + 8) // 8)
    assert torch.equal(_unpack(packed[None], bits)[0], codes)


def test_bits_go_to_the_axes_with_the_largest_gain() -> None:
    """Each bit divides an error by 4, so the group of axes with errors 16 times as large gets two bits more."""
    errors = torch.stack([torch.tensor([16.0] * 8 + [1.0] * 16) / 4**bits for bits in range(9)])
    assert _allocate_bits(errors, 2).tolist() == [2] * 8 + [0] * 16
    assert _allocate_bits(errors, 5)[:8].tolist() == [3] * 8
    assert int(_allocate_bits(errors, 100).max()) == 8


@pytest.mark.parametrize(("heads", "size"), [(3, 16), (5, 128)])
def test_codes_can_be_decoded_from_the_documented_format_alone(heads: int, size: int) -> None:
    """Decode in numpy as docs/reference/cache-format.md specifies: one block of 3 heads, or blocks of 2, 2 and 1."""
    x = layer(heads, size, rope=False)
    layout = spec(x, rope=None)
    fitted = PCA1.fitted(layout, [prefix(layout.layers, 8, 0, inner=24)])
    given = prefix(layout.layers, 2, 1, inner=24)
    codes = fitted.encode(given.layers[0], x)["codes"].numpy()
    expected = fitted.decode({"codes": torch.from_numpy(codes)}, x)
    state = {name: tensor.numpy() for name, tensor in fitted.state().items()}
    at = 0
    for number, segment in enumerate(x.segments):
        own = {name.removeprefix(f"a/{number}/"): t for name, t in state.items() if name.startswith(f"a/{number}/")}
        numbers = read_as_documented(codes[:, at : at + segment.tokens], own)
        first = 0
        for block in range(sum(name.startswith("block.") for name in own)):
            width = len(own[f"block.{block}"])
            few = slice(first // (2 * size), (first + width) // (2 * size))
            k, v = np.split(numbers[..., first : first + width], 2, axis=-1)
            for found, tensor in ((k, expected.k), (v, expected.v)):
                there = tensor[:, at : at + segment.tokens, few].numpy()
                assert np.allclose(found.reshape(there.shape), there, atol=1e-4)
            first += width
        assert first == 2 * heads * size
        at += segment.tokens


def read_as_documented(codes: npt.NDArray[np.uint8], state: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """Decode codes (N, P, B) into numbers (N, P, 2 G D)."""
    bits = state["bits"]
    q = np.zeros((*codes.shape[:2], len(bits)), np.int64)
    at = 0
    for plane in range(int(bits.max())):
        count = int((bits > plane).sum())
        packed = codes[..., at : at + count // 8]
        q[..., :count] += np.unpackbits(packed, axis=-1, bitorder="little").astype(np.int64) << plane
        at += count // 8
    sizes = [len(state[f"block.{b}"]) for b in range(sum(name.startswith("block.") for name in state))]
    y = np.zeros((*codes.shape[:2], sum(sizes)))
    y[..., state["order"]] = (q - 2.0 ** (bits - 1) + 0.5) * state["step"]
    out, first = np.zeros_like(y), 0
    for b, size in enumerate(sizes):
        turned = y[..., first : first + size] @ state[f"block.{b}"].astype(np.float64).T
        out[..., first : first + size] = turned * np.repeat(state["scale"], size // 2)
        first += size
    return out + state["mean"]


class TestCache:
    def build(self, out: Path, on_rows: Callable[[int], None] = lambda rows: None) -> ArithmeticEditor:
        editor, settings = ArithmeticEditor(), dataclasses.replace(SETTINGS, shard_mb=0.0009)
        build_cache(MemoryDataset(LENGTHS), editor, out, PCA2, settings, on_rows=on_rows)
        return editor

    def test_the_state_is_a_file_of_the_cache(self, tmp_path: Path) -> None:
        self.build(tmp_path)
        reader = CacheReader(tmp_path)
        assert CODEC in reader.manifest.files
        assert reader.read(np.arange(15)).layers[0].k.shape == (15, 12, 2, 4)
        assert verify_cache(tmp_path) == []

    def test_with_a_damaged_state_reading_fails_and_repair_restores_it(self, tmp_path: Path) -> None:
        self.build(tmp_path)
        before = files(tmp_path)
        flip(tmp_path / CODEC, 300)
        with pytest.raises(CacheError, match="differs from its checksum"):
            CacheReader(tmp_path)
        (damage,) = verify_cache(tmp_path)
        assert damage.file == CODEC
        repair_cache(tmp_path, [damage], MemoryDataset(LENGTHS), ArithmeticEditor())
        assert files(tmp_path) == before

    def test_a_stopped_build_resumes_with_the_same_codec(self, tmp_path: Path) -> None:
        self.build(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            self.build(tmp_path / "c", stop_after(5))
        editor = self.build(tmp_path / "c")
        assert editor.encoded < 15  # the finished shard and the sample are not encoded again
        assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_all_tensors_of_a_basis_move_to_the_device() -> None:
    layout = spec(layer())
    basis = PCA1.fitted(layout, [prefix(layout.layers, 8, 0)]).bases["a", 0]
    moved = basis.to(torch.device("meta"))
    assert isinstance(moved, SegmentBasis)
    assert {t.device.type for t in (moved.mean, moved.scale, *moved.blocks, moved.order, moved.bits, moved.step)} == {
        "meta"
    }
    assert basis.to(torch.device("cpu")) is basis
