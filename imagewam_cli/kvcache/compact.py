"""Codecs of 8 and 4 bits a number.

`int8`, `int4`: whole numbers between the least and the greatest of a group. Keys are grouped by channel, over
neighbouring tokens, since a few channels of K are large in every token; values by token, over neighbouring channels
(KIVI, arXiv 2402.02750). Rotary keys are stored as they were before rotation, which mixes each channel with its
neighbour by another angle in every token (KVQuant, arXiv 2401.18079), and are rotated again when they are read. `fp8`:
e4m3 with one scale for each row and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from imagewam_cli.capture import LayerKV
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.codec import Part
from imagewam_cli.kvcache.positions import layer_ids, rotate_keys, unrotate
from imagewam_cli.kvcache.spec import LayerSpec, RopeSpec

_E4M3_MAX = 448.0


@dataclass(frozen=True)
class GroupedIntegers:
    """q = round((x - low) / step), step = (high - low) / (2^bits - 1), with `low` and `step` of a group in float16.

    The error of a number is at most half a step, and what rounding `low` and `step` to 11 bits adds.
    """

    name: str
    bits: Literal[4, 8]
    group: int = 64

    def parts(self, layer: LayerSpec) -> dict[str, Part]:
        tokens, heads, size = layer.tokens, layer.kv_heads, layer.head_dim
        if size * self.bits % 8:
            raise CacheError(f"{self.name} packs pairs of numbers, layer {layer.name} has heads of {size}", "use int8")
        packed = Part((tokens, heads, size * self.bits // 8), torch.uint8)
        k_groups = Part((-(-tokens // self.group), heads, size), torch.float16)
        v_groups = Part((tokens, -(-heads * size // self.group)), torch.float16)
        return {"k": packed, "k.low": k_groups, "k.step": k_groups, "v": packed, "v.low": v_groups, "v.step": v_groups}

    def encode(
        self, kv: LayerKV, layer: LayerSpec, *, rope: RopeSpec | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        counted = None if valid is None or not layer.holds_text else valid[:, :, None, None]
        ids = _ids(layer, rope)
        still = kv.k.float() if ids is None or rope is None else unrotate(kv.k, ids, rope)
        k, k_low, k_step = self._numbers(still, counted)
        v, v_low, v_step = self._numbers(kv.v.float().flatten(2).transpose(1, 2), None)
        return {
            "k": self._packed(k),
            "k.low": k_low,
            "k.step": k_step,
            "v": self._packed(v.transpose(1, 2).reshape(kv.v.shape)),
            "v.low": v_low.transpose(1, 2),
            "v.step": v_step.transpose(1, 2),
        }

    def decode(self, stored: Mapping[str, Tensor], layer: LayerSpec, *, rope: RopeSpec | None = None) -> LayerKV:
        k, v = self._unpacked(stored["k"]), self._unpacked(stored["v"])
        k = k * self._spread(stored["k.step"], 1, k.shape[1]) + self._spread(stored["k.low"], 1, k.shape[1])
        ids = _ids(layer, rope)
        if ids is not None and rope is not None:
            k = rotate_keys(k, ids, rope)
        flat = v.flatten(2)
        channels = flat.shape[2]
        flat = flat * self._spread(stored["v.step"], 2, channels) + self._spread(stored["v.low"], 2, channels)
        return LayerKV(k, flat.reshape(v.shape))

    def _numbers(self, x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, A, ...), grouped along A -> whole numbers of its shape, `low` and `step` (N, groups, ...).

        counted: bool, as x or broadcast; what is not counted does not widen a group.
        """
        least = x if counted is None else x.masked_fill(~counted, torch.inf)
        greatest = x if counted is None else x.masked_fill(~counted, -torch.inf)
        low = self._groups(least, torch.inf).amin(2)
        high = self._groups(greatest, -torch.inf).amax(2)
        nothing = low > high  # a group of padding
        low = low.masked_fill(nothing, 0).half()
        step = ((high.masked_fill(nothing, 0) - low.float()) / (2**self.bits - 1)).half()
        span = self._spread(step, 1, x.shape[1])
        q = (x - self._spread(low, 1, x.shape[1])) / torch.where(span > 0, span, 1.0)
        return q.round().clamp(0, 2**self.bits - 1).to(torch.uint8), low, step

    def _groups(self, x: Tensor, fill: float) -> Tensor:
        """(N, A, ...) -> (N, groups, group, ...)."""
        missing = -x.shape[1] % self.group
        if missing:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing), value=fill)
        return x.reshape(x.shape[0], -1, self.group, *x.shape[2:])

    def _spread(self, x: Tensor, axis: int, count: int) -> Tensor:
        """One number for each of a group's members, float32."""
        return x.float().repeat_interleave(self.group, axis).narrow(axis, 0, count)

    def _packed(self, q: Tensor) -> Tensor:
        """Two numbers of 4 bits in a byte, the first in the lower half."""
        return q if self.bits == 8 else q[..., 0::2] | (q[..., 1::2] << 4)

    def _unpacked(self, stored: Tensor) -> Tensor:
        if self.bits == 8:
            return stored.float()
        return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2).float()


def _ids(layer: LayerSpec, rope: RopeSpec | None) -> Tensor | None:
    """Rotary ids of the layer's tokens; None where keys are not rotated, or the layout does not tell them."""
    return None if rope is None else layer_ids(layer)


@dataclass(frozen=True)
class ScaledFloat8:
    """e4m3 numbers (3 bits of mantissa) times a float32 scale, the greatest magnitude of a row's head over 448."""

    name: str = "fp8"

    def parts(self, layer: LayerSpec) -> dict[str, Part]:
        numbers = Part((layer.tokens, layer.kv_heads, layer.head_dim), torch.float8_e4m3fn)
        scales = Part((layer.kv_heads,), torch.float32)
        return {"k": numbers, "k.scale": scales, "v": numbers, "v.scale": scales}

    def encode(
        self, kv: LayerKV, layer: LayerSpec, *, rope: RopeSpec | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, x in (("k", kv.k.float()), ("v", kv.v.float())):
            scale = x.abs().amax(dim=(1, 3)) / _E4M3_MAX
            stored[f"{name}.scale"] = scale
            stored[name] = (x / torch.where(scale > 0, scale, 1.0)[:, None, :, None]).to(torch.float8_e4m3fn)
        return stored

    def decode(self, stored: Mapping[str, Tensor], layer: LayerSpec, *, rope: RopeSpec | None = None) -> LayerKV:
        k, v = (stored[n].float() * stored[f"{n}.scale"][:, None, :, None] for n in ("k", "v"))
        return LayerKV(k, v)


INT8 = GroupedIntegers("int8", 8)
INT4 = GroupedIntegers("int4", 4)
FLOAT8 = ScaledFloat8()
