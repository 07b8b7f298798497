"""The codec `fp8`: e4m3 numbers with one scale per row and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.prefix.kv import LayerKV
from imagewam_cli.prefix.spec import LayerSpec, RopeSpec

_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Float8Codec:
    """Stores e4m3 numbers (3 bits of mantissa) and, per row and head, a float32 scale: the largest magnitude / 448."""

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
            # a head of zeros has scale 0: avoid dividing by it
            stored[name] = (x / torch.where(scale > 0, scale, 1.0)[:, None, :, None]).to(torch.float8_e4m3fn)
        return stored

    def decode(self, stored: Mapping[str, Tensor], layer: LayerSpec, *, rope: RopeSpec | None = None) -> LayerKV:
        k, v = (_from_e4m3(stored[n]).mul_(stored[f"{n}.scale"][:, None, :, None]) for n in ("k", "v"))
        return LayerKV(k, v)


def _from_e4m3(x: Tensor) -> Tensor:
    """Convert finite e4m3 numbers to float32, many times faster than torch does on a CPU.

    e4m3 has 4 bits of exponent (bias 7) and 3 of mantissa; float16 has 5 (bias 15) and 10. Shifted left by 7, the bits
    of an e4m3 number become a float16 that is 2^8 times smaller, once the copy of the sign in bit 14 is cleared.
    """
    bits = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(2.0**8)


FLOAT8 = Float8Codec()
