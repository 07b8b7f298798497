"""Test the group norm with which graphs are traced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from imagewam_cli.export.group_norm import AccurateGroupNorm, group_norm


def test_it_equals_torchs_group_norm() -> None:
    x = torch.randn(2, 12, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, bias = torch.linspace(-1, 2, 12).double(), torch.linspace(1, 3, 12).double()
    torch.testing.assert_close(group_norm(x, 3, weight, bias, 1e-6), F.group_norm(x, 3, weight, bias, 1e-6))
    torch.testing.assert_close(group_norm(x, 4), F.group_norm(x, 4))


def test_it_stays_precise_on_uniform_images() -> None:
    x = 100 + 0.01 * torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = F.group_norm(x.double(), 4).float()
    assert (group_norm(x, 4) - exact).abs().max() < 0.01
    textbook = x.unflatten(1, (4, -1)).flatten(2)
    spread = textbook.square().mean(-1) - textbook.mean(-1).square()
    assert (spread / textbook.double().var(-1, correction=0) - 1).abs().max() > 1  # the error of ONNX's own formula


def test_modules_use_it_only_while_it_is_active() -> None:
    norm, x = nn.GroupNorm(2, 4), torch.randn(1, 4, 3, 3)
    with AccurateGroupNorm():
        inside, flat = norm(x), norm(x.flatten(2))
    torch.testing.assert_close(inside, group_norm(x, 2, norm.weight, norm.bias, norm.eps), rtol=0, atol=0)
    torch.testing.assert_close(flat, norm(x.flatten(2)), rtol=0, atol=0)
