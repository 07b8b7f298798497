"""Whole prefixes through a codec: which tensors a shard stores of them, and how they are read back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec

PLACE = "instruction.place"
"""(N,) int64: which of the instructions that are stored beside them the rows have."""


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
