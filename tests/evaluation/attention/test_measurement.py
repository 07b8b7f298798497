"""Test the measurement of a policy's attention over recorded frames, for editors of any layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagewam_cli.cli.tables import attention_table
from imagewam_cli.config import from_dict, to_dict
from imagewam_cli.data.types import Dataset, UInt8Image
from imagewam_cli.errors import UsageError
from imagewam_cli.evaluation.attention.measurement import AttentionResult, evaluate_attention, lift_statistics
from imagewam_cli.evaluation.attention.pictures import overlay, page, sheet
from imagewam_cli.expert.checkpoint import load_expert
from imagewam_cli.policy.bundle import read_bundle
from imagewam_cli.policy.policy import Policy
from imagewam_cli.prefix.kv import LayerKV, PrefixKV
from imagewam_cli.prefix.spec import KVSpec, LayerSpec, SegmentSpec
from tests.support.arithmetic_editor import ArithmeticEditor
from tests.support.policies import write_policy


class UNetEditor(ArithmeticEditor):
    """An editor with images at two resolutions and a text-only layer; its keys are seeded noise."""

    @property
    def spec(self) -> KVSpec:
        segments = (
            SegmentSpec(name="target", tokens=8, grid=(2, 4)),
            SegmentSpec(name="text", tokens=3),
            SegmentSpec(name="target", tokens=2, grid=(1, 2)),
        )
        layers = tuple(
            LayerSpec(name=f"l{i}", block="sequential", heads=2, kv_heads=2, head_dim=4, segments=(s,))
            for i, s in enumerate(segments)
        )
        return dataclasses.replace(super().spec, layers=layers, rope=None, image_size=(16, 32))

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        rows = [torch.Generator().manual_seed(int(row["top"].sum())) for row in images]
        kv = [[torch.randn(2, s.tokens, 2, 4, generator=g) for g in rows] for s in self.spec.layers]
        stacked = [torch.stack(layer, dim=1) for layer in kv]
        return PrefixKV(tuple(LayerKV(k, v) for k, v in stacked), None)


class ApartEditor(ArithmeticEditor):
    """An editor with separate images of two cameras and one target.

    The keys of the target and of the second reference attract no attention.
    """

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.settings = dataclasses.replace(self.settings, cameras=("top", "top"), camera_layout=layout)

    @property
    def spec(self) -> KVSpec:
        reference = SegmentSpec(name="reference", tokens=4, grid=(2, 2))
        segments = (dataclasses.replace(reference, name="target"), reference, reference)
        layer = LayerSpec(name="l", block="sequential", heads=2, kv_heads=2, head_dim=4, segments=segments)
        spec = dataclasses.replace(super().spec, layers=(layer,), rope=None)
        return dataclasses.replace(spec, cameras=self.settings.cameras, image_size=(16, 32))

    def encode(self, images: Sequence[Mapping[str, UInt8Image]], instructions: Sequence[str]) -> PrefixKV:
        kv = torch.zeros(len(images), 12, 2, 4)
        return PrefixKV((LayerKV(kv, kv),), None)


@pytest.fixture(scope="module")
def measured(policy_folder: Path, tiny_weights: Path, demonstrations: Dataset) -> Any:
    policy = Policy.load(policy_folder, weights=tiny_weights)
    return policy, evaluate_attention(policy, demonstrations, rows=6)


def unet_policy(folder: Path) -> Policy:
    editor = UNetEditor()
    write_policy(folder, editor)
    return Policy(read_bundle(folder), load_expert(folder), editor)


def test_the_only_target_of_separate_cameras_belongs_to_the_first_camera(
    demonstrations: Dataset, tmp_path: Path
) -> None:
    """With uniform attention on a target and two references, a position of the first camera sums up two tokens."""
    editor = ApartEditor("separate")
    write_policy(tmp_path, editor)
    policy = Policy(read_bundle(tmp_path), load_expert(tmp_path), editor)
    _, samples = evaluate_attention(policy, demonstrations, rows=3)
    for sample in samples:
        np.testing.assert_allclose(sample.average, np.array([[2, 2, 1, 1]] * 2) / 12, atol=1e-6)


def test_maps_and_shares_are_distributions(measured: Any) -> None:
    policy, (result, samples) = measured
    spec = policy.parts.editor.spec
    assert [layer.layer for layer in result.layers] == [layer.name for layer in spec.layers]
    assert result.rows + result.still == 6
    for sample in samples:
        for m in (*sample.maps, *sample.untrained, sample.average):
            assert m.shape == (4, 4)
            assert m.min() >= 0
            assert m.sum() == pytest.approx(1.0)
        for one in sample.shares:
            assert sum(one.values()) == pytest.approx(1.0)
            assert list(one) == ["text", "reference", "own"]


def test_the_reported_numbers_follow_from_the_maps(measured: Any) -> None:
    """Recompute mass, area and lift from the pictures and the maps."""
    _, (result, samples) = measured
    mass, area, ratios = [], [], []
    for sample in samples:
        difference = np.abs(sample.now.astype(float) - sample.target.astype(float)).mean(axis=2)
        tokens = difference.reshape(4, 16, 4, 16).mean(axis=(1, 3))
        region = tokens > tokens.max() / 4
        mass.append(np.mean(sample.maps, axis=0)[region].sum())
        area.append(region.sum() / 16)
        ratios.append(mass[-1] / area[-1])
    assert result.average.mass == pytest.approx(np.mean(mass))
    assert result.average.area == pytest.approx(np.mean(area))
    assert result.average.trained.own.mean == pytest.approx(np.mean(ratios))
    assert [row.lift for row in result.per_row] == pytest.approx(ratios)
    assert [row.area for row in result.per_row] == pytest.approx(area)


def test_rows_do_not_depend_on_their_batch(measured: Any, demonstrations: Dataset) -> None:
    """Texts of different lengths share a batch, so padding must get no attention."""
    policy, (_, samples) = measured
    _, alone = evaluate_attention(policy, demonstrations, rows=6, batch=1)
    assert len({len(g.row.instruction) for g in samples}) > 1
    for one, other in zip(samples, alone, strict=True):
        np.testing.assert_allclose(one.maps, other.maps, atol=1e-5)


def test_the_later_frame_is_the_one_after_the_chunk_or_the_last(measured: Any, demonstrations: Dataset) -> None:
    policy, (result, _) = measured
    last = {e.index: e.length - 1 for e in demonstrations.episodes()}
    assert all(r.target == min(r.frame + policy.horizon, last[r.episode]) for r in result.per_row)
    end, _ = evaluate_attention(policy, demonstrations, rows=4, target="end")
    assert all(r.target == last[r.episode] for r in end.per_row)


def test_only_held_out_episodes_are_measured(measured: Any, demonstrations: Dataset) -> None:
    result, _ = evaluate_attention(measured[0], demonstrations, rows=4, held_out=(0, 2))
    assert result.held_out
    assert {r.episode for r in result.per_row} == {0, 2}
    assert not measured[1][0].held_out


def test_an_editor_with_several_resolutions_and_a_text_layer_is_measured(
    tmp_path: Path, demonstrations: Dataset
) -> None:
    policy = unet_policy(tmp_path)
    result, samples = evaluate_attention(policy, demonstrations, rows=5)
    assert [(layer.layer, layer.grid) for layer in result.layers] == [("l0", (2, 4)), ("l2", (1, 2))]
    assert result.average.grid == (2, 4)
    first, second = samples[0].maps
    np.testing.assert_allclose(samples[0].average, (first + second.repeat(2, 0).repeat(2, 1) / 4) / 2)
    assert samples[0].now.shape == (16, 32, 3)
    assert list(result.average.shares) == ["target", "own"]


def test_equal_keys_give_a_lift_of_one(
    tmp_path: Path, demonstrations: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal keys, attention is uniform at every resolution and in the mean over layers."""
    policy = unet_policy(tmp_path)
    encode = policy.editor.encode

    def blind(images: Any, instructions: Any) -> PrefixKV:
        return PrefixKV(tuple(LayerKV(0 * kv.k, kv.v) for kv in encode(images, instructions).layers), None)

    monkeypatch.setattr(policy.editor, "encode", blind)
    result, samples = evaluate_attention(policy, demonstrations, rows=5)
    for sample in samples:
        for m in (*sample.maps, *sample.untrained):
            np.testing.assert_allclose(m, np.full(m.shape, 1 / m.size))
    for layer in (*result.layers, result.average):
        for lifts in (layer.trained, layer.untrained):
            for mean in (lifts.own, lifts.others):
                assert (mean.mean, mean.low, mean.high) == pytest.approx((1, 1, 1))
            assert lifts.above.mean == pytest.approx(0)


def test_the_others_lift_uses_regions_of_other_episodes() -> None:
    """The rows of episode 0 attend to their own change; the row of episode 1 attends to that of episode 0."""
    left, right = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    maps, regions = np.stack([left, left, left]), np.stack([left > 0, left > 0, right > 0])
    found = lift_statistics(maps, regions, [0, 0, 1])
    assert found.own.mean == pytest.approx((2 + 2 + 0) / 3)
    assert found.others.mean == pytest.approx((0 + 0 + 2) / 3)
    assert found.above.mean == pytest.approx((2 + 2 - 2) / 3)
    assert (found.own.low, found.own.high) == (0.0, 2.0)


def test_a_prefix_without_images_is_refused(tmp_path: Path, demonstrations: Dataset) -> None:
    editor = ArithmeticEditor()
    write_policy(tmp_path, editor)
    policy = Policy(read_bundle(tmp_path), load_expert(tmp_path), editor)
    with pytest.raises(UsageError, match="no layer of this policy's prefix holds picture tokens"):
        evaluate_attention(policy, demonstrations, rows=4)


def test_an_expert_without_a_prefix_is_refused(
    measured: Any, demonstrations: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = measured[0].expert
    monkeypatch.setattr(expert, "config", dataclasses.replace(expert.config, use_prefix=False))
    with pytest.raises(UsageError, match="does not use the prefix"):
        evaluate_attention(measured[0], demonstrations, rows=4)


def test_the_result_can_be_read_back_and_printed(measured: Any) -> None:
    _, (result, _) = measured
    assert from_dict(AttentionResult, json.loads(json.dumps(to_dict(result))), source="memory") == result
    lines = attention_table(result).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", *(layer.layer for layer in result.layers), "average"]
    assert f"{result.average.trained.own.mean:.2f} (" in lines[-1]


def test_pictures_are_brightest_where_the_map_is_largest(measured: Any) -> None:
    _, (_, samples) = measured
    peak = np.full((4, 4), 0.01)
    peak[1, 2] = 0.85
    pixels = np.asarray(overlay(samples[0], peak, 64), dtype=float)
    # The pixel mixes four fifths of the colour (252, 255, 120) with the grey image, which adds at most 0.6 * 255 / 5.
    assert pixels[24, 40].tolist() == pytest.approx([217, 219, 111], abs=16)
    assert np.abs(pixels[8, 8] - pixels[24, 40]).max() > 60
    assert len(samples) >= 3
    one, three = sheet(samples[:1], per_line=2), sheet(samples[:3], per_line=2)
    assert three.size == (one.width, 2 * one.height)
    assert page(samples[0], columns=2).height > page(samples[0], columns=4).height
    with pytest.raises(UsageError, match="no rows"):
        sheet([])
