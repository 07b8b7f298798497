"""Dataset rows through an editor and a codec, into the tensors of a shard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from imagewam_cli.data.samples import Samples
from imagewam_cli.data.types import Dataset, Row
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.codecs.contract import Codec, all_finite
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec, LayerSpec

_SAMPLED = (8, 24, 40, 56)
"""Which of the first rows are kept with their pictures."""


def encode_rows(
    editor: Editor, codec: Codec, rows: Sequence[Row], numbers: Mapping[str, int], *, by_instruction: bool = False
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """The index columns of these rows, and their tensors as `stored_parts` names them. numbers: of the instructions;
    by_instruction: the tensors that are stored once for each of these.

    Raises:
        CacheError: the editor does not keep to its layout, or the codec cannot hold its numbers.
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
    """The prefix as `stored_parts` names its tensors, on the CPU.

    Raises:
        CacheError: the codec cannot hold its numbers.
    """
    tensors: dict[str, Tensor] = {}
    for i, (kv, layer) in enumerate(zip(prefix.layers, spec.layers, strict=True)):
        if layer.by_instruction != by_instruction:
            continue
        stored = codec.encode(kv, layer, rope=spec.rope, valid=prefix.valid)
        _require_held(stored, kv, layer, codec)
        tensors |= {f"layer.{i}.{name}": tensor.cpu() for name, tensor in stored.items()}
    if spec.valid_tokens and spec.valid_by_instruction == by_instruction:
        everywhere = torch.ones(prefix.batch, spec.valid_tokens, dtype=torch.bool)
        tensors["valid"] = everywhere if prefix.valid is None else prefix.valid.cpu()
    return tensors


def _require_held(stored: Mapping[str, Tensor], kv: LayerKV, layer: LayerSpec, codec: Codec) -> None:
    for tensor in stored.values():
        if tensor.is_floating_point() and not all_finite(tensor):
            greatest = max(float(x.abs().max()) for x in (kv.k, kv.v))
            raise CacheError(
                f"layer {layer.name}: numbers up to {greatest:.3g} do not fit {codec.name}",
                "store them with another --codec, in another folder",
            )


def check_prefix(prefix: PrefixKV, spec: KVSpec, rows: int) -> None:
    """Stop an editor that does not keep to its own layout, before it fills a disk or a model learns from it.

    Raises:
        CacheError: names the layer, what was given and what the layout says.
    """
    if len(prefix.layers) != len(spec.layers):
        raise CacheError(f"the editor gave {len(prefix.layers)} layers, its spec says {len(spec.layers)}")
    for kv, layer in zip(prefix.layers, spec.layers, strict=True):
        expected = (rows, layer.tokens, layer.kv_heads, layer.head_dim)
        for part, values in (("K", kv.k), ("V", kv.v)):
            given = tuple(values.shape)
            if given != expected:
                raise CacheError(f"layer {layer.name}: the editor gave {part} of {given}, its spec says {expected}")
            if not all_finite(values):
                raise CacheError(f"layer {layer.name}: the editor gave {part} with numbers that are not finite")
    if prefix.valid is not None and tuple(prefix.valid.shape) != (rows, spec.valid_tokens):
        raise CacheError(
            f"the editor gave `valid` of {tuple(prefix.valid.shape)}, its spec says {(rows, spec.valid_tokens)}"
        )


def batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows, `size` at a time."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def instructions_of(dataset: Dataset) -> tuple[str, ...]:
    """The distinct instructions, in order of appearance."""
    return tuple(dict.fromkeys(row.instruction for row in dataset.rows(images=False)))


def instruction_rows(dataset: Dataset) -> Iterator[Row]:
    """The first row that each distinct instruction is given with, in order of appearance."""
    first: dict[str, Row] = {}
    for row in dataset.rows(images=False):
        first.setdefault(row.instruction, row)
    wanted = {row.row for row in first.values()}
    episodes = list(dict.fromkeys(row.episode for row in first.values()))
    # one stream, as each would decode a video from its beginning; frames that the stride leaves out become no pictures
    stride = math.gcd(*(row.frame for row in first.values())) or max(e.length for e in dataset.episodes())
    rows = (row for row in dataset.rows(episodes=episodes, stride=stride) if row.row in wanted)
    return islice(rows, len(wanted))


def samples_bytes(dataset: Dataset, stride: int) -> bytes:
    """The file of samples: a few of the first rows, with their pictures."""
    first = list(islice(dataset.rows(stride=stride), _SAMPLED[-1] + 1))
    return Samples.of([first[i] for i in _SAMPLED if i < len(first)] or first[-1:]).to_bytes()
