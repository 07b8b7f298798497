"""Codecs that cast each number to a float type: `fp32`, `bf16` and `fp16`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec


@dataclass(frozen=True)
class CastCodec:
    """Stores each number as `dtype`: exactly for `fp32`, rounded to nearest for the others."""

    name: str
    dtype: torch.dtype

    def parts(self, layer: LayerSpec) -> dict[str, Part]:
        shape = (layer.tokens, layer.kv_heads, layer.head_dim)
        return {"k": Part(shape, self.dtype), "v": Part(shape, self.dtype)}

    def encode(
        self, kv: LayerKV, layer: LayerSpec, *, rope: RopeSpec | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {"k": kv.k.to(self.dtype), "v": kv.v.to(self.dtype)}

    def decode(self, stored: Mapping[str, Tensor], layer: LayerSpec, *, rope: RopeSpec | None = None) -> LayerKV:
        return LayerKV(stored["k"].to(torch.float32), stored["v"].to(torch.float32))


FLOAT32 = CastCodec("fp32", torch.float32)


BFLOAT16 = CastCodec("bf16", torch.bfloat16)


FLOAT16 = CastCodec("fp16", torch.float16)
