"""Encode dataset rows into the tensors of a shard, with an editor and a codec."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from imagewam_cli.data.instructions import warn_of_identifiers
from imagewam_cli.data.samples import Samples
from imagewam_cli.data.types import Dataset, Row
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.codecs.contract import Codec, all_finite
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec, LayerSpec

_SAMPLED = (8, 24, 40, 56)
"""Positions of the rows that the samples file keeps, with their pictures."""


def encode_rows(
    editor: Editor, codec: Codec, rows: Sequence[Row], numbers: Mapping[str, int], *, by_instruction: bool = False
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Encode rows. Returns their index columns, and their tensors named as in `stored_parts`.

    numbers: index of each instruction. by_instruction: return the tensors stored once per instruction, instead of those
    stored for each row.

    Raises:
        CacheError: the prefix does not match the editor's layout, or its values do not fit the codec.
    """
    prefix = editor.encode([r.images for r in rows], [r.instruction for r in rows])
    check_prefix(prefix, editor.spec, len(rows))
    tensors = stored_tensors(prefix, editor.spec, codec, by_instruction=by_instruction)
    index = {
        "row": [r.row for r in rows],
        "episode": [r.episode for r in rows],
        "frame": [r.frame for r in rows],
        "instruction": [numbers[r.instruction] for r in rows],
        "variant": [r.variant for r in rows],
    }
    return index, tensors


def stored_tensors(prefix: PrefixKV, spec: KVSpec, codec: Codec, *, by_instruction: bool = False) -> dict[str, Tensor]:
    """Encode a prefix into tensors on the CPU, named as in `stored_parts`.

    Raises:
        CacheError: the prefix has values that do not fit the codec.
    """
    tensors: dict[str, Tensor] = {}
    for i, (kv, layer) in enumerate(zip(prefix.layers, spec.layers, strict=True)):
        if layer.by_instruction != by_instruction:
            continue
        stored = codec.encode(kv, layer, rope=spec.rope, valid=prefix.valid)
        _require_representable(stored, kv, layer, codec)
        tensors |= {f"layer.{i}.{name}": tensor.cpu() for name, tensor in stored.items()}
    if spec.valid_tokens and spec.valid_by_instruction == by_instruction:
        all_valid = torch.ones(prefix.batch, spec.valid_tokens, dtype=torch.bool)
        tensors["valid"] = all_valid if prefix.valid is None else prefix.valid.cpu()
    return tensors


def _require_representable(stored: Mapping[str, Tensor], kv: LayerKV, layer: LayerSpec, codec: Codec) -> None:
    """Raise CacheError if encoding made a number infinite."""
    # values beyond the range of a narrow float type become infinite
    for tensor in stored.values():
        if tensor.is_floating_point() and not all_finite(tensor):
            largest = max(float(x.abs().max()) for x in (kv.k, kv.v))
            raise CacheError(
                f"layer {layer.name}: numbers up to {largest:.3g} do not fit {codec.name}",
                "choose another --codec and another --out",
            )


def check_prefix(prefix: PrefixKV, spec: KVSpec, rows: int) -> None:
    """Check a prefix against the editor's layout, before it is stored or trained on.

    Raises:
        CacheError: a shape differs, or a value is not finite. The message names the layer and both shapes.
    """
    if len(prefix.layers) != len(spec.layers):
        raise CacheError(f"the editor returned {len(prefix.layers)} layers, but its spec declares {len(spec.layers)}")
    for kv, layer in zip(prefix.layers, spec.layers, strict=True):
        expected = (rows, layer.tokens, layer.kv_heads, layer.head_dim)
        for part, values in (("K", kv.k), ("V", kv.v)):
            given = tuple(values.shape)
            if given != expected:
                raise CacheError(
                    f"layer {layer.name}: the editor returned {part} of shape {given}, "
                    f"but its spec declares {expected}",
                    "load the editor with the dataset's instructions" if layer.holds_text else None,
                )
            if not all_finite(values):
                raise CacheError(f"layer {layer.name}: the editor returned {part} with values that are not finite")
    if prefix.valid is not None and tuple(prefix.valid.shape) != (rows, spec.valid_tokens):
        raise CacheError(
            f"the editor returned `valid` of shape {tuple(prefix.valid.shape)}, "
            f"but its spec declares {(rows, spec.valid_tokens)}"
        )


def batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Group consecutive rows into lists of `size`; the last may be shorter."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def instructions_of(dataset: Dataset) -> tuple[str, ...]:
    """Return the distinct instructions, in order of appearance. Warn of those that look like names."""
    instructions = tuple(dict.fromkeys(row.instruction for row in dataset.rows(images=False)))
    warn_of_identifiers(instructions, dataset.info.root)
    return instructions


def instruction_rows(dataset: Dataset) -> Iterator[Row]:
    """Yield the first row of each distinct instruction, in order of appearance."""
    first: dict[str, Row] = {}
    for row in dataset.rows(images=False):
        first.setdefault(row.instruction, row)
    wanted = {row.row for row in first.values()}
    episodes = list(dict.fromkeys(row.episode for row in first.values()))
    # One stream for all rows: a stream per row would decode each video from its beginning. The stride is the largest
    # that reaches every wanted frame, because pictures of skipped frames are not made.
    stride = math.gcd(*(row.frame for row in first.values())) or max(e.length for e in dataset.episodes())
    rows = (row for row in dataset.rows(episodes=episodes, stride=stride) if row.row in wanted)
    return islice(rows, len(wanted))


def samples_bytes(dataset: Dataset, stride: int) -> bytes:
    """Return the content of the samples file: a few of the first rows, with their pictures."""
    first = list(islice(dataset.rows(stride=stride), _SAMPLED[-1] + 1))
    return Samples.from_rows([first[i] for i in _SAMPLED if i < len(first)] or first[-1:]).to_bytes()
