"""`kvcache.codec`: what is exact, and how far rounding goes. Expected bits come from numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from imagewam_cli.kvcache.codec import BFLOAT16, FLOAT16, FLOAT32, CastCodec


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    """Numbers of every size that K and V have, and of both signs, (N, 1, 1, 1)."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=4096) * 10.0 ** rng.uniform(-3, 3, size=4096)
    return torch.from_numpy(drawn.astype(np.float32)).reshape(-1, 1, 1, 1)


def test_float32_gives_back_every_bit() -> None:
    bits = np.random.default_rng(0).integers(0, 2**31 - 2**24, size=4096).astype(np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    back = FLOAT32.decode(FLOAT32.encode(values))
    np.testing.assert_array_equal(back.numpy().view(np.uint32), bits)


def test_float16_rounds_to_the_nearest(values: torch.Tensor) -> None:
    back = FLOAT16.decode(FLOAT16.encode(values)).numpy()
    np.testing.assert_array_equal(back, values.numpy().astype(np.float16).astype(np.float32))


def test_bfloat16_rounds_to_the_nearest_with_ties_to_even(values: torch.Tensor) -> None:
    back = BFLOAT16.decode(BFLOAT16.encode(values)).numpy()
    np.testing.assert_array_equal(back, nearest_bfloat16(values.numpy()))


def test_bfloat16_breaks_ties_to_even() -> None:
    step = 2.0**-7  # of bfloat16 in [1, 2)
    ties = torch.tensor([1 + 0.5 * step, 1 + 1.5 * step])
    np.testing.assert_array_equal(BFLOAT16.decode(BFLOAT16.encode(ties)).numpy(), [1.0, 1 + 2 * step])


@pytest.mark.parametrize(("codec", "bits"), [(BFLOAT16, 8), (FLOAT16, 11)])
def test_the_relative_error_is_at_most_half_a_step(codec: CastCodec, bits: int, values: torch.Tensor) -> None:
    normal = values[values.abs() >= 2.0**-14]  # below that, float16 has fewer bits
    back = codec.decode(codec.encode(normal))
    assert float(((back - normal) / normal).abs().max()) <= 2.0**-bits


@pytest.mark.parametrize(("codec", "size"), [(FLOAT32, 4), (BFLOAT16, 2), (FLOAT16, 2)])
def test_bytes_per_number_are_those_of_what_is_stored(codec: CastCodec, size: int, values: torch.Tensor) -> None:
    assert codec.encode(values).element_size() == codec.bytes_per_number == size


def nearest_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """By integer arithmetic on the bits: add half a step, plus one where the result would be odd, and cut."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)
