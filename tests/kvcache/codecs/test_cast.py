"""Test `kvcache.codecs.cast`: exact round trips and rounding. Expected bits are computed with numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from imagewam_cli.kvcache.codecs.cast import BFLOAT16, FLOAT16, FLOAT32, CastCodec
from imagewam_cli.prefix.kv import LayerKV
from tests.support.arithmetic_editor import ArithmeticEditor

LAYER = ArithmeticEditor().spec.layers[0]


def through(codec: CastCodec, values: torch.Tensor) -> torch.Tensor:
    """Encode and decode the numbers as keys and as values; both must give the same result."""
    back = codec.decode(codec.encode(LayerKV(values, values), LAYER), LAYER)
    assert torch.equal(back.k, back.v)
    return back.k


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    """Return numbers of every magnitude that K and V have, with both signs, (N, 1, 1, 1)."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=4096) * 10.0 ** rng.uniform(-3, 3, size=4096)
    return torch.from_numpy(drawn.astype(np.float32)).reshape(-1, 1, 1, 1)


def test_fp32_is_exact() -> None:
    bits = np.random.default_rng(0).integers(0, 2**31 - 2**24, size=4096).astype(np.uint32)
    np.testing.assert_array_equal(
        through(FLOAT32, torch.from_numpy(bits.view(np.float32))).numpy().view(np.uint32), bits
    )


def test_fp16_rounds_to_the_nearest(values: torch.Tensor) -> None:
    expected = values.numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(through(FLOAT16, values).numpy(), expected)


def test_bf16_rounds_to_the_nearest_with_ties_to_even(values: torch.Tensor) -> None:
    np.testing.assert_array_equal(through(BFLOAT16, values).numpy(), nearest_bfloat16(values.numpy()))


def test_bf16_breaks_ties_to_even() -> None:
    step = 2.0**-7  # distance of neighbouring bfloat16 numbers in [1, 2)
    ties = torch.tensor([1 + 0.5 * step, 1 + 1.5 * step])
    np.testing.assert_array_equal(through(BFLOAT16, ties).numpy(), [1.0, 1 + 2 * step])


@pytest.mark.parametrize(("codec", "bits"), [(BFLOAT16, 8), (FLOAT16, 11)])
def test_the_relative_error_is_at_most_half_a_step(codec: CastCodec, bits: int, values: torch.Tensor) -> None:
    normal = values[values.abs() >= 2.0**-14]  # below that, fp16 has fewer bits
    assert float(((through(codec, normal) - normal) / normal).abs().max()) <= 2.0**-bits


@pytest.mark.parametrize(("codec", "size"), [(FLOAT32, 4), (BFLOAT16, 2), (FLOAT16, 2)])
def test_parts_describe_the_stored_tensors(codec: CastCodec, size: int) -> None:
    numbers = torch.randn(3, LAYER.tokens, LAYER.kv_heads, LAYER.head_dim)
    stored, parts = codec.encode(LayerKV(numbers, numbers), LAYER), codec.parts(LAYER)
    assert stored.keys() == parts.keys() == {"k", "v"}
    for name, part in parts.items():
        assert (tuple(stored[name].shape[1:]), stored[name].dtype) == (part.shape, part.dtype)
        assert part.row_bytes == LAYER.numbers_per_row // 2 * size


def nearest_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round by integer arithmetic on the bits: add half a step (one more if the result would be odd) and truncate."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)
