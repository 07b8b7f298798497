"""How keys and values are stored: the contract of a codec, and the codecs that cast.

A codec turns K and V of one layer into a few tensors and back. It knows nothing of files, and each row is encoded by
itself, so that a row has the same bytes in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from imagewam_cli.capture import LayerKV
from imagewam_cli.editor import PrefixKV
from imagewam_cli.kvcache.spec import KVSpec, LayerSpec, RopeSpec


@dataclass(frozen=True)
class Part:
    """A tensor that is stored for each row: its shape without the rows, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return prod(self.shape) * self.dtype.itemsize


class Codec(Protocol):
    """encode and decode work on K and V of one layer, (N, P, H_kv, D). Both run wherever their tensors are."""

    @property
    def name(self) -> str:
        """As the manifest and --codec have it."""
        ...

    def parts(self, layer: LayerSpec) -> Mapping[str, Part]:
        """What is stored of a layer, by names of the codec's own."""
        ...

    def encode(
        self, kv: LayerKV, layer: LayerSpec, *, rope: RopeSpec | None = None, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The tensors that `parts` names, with the rows in front.

        rope: how the editor rotated the keys; valid: bool (N, P), False where a token is padding and holds zeros,
        which is not to be looked at. Numbers that cannot be held become infinite or NaN in a floating tensor.
        """
        ...

    def decode(self, stored: Mapping[str, Tensor], layer: LayerSpec, *, rope: RopeSpec | None = None) -> LayerKV:
        """float32 keys and values. stored: each row's numbers are in one piece, the rows may stand apart."""
        ...


@runtime_checkable
class LearnedCodec(Codec, Protocol):
    """A codec that is fitted to rows of the cache's own before the first is stored. Its `parts` are known before."""

    def fitted(self, spec: KVSpec, samples: Sequence[PrefixKV]) -> LearnedCodec:
        """One that can encode. samples: prefixes of rows from all over the dataset, on the CPU, in batches; the same
        samples give the same codec."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it learned, for a file."""
        ...

    def restored(self, spec: KVSpec, state: Mapping[str, Tensor]) -> LearnedCodec:
        """The one that had this state."""
        ...


@dataclass(frozen=True)
class CastCodec:
    """Stores every number in another float type: exact for `fp32`, rounded to nearest for the others."""

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


PLACE = "instruction.place"
"""(N,) int64: which of the instructions that are stored beside them the rows have."""


def all_finite(x: Tensor) -> bool:
    """Whether every number is: NaN or an infinity would be the least or the greatest, found in one pass."""
    if x.dtype == torch.float8_e4m3fn:  # its only other numbers are NaN, all ones behind the sign
        return bool((x.view(torch.uint8) & 0x7F).max() < 0x7F)
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def stored_parts(spec: KVSpec, codec: Codec, *, by_instruction: bool = False) -> dict[str, Part]:
    """The tensors of a shard behind its index, by name. by_instruction: of the shard that has a row per instruction."""
    parts = {
        f"layer.{i}.{name}": part
        for i, layer in enumerate(spec.layers)
        if layer.by_instruction == by_instruction
        for name, part in codec.parts(layer).items()
    }
    if spec.valid_tokens and spec.valid_by_instruction == by_instruction:
        parts["valid"] = Part((spec.valid_tokens,), torch.bool)
    return parts


def decode_prefix(stored: Mapping[str, Tensor], spec: KVSpec, codec: Codec) -> PrefixKV:
    """float32 K and V of tensors as `stored_parts` names them; those of instructions come with `PLACE`."""
    layers: list[LayerKV] = []
    for i, layer in enumerate(spec.layers):
        kv = codec.decode({name: stored[f"layer.{i}.{name}"] for name in codec.parts(layer)}, layer, rope=spec.rope)
        layers.append(LayerKV(kv.k[stored[PLACE]], kv.v[stored[PLACE]]) if layer.by_instruction else kv)
    valid = stored.get("valid")
    return PrefixKV(tuple(layers), valid[stored[PLACE]] if valid is not None and spec.valid_by_instruction else valid)
