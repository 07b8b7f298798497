"""Apply a codec to whole prefixes: name the tensors that a shard stores, and decode them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.kvcache.format.part import Part
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec

INSTRUCTION_INDEX = "instruction.index"
"""(N,) int64: for each row, the position of its instruction among the stored instruction rows."""


def stored_parts(spec: KVSpec, codec: Codec, *, by_instruction: bool = False) -> dict[str, Part]:
    """Return the shape and dtype of each tensor that follows the index of a shard, by name.

    by_instruction: those of the shard that has one row per instruction.
    """
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
    """Return float32 K and V of stored tensors. Tensors stored per instruction are expanded by `INSTRUCTION_INDEX`."""
    instruction = stored.get(INSTRUCTION_INDEX)
    layers: list[LayerKV] = []
    for i, layer in enumerate(spec.layers):
        kv = codec.decode({name: stored[f"layer.{i}.{name}"] for name in codec.parts(layer)}, layer, rope=spec.rope)
        layers.append(LayerKV(kv.k[instruction], kv.v[instruction]) if layer.by_instruction else kv)
    valid = stored.get("valid")
    if valid is not None and spec.valid_by_instruction:
        valid = valid[instruction]
    return PrefixKV(tuple(layers), valid)
