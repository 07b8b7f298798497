"""Test that layers that depend only on the instruction are stored once per instruction."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imagewam_cli.cache_study import row_cost
from imagewam_cli.cli.app import run
from imagewam_cli.cli.plan import choices_within
from imagewam_cli.data.types import Row, UInt8Image
from imagewam_cli.errors import CacheError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.encoding import instruction_rows
from imagewam_cli.kvcache.building.merge import merge_cache
from imagewam_cli.kvcache.building.shard_plan import bytes_per_row, plan_build
from imagewam_cli.kvcache.building.verify import repair_cache, verify_cache
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.codecs.contract import Codec
from imagewam_cli.kvcache.codecs.integer import INT8
from imagewam_cli.kvcache.codecs.prefix import decode_prefix
from imagewam_cli.kvcache.format.manifest import INSTRUCTIONS, SHARDS, BuildPart
from imagewam_cli.kvcache.format.shard import INDEX_KEYS
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, SegmentSpec
from imagewam_cli.registry import Registry
from tests.support.arithmetic_cache import LENGTHS, SETTINGS
from tests.support.arithmetic_editor import (
    HEAD_DIM,
    HEADS,
    REFERENCE,
    TEXT,
    ArithmeticEditor,
    MemoryDataset,
    numbers,
    seen,
)
from tests.support.faults import flip
from tests.support.folders import files

BLANK = np.zeros((4, 4, 3), np.uint8)


class CrossAttention(ArithmeticEditor):
    """An editor whose first layer holds the image and whose second layer holds the text."""

    @property
    def spec(self) -> KVSpec:
        first, second = super().spec.layers
        picture = dataclasses.replace(first, segments=(SegmentSpec(name="reference", tokens=REFERENCE),))
        text = dataclasses.replace(second, segments=(SegmentSpec(name="text", tokens=TEXT),), by_instruction=True)
        return dataclasses.replace(super().spec, layers=(picture, text))

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        self.encoded += len(images)
        rows = [one(row["top"], text) for row, text in zip(images, instructions, strict=True)]
        layers = tuple(
            LayerKV(torch.cat([row[i].k for row in rows]), torch.cat([row[i].v for row in rows])) for i in range(2)
        )
        return PrefixKV(layers, torch.from_numpy(np.stack([seen(text)[:TEXT] for text in instructions])))


def one(picture: UInt8Image, instruction: str) -> tuple[LayerKV, LayerKV]:
    """Both layers of one row."""
    of_picture = numbers(picture, instruction, 0)
    of_text = numbers(BLANK, instruction, 1)
    return (
        LayerKV(*(torch.from_numpy(x[None, TEXT:]) for x in of_picture)),
        LayerKV(*(torch.from_numpy(x[None, :TEXT]) for x in of_text)),
    )


def build(out: Path, codec: Codec = FLOAT32, part: BuildPart | None = None) -> CrossAttention:
    editor, settings = CrossAttention(), dataclasses.replace(SETTINGS, part=part)
    build_cache(MemoryDataset(LENGTHS), editor, out, codec, settings)
    return editor


def test_rows_are_read_back_completely(tmp_path: Path) -> None:
    """fp32 is exact in any row order, whether rows of one instruction are adjacent or not."""
    editor, reader = build(tmp_path / "c"), CacheReader(tmp_path / "c")
    rows = list(MemoryDataset(LENGTHS).rows(stride=SETTINGS.stride))
    order = np.random.default_rng(0).permutation(len(rows))
    found = reader.read(order)
    expected = editor.encode([rows[i].images for i in order], [rows[i].instruction for i in order])
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)
    assert found.valid is not None
    assert expected.valid is not None
    assert torch.equal(found.valid, expected.valid)


class TextAlone(CrossAttention):
    """An editor with only text layers, like a UNet with `--segments text`, which stores no tensors per row."""

    @property
    def spec(self) -> KVSpec:
        return dataclasses.replace(super().spec, layers=super().spec.layers[1:])

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        whole = super().encode(images, instructions)
        return PrefixKV(whole.layers[1:], whole.valid)


@pytest.mark.parametrize("method", ["mmap", "read"])
def test_rows_without_stored_tensors_are_read_back(tmp_path: Path, method: Any) -> None:
    editor = TextAlone()
    build_cache(MemoryDataset(LENGTHS), editor, tmp_path, FLOAT32, SETTINGS)
    assert verify_cache(tmp_path) == []
    rows = list(MemoryDataset(LENGTHS).rows(stride=SETTINGS.stride))
    found = CacheReader(tmp_path, method).read(np.arange(len(rows)))
    expected = editor.encode([row.images for row in rows], [row.instruction for row in rows])
    assert len(found.layers) == 1
    assert torch.equal(found.layers[0].k, expected.layers[0].k)


def test_row_bytes_are_those_of_the_image_alone(tmp_path: Path) -> None:
    """Compute the size by hand.

    A row has K and V of 4 tokens, 2 heads and 4 numbers of 4 bytes, and 48 bytes of index. An instruction has 8 tokens
    and their `valid`.
    """
    build(tmp_path)
    spec = CrossAttention().spec
    assert bytes_per_row(spec, FLOAT32) == 2 * REFERENCE * HEADS * HEAD_DIM * 4 + 48
    once = load_file(tmp_path / SHARDS / INSTRUCTIONS)
    count = len(once["instruction"])
    assert count == len({row.instruction for row in MemoryDataset(LENGTHS).rows()})
    assert set(once) == {*INDEX_KEYS, "checksum", "valid", "layer.1.k", "layer.1.v"}
    assert set(load_file(tmp_path / SHARDS / "shard-00000.safetensors")) & {"valid", "layer.1.k"} == set()
    plan = plan_build(MemoryDataset(LENGTHS), spec, FLOAT32, SETTINGS)
    assert plan.instruction_bytes == count * (2 * TEXT * HEADS * HEAD_DIM * 4 + TEXT + 48)
    assert plan.total_bytes == 15 * plan.bytes_per_row + plan.instruction_bytes


def test_a_damaged_file_of_instructions_is_found_refused_repaired_and_rebuilt(tmp_path: Path) -> None:
    build(tmp_path, INT8)
    before, path = files(tmp_path), tmp_path / SHARDS / INSTRUCTIONS
    flip(path, len(path.read_bytes()) - 1)
    (damage,) = verify_cache(tmp_path)
    assert damage.file == f"{SHARDS}/{INSTRUCTIONS}"
    with pytest.raises(CacheError, match="differ from their checksums"):
        CacheReader(tmp_path).read(np.arange(15))
    assert repair_cache(tmp_path, [damage], MemoryDataset(LENGTHS), CrossAttention()) == []
    assert files(tmp_path) == before
    path.unlink()
    assert build(tmp_path, INT8).encoded == len(load_file(path)["row"])
    assert files(tmp_path) == before


def test_parts_share_the_file_of_instructions(tmp_path: Path) -> None:
    """Each part writes the same file; an unfinished part does not prevent reading the other."""
    build(tmp_path / "whole")
    for i in range(2):
        build(tmp_path / "parts", part=BuildPart(index=i, count=2))
    assert len(CacheReader(tmp_path / "parts")) == 15
    merge_cache(tmp_path / "parts")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_without_the_file_of_instructions_nothing_is_read(tmp_path: Path) -> None:
    build(tmp_path / "a")
    (tmp_path / "a" / SHARDS / INSTRUCTIONS).unlink()
    with pytest.raises(CacheError, match="is missing"):
        CacheReader(tmp_path / "a").read(np.arange(3))


def test_row_cost_is_measured_on_complete_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoded prefixes of two instructions equal the editor's."""
    decoded: list[PrefixKV] = []
    monkeypatch.setattr(row_cost, "decode_prefix", lambda *given: decoded.append(decode_prefix(*given)))
    rows, editor = list(MemoryDataset(LENGTHS).rows())[3:7], CrossAttention()
    assert len({row.instruction for row in rows}) == 2
    row_cost.measure(editor, [FLOAT32], rows, tmp_path)
    expected = editor.encode([row.images for row in rows], [row.instruction for row in rows])
    for a, b in zip(decoded[0].layers, expected.layers, strict=True):
        times = len(a.k) // len(rows)
        assert torch.equal(a.k, b.k.repeat(times, 1, 1, 1))
        assert torch.equal(a.v, b.v.repeat(times, 1, 1, 1))


def test_one_image_is_read_per_instruction() -> None:
    """All rows are read in one stream: a new stream would decode its video from the beginning."""
    dataset = MemoryDataset((6, 6, 6, 6))
    assert [row.row for row in instruction_rows(dataset)] == [0, 6, 12]
    assert (dataset.streams, dataset.pictures) == ([(0, 1, 2)], 3)


def test_an_instruction_that_begins_within_an_episode_is_found() -> None:
    class Changing(MemoryDataset):
        def rows(self, **given: Any) -> Iterator[Row]:
            for row in super().rows(**given):
                yield dataclasses.replace(row, instruction="first" if row.frame < 4 else "then")

    dataset = Changing((9, 9))
    assert [(row.row, row.instruction) for row in instruction_rows(dataset)] == [(0, "first"), (4, "then")]
    assert dataset.pictures == 2


def test_a_budget_includes_the_file_of_instructions() -> None:
    """Every setting is reported with the bytes that a build with it would plan."""
    dataset, editor = MemoryDataset(LENGTHS), CrossAttention()
    sample = list(dataset.rows())[:4]
    tried = [c for c in choices_within(editor, dataset, SETTINGS.stride, sample, 15, 1e9) if c.layers == "all"]
    assert {"fp32", "int8", "pca1"} <= {choice.codec for choice in tried}
    for choice in tried:
        codec = Registry.installed().codecs.load(choice.codec)
        plan = plan_build(dataset, editor.spec, codec, SETTINGS)
        assert plan.instruction_bytes > 0
        assert (choice.bytes_per_row, choice.total_bytes) == (plan.bytes_per_row, plan.total_bytes)


def test_reported_bytes_include_the_file_of_instructions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path)
    assert run(["info", str(tmp_path), "--format", "json"]) == 0
    reported = json.loads(capsys.readouterr().out)["bytes"]
    assert reported == sum(path.stat().st_size for path in (tmp_path / SHARDS).iterdir())


def test_a_layer_with_an_image_cannot_be_stored_per_instruction() -> None:
    picture = SegmentSpec(name="target", tokens=4, grid=(2, 2))
    with pytest.raises(ValueError, match="holds a picture"):
        LayerSpec(name="a", block="parallel", heads=1, kv_heads=1, head_dim=4, segments=(picture,), by_instruction=True)
