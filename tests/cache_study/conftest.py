from __future__ import annotations

import pytest
import torch

from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from tests.support.one_layer import HEADS, SIZE, TEXT


@pytest.fixture
def prefix() -> PrefixKV:
    """Three rows of random keys and values; the second row has two text tokens of padding."""
    k, v = torch.randn(2, 3, TEXT + 24, HEADS, SIZE, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, TEXT + 24, dtype=torch.bool)
    valid[1, 3:TEXT] = False
    hidden = ~valid[:, :, None, None]
    return PrefixKV((LayerKV(k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)),), valid)
