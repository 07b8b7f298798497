"""The expert's blocks, with the module names of the published FLUX.2 action expert: its state dict loads strictly.

Layer norms have no affine parameters and eps 1e-6. q and k are normalized by an RMS norm over the head with a learned
scale. Only the input encoders have biases. All blocks of a kind share one linear map for shift, scale and gate of the
modulation.

Source: arXiv 2606.19531, FLUX.2 stack.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewam_cli.expert.attention import Rotary, joint_attention
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.spec import LayerSpec

TIME_FREQUENCIES = 256
EPS = 1e-6


class TimeEmbedding(nn.Module):
    """Embed times (B,) in [0, 1] as (B, hidden).

    Applies two linear layers to the cosines, then the sines, of 1000 t at 128 frequencies from 1 down to 1e-4.
    """

    frequencies: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        half = TIME_FREQUENCIES // 2
        # Stored as a buffer: an exported graph would recompute the exponential with different rounding.
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.in_layer = nn.Linear(TIME_FREQUENCIES, hidden, bias=False)
        self.out_layer = nn.Linear(hidden, hidden, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed t (B,) in [0, 1] as (B, hidden)."""
        angles = (1000.0 * t).float()[:, None] * self.frequencies  # the published code computes 1000 t in t's precision
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(t.dtype)
        out: Tensor = self.out_layer(F.silu(self.in_layer(sinusoid.to(self.in_layer.weight.dtype))))
        return out


class Modulation(nn.Module):
    """Map the condition vector (B, hidden) to `sets` triples (shift, scale, gate), each (B, 1, hidden)."""

    def __init__(self, hidden: int, sets: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden, 3 * sets * hidden, bias=False)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """Return the 3 * sets modulation tensors for vec (B, hidden)."""
        return tuple(self.lin(F.silu(vec))[:, None, :].chunk(self.lin.out_features // vec.shape[-1], dim=-1))


class HeadNorm(nn.Module):
    """RMS norm over the head vector, computed in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., head size)."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return normed.to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """One norm for queries and one for keys."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_norm = HeadNorm(size)
        self.key_norm = HeadNorm(size)


class SelfAttention(nn.Module):
    """Projections of a sequential block's attention. Rows of `qkv`: all q heads, all k heads, all v heads."""

    def __init__(self, hidden: int, layer: LayerSpec) -> None:
        super().__init__()
        self.layer = layer
        self.qkv = nn.Linear(hidden, (layer.heads + 2 * layer.kv_heads) * layer.head_dim, bias=False)
        self.norm = QKNorm(layer.head_dim)
        self.proj = nn.Linear(layer.heads * layer.head_dim, hidden, bias=False)


class SequentialBlock(nn.Module):
    """Attention, then an MLP, each modulated and gated (the image branch of FLUX's double block)."""

    def __init__(self, hidden: int, mlp_ratio: float, layer: LayerSpec) -> None:
        super().__init__()
        inner = int(hidden * mlp_ratio)
        self.img_attn = SelfAttention(hidden, layer)
        self.img_mlp = nn.Sequential(
            nn.Linear(hidden, 2 * inner, bias=False), SwiGLU(), nn.Linear(inner, hidden, bias=False)
        )

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        rotary: Rotary | None,
        prefix: LayerKV | None,
        valid: Tensor | None,
    ) -> Tensor:
        """Process x (B N, T, hidden); return the same shape.

        modulation: six tensors (B N, 1, hidden); prefix: this layer's K and V for B rows; valid: bool (B, P) or None.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        attention = self.img_attn
        q, k, v = _heads(attention.qkv(_modulated(x, shift, scale)), attention.layer, attention.norm, rotary)
        x = x + gate * attention.proj(joint_attention(q, k, v, prefix, valid))
        out: Tensor = x + gate_mlp * self.img_mlp(_modulated(x, shift_mlp, scale_mlp))
        return out


class ParallelBlock(nn.Module):
    """Attention and MLP from one fused projection (FLUX's single block).

    Rows of `linear1`: q, k, v, then the gate half and the up half of the MLP.
    """

    def __init__(self, hidden: int, mlp_ratio: float, layer: LayerSpec) -> None:
        super().__init__()
        self.layer = layer
        self.inner = int(hidden * mlp_ratio)
        self.attention_rows = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
        self.linear1 = nn.Linear(hidden, self.attention_rows + 2 * self.inner, bias=False)
        self.linear2 = nn.Linear(layer.heads * layer.head_dim + self.inner, hidden, bias=False)
        self.norm = QKNorm(layer.head_dim)
        self.mlp = SwiGLU()

    def forward(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        rotary: Rotary | None,
        prefix: LayerKV | None,
        valid: Tensor | None,
    ) -> Tensor:
        """Process x (B N, T, hidden); return the same shape.

        modulation: three tensors (B N, 1, hidden); prefix: this layer's K and V for B rows; valid: bool (B, P) or None.
        """
        shift, scale, gate = modulation
        fused = self.linear1(_modulated(x, shift, scale))
        qkv, mlp = torch.split(fused, [self.attention_rows, 2 * self.inner], dim=-1)
        q, k, v = _heads(qkv, self.layer, self.norm, rotary)
        attended = joint_attention(q, k, v, prefix, valid)
        out: Tensor = x + gate * self.linear2(torch.cat([attended, self.mlp(mlp)], dim=-1))
        return out


class SwiGLU(nn.Module):
    """SiLU of the first half times the second half."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., 2 n) to (..., n)."""
        first, second = x.chunk(2, dim=-1)
        return F.silu(first) * second


class Head(nn.Module):
    """A modulated layer norm and a linear map. The modulation's halves are shift, then scale."""

    def __init__(self, hidden: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, out, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden, bias=False))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """Map x (B, T, hidden) to (B, T, out), modulated by vec (B, hidden)."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        out: Tensor = self.linear(_modulated(x, shift, scale))
        return out


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def _heads(qkv: Tensor, layer: LayerSpec, norm: QKNorm, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into q, k, v heads (B N, T, H, D); normalize and rotate q and k."""
    sizes = [n * layer.head_dim for n in (layer.heads, layer.kv_heads, layer.kv_heads)]
    parts = torch.split(qkv, sizes, dim=-1)
    q, k, v = (part.reshape(*part.shape[:-1], -1, layer.head_dim) for part in parts)
    q, k = norm.query_norm(q), norm.key_norm(k)
    return (rotary(q), rotary(k), v) if rotary is not None else (q, k, v)
