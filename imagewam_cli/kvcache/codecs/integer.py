"""Codecs `int8` and `int4`, with 8 and 4 bits per number.

Each number is quantized uniformly between the minimum and maximum of its group. Keys are grouped by channel, over
neighboring tokens, since a few channels of K are large in every token; values by token, over neighboring channels
(KIVI, arXiv 2402.02750). Rotary keys are stored as they were before rotation, which would mix each channel with its
neighbor by a different angle per token (KVQuant, arXiv 2401.18079), and are rotated again when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.positions import layer_ids, rotate_keys, unrotate
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec


@dataclass(frozen=True)
class GroupedIntegerCodec:
    """Stores q = round((x - low) / step), step = (high - low) / (2^bits - 1), with float16 `low` and `step` per group.

    The error of a number is at most half a step, plus the rounding of `low` and `step` to 11 bits.
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
        self._scale(k, stored["k.step"], stored["k.low"], 1)
        self._scale(v.flatten(2), stored["v.step"], stored["v.low"], 2)
        ids = _ids(layer, rope)
        return LayerKV(k if ids is None or rope is None else rotate_keys(k, ids, rope), v)

    def _scale(self, q: Tensor, step: Tensor, low: Tensor, axis: int) -> None:
        """Turn integers into x, in place. step, low: one number for each group along the axis."""
        step, low = step.float(), low.float()
        for i in range(step.shape[axis]):
            first = i * self.group
            members = q.narrow(axis, first, min(self.group, q.shape[axis] - first))
            members.mul_(step.narrow(axis, i, 1)).add_(low.narrow(axis, i, 1))

    def _numbers(self, x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize x (N, A, ...), grouped along A, into integers of its shape, and `low` and `step`, (N, groups, ...).

        counted: bool, broadcast to x; numbers where it is False do not affect their group's range.
        """
        for_min = x if counted is None else x.masked_fill(~counted, torch.inf)
        for_max = x if counted is None else x.masked_fill(~counted, -torch.inf)
        groups = range(0, x.shape[1], self.group)
        low = torch.stack([for_min[:, i : i + self.group].amin(1) for i in groups], 1)
        high = torch.stack([for_max[:, i : i + self.group].amax(1) for i in groups], 1)
        nothing = low > high  # a group of padding
        low = low.masked_fill(nothing, 0).half()
        step = ((high.masked_fill(nothing, 0) - low.float()) / (2**self.bits - 1)).half()
        lows, spans = low.float(), torch.where(step > 0, step.float(), 1.0)
        q = torch.empty_like(x, dtype=torch.uint8)
        for group, i in enumerate(groups):
            members = x[:, i : i + self.group] - lows[:, group, None]
            members.div_(spans[:, group, None]).round_().clamp_(0, 2**self.bits - 1)
            q[:, i : i + self.group] = members
        return q, low, step

    def _packed(self, q: Tensor) -> Tensor:
        """Pack two 4-bit numbers into a byte, the first in the lower half."""
        return q if self.bits == 8 else q[..., 0::2] | (q[..., 1::2] << 4)

    def _unpacked(self, stored: Tensor) -> Tensor:
        if self.bits == 8:
            return stored.float()
        pairs = stored.to(torch.int16)  # little-endian: the lower byte comes first
        return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8).float()


def _ids(layer: LayerSpec, rope: RopeSpec | None) -> Tensor | None:
    """Return rotary ids of the layer's tokens; None if keys are not rotated or the positions are unknown."""
    return None if rope is None else layer_ids(layer)


INT8 = GroupedIntegerCodec("int8", 8)
INT4 = GroupedIntegerCodec("int4", 4)
