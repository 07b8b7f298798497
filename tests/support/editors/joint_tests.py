"""Tests that every `JointEditor` must pass; the tests of each editor inherit them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from imagewam_cli.expert.attention import Rotary
from imagewam_cli.prefix.positions import layer_ids
from tests.support.editors.joint_reference import Observer, largest_difference


class JointEditorTests(abc.ABC):
    """Base class for a module with fixtures `folder` and `pipeline`."""

    load: ClassVar[Callable[..., Any]]
    """load(folder, instructions, **settings) -> editor."""
    pictures: ClassVar[Callable[[int], list[Any]]]
    instructions: ClassVar[list[str]]
    grid: ClassVar[tuple[int, int]]
    """Rows and columns of image tokens."""
    text: ClassVar[int]
    """Number of tokens in a padded text."""
    lengths: ClassVar[list[int]]
    """Number of tokens in each trimmed instruction."""

    @abc.abstractmethod
    def step(self, pipeline: Any) -> Observer:
        """Run the pipeline's own first step from pure noise, on the first image and instruction."""

    def test_modes_differ_from_the_second_layer_on(self, folder: Path) -> None:
        """Otherwise a comparison with the pipeline could not tell the modes apart."""
        first = self.instructions[:1]
        seen, unseen = (self.load(folder, mode=m).encode(self.pictures(1), first) for m in ("denoise", "prefix"))
        for i, (a, b) in enumerate(zip(seen.layers, unseen.layers, strict=True)):
            assert a.k.shape == b.k.shape
            # V of the first layer is computed before any attention, so the target cannot affect it.
            assert torch.allclose(a.v, b.v, atol=1e-5) == (i == 0)

    def test_each_segment_is_a_slice_of_the_whole_prefix(self, folder: Path) -> None:
        images, names, start = self.pictures(2), ("text", "target", "reference"), 0
        everything = self.load(folder, mode="denoise", segments=names).encode(images, self.instructions)
        for name in names:
            editor = self.load(folder, mode="denoise", segments=(name,))
            (segment,) = editor.spec.layers[0].segments
            assert segment.name == name
            assert segment.tokens == (self.text if name == "text" else prod(self.grid))
            assert segment.grid == (None if name == "text" else self.grid)
            alone = editor.encode(images, self.instructions)
            for part, kv in zip(alone.layers, everything.layers, strict=True):
                assert torch.equal(part.k, kv.k[:, start : start + segment.tokens])
                assert torch.equal(part.v, kv.v[:, start : start + segment.tokens])
            start += segment.tokens

    @pytest.mark.parametrize("padding", ["keep", "trim"])
    @pytest.mark.parametrize("mode", ["prefix", "denoise"])
    def test_a_batch_equals_its_rows_encoded_alone(self, folder: Path, padding: str, mode: str) -> None:
        images, texts = self.pictures(2), self.instructions
        together = self.load(folder, tuple(texts), mode=mode, text_padding=padding).encode(images, texts)
        assert together.valid is not None
        lengths = self.lengths if padding == "trim" else [self.text] * 2
        assert together.valid[:, : -prod(self.grid)].sum(1).tolist() == lengths
        for i in range(2):
            alone = self.load(folder, mode=mode, text_padding=padding).encode(images[i : i + 1], texts[i : i + 1])
            for a, b in zip(alone.layers, together.layers, strict=True):
                for mine, theirs in ((a.k, b.k), (a.v, b.v)):
                    assert torch.allclose(mine[0], theirs[i][together.valid[i]], atol=1e-5)
                    assert not theirs[i][~together.valid[i]].any()

    def test_trimmed_text_equals_the_pipeline_run_without_padding(self, folder: Path, pipeline: Any) -> None:
        length, picture = self.lengths[0], prod(self.grid)
        editor = self.load(folder, mode="denoise", text_padding="trim")
        prefix, observer = editor.encode(self.pictures(1), self.instructions[:1]), self.step(pipeline)
        inputs = dict(observer.inputs)
        for name, axis in (("encoder_hidden_states", 1), ("txt_ids", 0)):
            inputs[name] = inputs[name].narrow(axis, 0, length)
        with torch.no_grad():
            pipeline.transformer(**inputs)
        tokens = [*range(length), *range(length + picture, length + 2 * picture)]
        assert largest_difference(prefix, observer.layers(), tokens) <= 1e-5

    @pytest.mark.parametrize("padding", ["keep", "trim"])
    @pytest.mark.parametrize("mode", ["prefix", "denoise"])
    def test_position_ids_equal_the_pipelines(self, folder: Path, pipeline: Any, padding: str, mode: str) -> None:
        settings = {"mode": mode, "text_padding": padding}
        if mode == "denoise":
            settings["segments"] = ("text", "target", "reference")
        editor, inputs = self.load(folder, tuple(self.instructions[:1]), **settings), self.step(pipeline).inputs
        text = self.text if padding == "keep" else self.lengths[0]
        pictures = inputs["img_ids"][prod(self.grid) if mode == "prefix" else 0 :]
        expected = torch.cat([inputs["txt_ids"][:text], pictures])
        for layer in editor.spec.layers:
            found = layer_ids(layer)
            assert found is not None
            assert torch.equal(found, expected.float())

    def test_actions_are_rotated_like_the_transformer_rotates_keys(self, folder: Path, pipeline: Any) -> None:
        """Action tokens also use positions that no other token has."""
        rope, observer = self.load(folder).spec.rope, self.step(pipeline)
        assert rope is not None
        ids = torch.tensor([(float(rope.action_ids[0]), float(step), 0.0) for step in range(4)])
        taken = torch.cat([observer.inputs["txt_ids"], observer.inputs["img_ids"]])
        assert not (ids[:, None] == taken[None]).all(-1).any()
        rotation = pipeline.transformer.pos_embed(ids)
        x = torch.randn(1, 4, 2, rotation[0].shape[1])
        mine = Rotary(rope, torch.arange(4))(x)
        assert torch.allclose(mine, apply_rotary_emb(x, rotation, sequence_dim=1), atol=1e-6)
