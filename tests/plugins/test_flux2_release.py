"""Compare the conversion between FLUX.2's released weight names and diffusers' names with diffusers' own converter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imagewam_flux2.release import Flux2Release

SIZES = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 2, 2),
    "guidance_embeds": False,
}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    from diffusers import Flux2Transformer2DModel

    generator = torch.Generator().manual_seed(0)
    model: Any = Flux2Transformer2DModel(**SIZES)
    return {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def test_released_weights_equal_diffusers_conversion(state: dict[str, Tensor]) -> None:
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    released = Flux2Release().to_release(state)
    converted = convert_flux2_transformer_checkpoint_to_diffusers(dict(released))
    assert converted.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(converted[name], value), name


def test_from_release_inverts_to_release(state: dict[str, Tensor]) -> None:
    release = Flux2Release()
    back = release.from_release(release.to_release(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_unknown_names_are_kept() -> None:
    weights = {"double_blocks.0.img_attn.gate.weight": torch.zeros(1), "extra": torch.zeros(1)}
    assert Flux2Release().from_release(weights).keys() == weights.keys()


def test_sizes_are_read_from_the_weights(state: dict[str, Tensor]) -> None:
    released = Flux2Release().to_release(state)
    assert Flux2Release().sizes(released) == {
        "double blocks": 2,
        "single blocks": 3,
        "hidden channels": 16,
        "latent channels": 8,
        "text channels": 12,
        "numbers in a head": 8,
    }
