"""Joint attention of action tokens over [prefix K/V | own K/V] in one softmax, and its rotary positions.

Shape letters: B prefixes, N noisy chunks per prefix (draws), T tokens of a chunk, P prefix tokens, H heads, G key
heads, D head size.

The chunk batch is (B N): the N draws of one prefix are consecutive, so attention reads each prefix only once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.rotary import rotary_tables, rotate
from imagewam_cli.prefix.spec import RopeSpec, RoundingName


def joint_attention(q: Tensor, k: Tensor, v: Tensor, prefix: LayerKV | None, valid: Tensor | None) -> Tensor:
    """Return the attention output (B N, T, H D).

    q (B N, T, H, D), k and v (B N, T, G, D): of the chunk's own tokens; prefix: k, v (B, P, G, D) or None; valid: which
    prefix tokens to attend to, bool (B, P), None for all. The scale is 1 / sqrt(D).
    """
    chunks, tokens, heads, size = q.shape
    k, v = _expand_heads(k, heads), _expand_heads(v, heads)
    q = q.transpose(1, 2) * size**-0.5
    own = q @ k.permute(0, 2, 3, 1)
    if prefix is None:
        return (own.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
    batch = prefix.k.shape[0]
    draws = chunks // batch
    length = prefix.k.shape[1]
    k_prefix = _expand_heads(prefix.k, heads).to(q.dtype).permute(0, 2, 3, 1)
    v_prefix = _expand_heads(prefix.v, heads).to(q.dtype).transpose(1, 2)
    # Fold the draws into the query axis instead of copying K and V for every draw.
    scores = _fold(q, batch, draws) @ k_prefix
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
    # One softmax over both parts: the prefix and the chunk's own tokens compete for attention.
    weights = torch.cat([_unfold(scores, batch, draws), own], dim=-1).softmax(-1)
    from_prefix = _fold(weights[..., :length], batch, draws) @ v_prefix
    out = _unfold(from_prefix, batch, draws) + weights[..., length:] @ v.transpose(1, 2)
    return out.transpose(1, 2).reshape(chunks, tokens, heads * size)


def _fold(x: Tensor, batch: int, draws: int) -> Tensor:
    """Reshape (B N, H, T, X) to (B, H, N T, X): the draws of a prefix become more queries on it."""
    _, heads, tokens, last = x.shape
    return x.reshape(batch, draws, heads, tokens, last).transpose(1, 2).reshape(batch, heads, draws * tokens, last)


def _unfold(x: Tensor, batch: int, draws: int) -> Tensor:
    """Undo `_fold`."""
    _, heads, rows, last = x.shape
    x = x.reshape(batch, heads, draws, rows // draws, last).transpose(1, 2)
    return x.reshape(batch * draws, heads, rows // draws, last)


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key heads, (.., G, D) to (.., H, D): each serves H / G query heads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


class Rotary(nn.Module):
    """Rotate q and k of chunk tokens exactly as the editor rotates its keys: interleaved pairs, several axes."""

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: RopeSpec, positions: Tensor, rounding: RoundingName = "exact") -> None:
        """positions: (T,) rotary ids of the tokens along the action axis."""
        super().__init__()
        ids = torch.tensor(spec.action_ids).repeat(len(positions), 1)
        ids[:, spec.action_axis] = positions
        cos, sin = rotary_tables(ids, spec.axes, spec.theta, rounding)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (B N, T, H, D)."""
        return rotate(x, self.cos, self.sin)
