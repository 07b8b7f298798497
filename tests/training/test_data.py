"""Test `training.data`: the training and validation rows, their order, and the content of batches."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from imagewam_cli.data.types import Row
from imagewam_cli.errors import CacheError, ImagewamWarning
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.kvcache.reading.torch_dataset import BatchOrder, PrefixDataset
from imagewam_cli.policy.bundle import read_bundle
from imagewam_cli.training import data as training_data
from imagewam_cli.training.data import Batch, ExpertData, Indices, TimedBatches
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import ExpertRecipe, PolicyRecipe, TrainRecipe
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.runs import EPISODES, LENGTH

STEPS_PER_EPOCH = 5


@pytest.fixture
def data(source: CachedPrefixes, recipe: TrainRecipe) -> ExpertData:
    return ExpertData(source, recipe)


def taken(data: ExpertData, first: int, count: int) -> list[Indices]:
    return list(islice(data.order(first), count))


class TestOrder:
    @pytest.mark.parametrize("epoch", [0, 1, 7])
    def test_each_epoch_is_a_permutation_of_the_training_rows(self, data: ExpertData, epoch: int) -> None:
        steps = taken(data, epoch * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
        assert sorted(np.concatenate(steps).tolist()) == data.train_rows.tolist()

    @pytest.mark.parametrize("shuffle", ["rows", "shards"])
    @pytest.mark.parametrize("batch", [7, 8, 13, 1000])
    def test_the_order_is_the_documented_formula(
        self, source: CachedPrefixes, recipe: TrainRecipe, shuffle: Any, batch: int
    ) -> None:
        """Recompute the order with numpy. It must not change, or existing runs would resume on other rows."""
        data = ExpertData(source, dataclasses.replace(recipe, shuffle=shuffle, batch=batch, seed=3))
        rows, size, expected = data.train_rows, min(batch, len(data.train_rows)), []
        for epoch in range(4):
            random = np.random.default_rng([3, epoch])
            if shuffle == "rows":
                order = random.permutation(rows)
            else:
                ends = np.cumsum(source.shard_rows)
                shards = np.split(rows, [int((rows < end).sum()) for end in ends[:-1]])
                joined = np.concatenate([shards[i] for i in random.permutation(len(shards))])
                window, own = math.ceil(4 * len(rows) / len(shards)), np.random.default_rng([3, epoch, 0])
                order = np.concatenate([own.permutation(joined[i : i + window]) for i in range(0, len(rows), window)])
            expected += [np.sort(order[i : i + size]) for i in range(0, len(rows) - size + 1, size)]
        found = taken(data, 0, len(expected))
        assert [step.tolist() for step in found] == [step.tolist() for step in expected]

    def test_the_trainer_reads_the_same_batches_as_the_public_torch_dataset(
        self, source: CachedPrefixes, cache: Path, recipe: TrainRecipe
    ) -> None:
        data = ExpertData(source, recipe)
        dataset = PrefixDataset(cache, horizon=recipe.expert.horizon)
        order = BatchOrder(dataset, batch=recipe.batch, rows=data.train_rows, seed=recipe.seed, remainder="drop")
        for batch, rows in zip(data.batches(0, STEPS_PER_EPOCH), order, strict=True):
            item = dataset[rows]
            assert batch.row.tolist() == item["row"].tolist()
            assert torch.equal(batch.is_pad, item["is_pad"])
            normalized = data.action_normalizer.normalize(item["actions"].numpy())
            assert torch.equal(batch.actions, torch.from_numpy(normalized))
            assert torch.equal(batch.prefix.layers[0].k, dataset.decode(item).layers[0].k)

    def test_epochs_differ(self, data: ExpertData) -> None:
        steps = taken(data, 0, 2 * STEPS_PER_EPOCH)
        assert not all(np.array_equal(a, b) for a, b in zip(steps[:5], steps[5:], strict=True))

    def test_the_order_is_the_same_for_the_same_seed(self, source: CachedPrefixes, recipe: TrainRecipe) -> None:
        one, two = (taken(ExpertData(source, recipe), 0, 12) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))

    def test_a_cache_larger_than_memory_is_read_a_few_shards_at_a_time(
        self, tmp_path: Path, recipe: TrainRecipe
    ) -> None:
        build_cache(MemoryDataset([4] * 20), ArithmeticEditor(), tmp_path / "c", FLOAT32, BuildSettings(shard_mb=0.001))
        source = CachedPrefixes(tmp_path / "c")
        assert source.shard_rows == (4,) * 20
        data = ExpertData(
            source, dataclasses.replace(recipe, shuffle="shards", batch=1)
        )  # 16 episodes are for training
        read = [int(rows[0]) for rows in taken(data, 0, 64)]
        assert sorted(read) == data.train_rows.tolist()
        window = -(-4 * 64 // 20)  # the number of training rows in four shards, on average
        for start in range(0, 64, window):
            assert len({row // 4 for row in read[start : start + window]}) <= 5
        assert read[20:30] == [int(rows[0]) for rows in taken(data, 20, 10)]

    def test_another_seed_is_another_order(self, source: CachedPrefixes, recipe: TrainRecipe) -> None:
        data = ExpertData(source, recipe)
        before = taken(data, 0, 5)
        data.recipe = dataclasses.replace(recipe, seed=1)
        assert not all(np.array_equal(a, b) for a, b in zip(before, taken(data, 0, 5), strict=True))

    @pytest.mark.parametrize("first", [1, 4, 5, 6, 13])
    def test_a_resumed_order_is_the_rest_of_the_full_order(self, data: ExpertData, first: int) -> None:
        whole = taken(data, 0, 20)
        assert all(np.array_equal(a, b) for a, b in zip(whole[first:], taken(data, first, 20 - first), strict=True))

    def test_rows_that_do_not_fill_a_batch_are_left_for_another_epoch(
        self, source: CachedPrefixes, recipe: TrainRecipe
    ) -> None:
        data = ExpertData(
            source, dataclasses.replace(recipe, batch=7)
        )  # 40 rows are five batches and five leftover rows
        epochs = [set(np.concatenate(taken(data, 5 * e, 5)).tolist()) for e in range(4)]
        assert [len(rows) for rows in epochs] == [35] * 4
        assert set().union(*epochs) == set(data.train_rows.tolist())

    def test_a_batch_larger_than_the_data_holds_all_rows(self, source: CachedPrefixes, recipe: TrainRecipe) -> None:
        data = ExpertData(source, dataclasses.replace(recipe, batch=1000))
        assert all(np.array_equal(rows, data.train_rows) for rows in taken(data, 3, 3))


class TestSplit:
    @pytest.mark.parametrize("seed", range(5))
    def test_no_training_row_belongs_to_a_validation_episode(
        self, source: CachedPrefixes, recipe: TrainRecipe, seed: int
    ) -> None:
        data = ExpertData(source, dataclasses.replace(recipe, seed=seed))
        trained = {int(source.index.episode[i]) for rows in taken(data, 0, 10) for i in rows}
        validated = {int(source.index.episode[i]) for i in data.validation_rows}
        assert len(validated) == 1
        assert trained == set(range(EPISODES)) - validated

    def test_validation_rows_are_thinned_evenly(self, source: CachedPrefixes, recipe: TrainRecipe) -> None:
        data = ExpertData(source, dataclasses.replace(recipe, validation_rows=3))
        frames = source.index.frame[data.validation_rows]
        assert frames.tolist() == [0, 4, 7]  # both ends of 0 to 7, and the middle 3.5 rounded to even

    def test_a_limit_on_episodes_keeps_the_first_training_episodes(
        self, source: CachedPrefixes, recipe: TrainRecipe
    ) -> None:
        everything = ExpertData(source, recipe)
        few = ExpertData(source, dataclasses.replace(recipe, episodes=2))
        assert few.train_episodes == everything.train_episodes[:2]
        assert few.validation_episodes == everything.validation_episodes
        assert len(few.train_rows) == 2 * LENGTH

    def test_without_held_out_episodes_all_rows_are_for_training(
        self, source: CachedPrefixes, recipe: TrainRecipe
    ) -> None:
        data = ExpertData(source, dataclasses.replace(recipe, validation_fraction=0.0))
        assert len(data.train_rows) == EPISODES * LENGTH
        assert len(data.validation_rows) == 0


class TestBatch:
    def test_states_and_actions_are_scaled_by_statistics_of_training_episodes(
        self, data: ExpertData, dataset: MemoryDataset
    ) -> None:
        rows = list(dataset.rows())
        train = [r for r in rows if r.episode in data.train_episodes]
        batch = data.batch(np.array([11, 3]))
        for i, number in enumerate((11, 3)):
            np.testing.assert_allclose(
                batch.state[i], scaled(rows[number].state, [r.state for r in train]), rtol=1e-5, atol=1e-6
            )
            np.testing.assert_allclose(
                batch.actions[i, 0], scaled(rows[number].action, [r.action for r in train]), rtol=1e-5, atol=1e-6
            )

    def test_a_chunk_has_the_actions_that_follow_the_frame(self, data: ExpertData, dataset: MemoryDataset) -> None:
        rows = list(dataset.rows())
        train = [r.action for r in rows if r.episode in data.train_episodes]
        batch = data.batch(np.array([9]))  # frame 1 of episode 1
        expected = [scaled(rows[9 + i].action, train) for i in range(4)]
        np.testing.assert_allclose(batch.actions[0], np.stack(expected), rtol=1e-5, atol=1e-6)
        assert batch.is_pad.tolist() == [[False] * 4]

    def test_a_horizon_longer_than_an_episode_is_padded_and_masked(
        self, source: CachedPrefixes, recipe: TrainRecipe
    ) -> None:
        long = dataclasses.replace(recipe, expert=ExpertRecipe(horizon=12, hidden=16), policy=PolicyRecipe(execute=2))
        batch = ExpertData(source, long).batch(np.arange(LENGTH))
        assert batch.actions.shape == (LENGTH, 12, 3)
        for frame in range(LENGTH):
            assert batch.is_pad[frame].tolist() == [frame + i >= LENGTH for i in range(12)]
            last = LENGTH - 1 - frame
            assert torch.equal(batch.actions[frame, last:], batch.actions[frame, last].expand(12 - last, 3))

    def test_the_prefix_belongs_to_the_same_rows(self, data: ExpertData, source: CachedPrefixes) -> None:
        batch = data.batch(np.array([30, 2, 17]))
        expected = source.reader.read(np.array([30, 2, 17]))
        assert torch.equal(batch.prefix.layers[1].k, expected.layers[1].k)
        assert batch.row.tolist() == [30, 2, 17]

    def test_row_numbers_are_those_of_the_dataset_not_of_the_cache(
        self, tmp_path_factory: pytest.TempPathFactory, dataset: MemoryDataset, recipe: TrainRecipe
    ) -> None:
        folder = tmp_path_factory.mktemp("strided") / "cache"
        build_cache(dataset, ArithmeticEditor(), folder, FLOAT32, BuildSettings(stride=3))
        data = ExpertData(CachedPrefixes(folder), recipe)
        # rows of frames 0, 3 and 6 of each episode
        assert data.batch(np.array([0, 2, 3, 4])).row.tolist() == [0, 6, 8, 11]

    def test_batches_read_ahead_follow_the_order(self, data: ExpertData) -> None:
        rows = [batch.row.tolist() for batch in data.batches(3, 9)]
        assert rows == [indices.tolist() for indices in taken(data, 3, 6)]

    @pytest.mark.parametrize(("first", "last"), [(0, 1), (2, 4), (3, 5), (4, 60), (12, 12)])
    def test_needed_rows_are_those_of_the_batches_and_the_validation(
        self, source: CachedPrefixes, recipe: TrainRecipe, first: int, last: int
    ) -> None:
        data = ExpertData(source, dataclasses.replace(recipe, batch=7, validation_rows=3))
        read = {int(i) for rows in taken(data, first, last - first) for i in rows}
        assert data.rows_needed(first, last).tolist() == sorted(read | set(data.validation_rows.tolist()))

    def test_plain_reads_and_memory_mapping_give_the_same_batches(
        self, source: CachedPrefixes, cache: Path, recipe: TrainRecipe
    ) -> None:
        plain = ExpertData(CachedPrefixes(cache, "read"), recipe)
        for there, here in zip(ExpertData(source, recipe).batches(0, 7), plain.batches(0, 7), strict=True):
            assert there.row.tolist() == here.row.tolist()
            for one, two in zip(there.prefix.layers, here.prefix.layers, strict=True):
                assert torch.equal(one.k, two.k)
                assert torch.equal(one.v, two.v)

    def test_waiting_time_is_counted(self, data: ExpertData, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 100.0
        monkeypatch.setattr(training_data, "time", SimpleNamespace(monotonic=lambda: now))

        def slow() -> Iterator[Batch]:
            nonlocal now
            for batch in data.batches(0, 2):
                now += 3.0
                yield batch
            now += 0.5  # waiting for the end of the stream counts too

        waited = TimedBatches(slow())
        for _ in waited:
            now += 20.0
        assert waited.seconds == 6.5

    def test_without_remaining_steps_there_are_no_batches(self, data: ExpertData) -> None:
        assert list(data.batches(12, 12)) == []

    def test_an_error_while_reading_ahead_reaches_the_trainer(
        self, data: ExpertData, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(indices: Indices) -> None:
            raise CacheError("shard is gone")

        monkeypatch.setattr(data.source, "begin_read", broken)
        with pytest.raises(CacheError, match="shard is gone"):
            next(data.batches(0, 5))


def scaled(values: np.ndarray, among: list[np.ndarray]) -> np.ndarray:
    """Scale by min-max to [-1, 1] in numpy, and clamp to [-5, 5]."""
    low, high = np.min(among, axis=0), np.max(among, axis=0)
    return np.clip(2 * (values - low) / (high - low) - 1, -5, 5)


def test_the_memory_dataset_has_the_row_numbers_that_the_tests_assume(dataset: MemoryDataset) -> None:
    rows: list[Row] = list(dataset.rows())
    assert [(r.row, r.episode, r.frame) for r in rows] == [(8 * e + f, e, f) for e in range(6) for f in range(8)]


class UnusualDataset(MemoryDataset):
    """UTM coordinates with millimeters, a locked joint, and a gripper that is open in one frame, in float64."""

    def rows(self, **options: Any) -> Iterator[Row]:
        for row in super().rows(**options):
            state = np.array([4_500_000.0 + 0.001 * row.row, 0.3])
            action = np.array([1.57, 4e-5 * np.sin(row.row), float(row.row == 3)])
            yield dataclasses.replace(row, state=state, action=action)


class TestUnusualDimensions:
    @pytest.fixture(scope="class")
    def unusual(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("caches") / "unusual"
        dataset = UnusualDataset([LENGTH] * EPISODES)
        build_cache(dataset, ArithmeticEditor(), folder, FLOAT32, BuildSettings(shard_mb=0.03))
        return folder

    def test_millimeters_of_utm_coordinates_reach_the_batch(self, unusual: Path, recipe: TrainRecipe) -> None:
        data = ExpertData(CachedPrefixes(unusual), dataclasses.replace(recipe, validation_fraction=0.0))
        batch = data.batch(data.train_rows)
        expected = 2 * np.arange(EPISODES * LENGTH) / (EPISODES * LENGTH - 1) - 1
        np.testing.assert_allclose(batch.state[:, 0], expected, atol=1e-6)
        assert (batch.state[:, 1] == 0).all()
        assert (batch.actions[..., 0] == 0).all()
        assert batch.actions[..., 1].abs().max() > 0.99

    def test_the_dimensions_are_named_with_episode_and_frame(self, unusual: Path, recipe: TrainRecipe) -> None:
        recipe = dataclasses.replace(recipe, validation_fraction=0.0, normalize_action="mean_std")
        source = CachedPrefixes(unusual)
        info = dataclasses.replace(
            source.info.dataset, state_names=("north", "lift"), action_names=("arm", "dx", "grip")
        )
        source.info = dataclasses.replace(source.info, dataset=info)
        state, action, clamped = ExpertData(source, recipe).notes()
        assert "state 'lift' = 0.3" in state
        assert "action 'arm' = 1.57" in action
        assert "action 'grip': its range 0 to 1 is that of 1 of 48 rows (2.1 %, first: episode 0, frame 3)" in clamped
        assert "normalize_action=min_max" in clamped

    def test_a_run_warns_of_them_and_returns_the_constant(
        self, unusual: Path, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        with pytest.warns(ImagewamWarning, match="constant in the training rows; the policy always returns this value"):
            Trainer(CachedPrefixes(unusual), dataclasses.replace(recipe, steps=2)).train(tmp_path / "run")
        assert json.loads((tmp_path / "run/policy/policy.json").read_text())["version"] == 2
        normalizer = read_bundle(tmp_path / "run/policy").action_normalizer
        assert normalizer.denormalize(np.full((1, 3), 0.7))[0, 0] == 1.57
        with pytest.warns(ImagewamWarning):
            dry = Trainer(CachedPrefixes(unusual), dataclasses.replace(recipe, steps=2)).dry_run(1)
        assert dry.steps == 2
