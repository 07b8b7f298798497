"""Test that `training.online` computes the same prefixes as a cache, and that training on them gives the same run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagewam_cli.data.samples import SAMPLES, Samples
from imagewam_cli.data.types import Row
from imagewam_cli.editors.contract import Editor
from imagewam_cli.errors import CacheError, DatasetError, NonFiniteLossError, RunError, UsageError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import FLOAT32
from imagewam_cli.lock import LOCK
from imagewam_cli.policy.bundle import TrainingRecord, read_bundle
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.online import OnlinePrefixes
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import FlowRecipe, TrainRecipe
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.faults import stop_at
from tests.support.folders import files
from tests.support.runs import EPISODES, LENGTH, log_of, result_of


def online(editor: Editor | None = None, dataset: MemoryDataset | None = None, **options: Any) -> OnlinePrefixes:
    return OnlinePrefixes(
        dataset if dataset is not None else MemoryDataset([LENGTH] * EPISODES),
        editor if editor is not None else ArithmeticEditor(),
        **options,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, recipe: TrainRecipe) -> Path:
    """An uninterrupted run without a cache."""
    folder = tmp_path_factory.mktemp("runs") / "online"
    Trainer(online(), recipe).train(folder)
    return folder


class TestSameAsACache:
    def test_the_run_has_the_same_bits(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        """The arithmetic editor gives a row the same numbers in any batch."""
        Trainer(CachedPrefixes(cache), recipe).train(tmp_path / "cached")
        there, here = result_of(tmp_path / "cached"), result_of(uninterrupted)
        assert there == here

    @pytest.mark.parametrize("stride", [1, 3])
    def test_rows_and_fingerprints_are_the_same(self, tmp_path: Path, stride: int) -> None:
        dataset = MemoryDataset([7, 5, 8])
        build_cache(dataset, ArithmeticEditor(), tmp_path / "cache", FLOAT32, BuildSettings(stride=stride))
        cached, direct = CachedPrefixes(tmp_path / "cache"), online(dataset=dataset, stride=stride)
        expected = dataclasses.replace(cached.info, kind="online", location=direct.info.location, codec="none")
        assert dataclasses.replace(direct.info, fingerprint=expected.fingerprint) == expected
        assert direct.info.digest == expected.digest
        for name in ("row", "episode", "frame", "instruction"):
            assert np.array_equal(getattr(direct.index, name), getattr(cached.index, name))
        assert direct.table.to_bytes() == cached.table.to_bytes()

    @pytest.mark.parametrize("batch", [1, 3, 16])
    def test_a_batch_has_the_prefixes_of_its_rows(self, cache: Path, tmp_path: Path, batch: int) -> None:
        rows, source = np.array([30, 2, 17, 41]), online(batch=batch)
        expected = CachedPrefixes(cache).begin_read(rows)()
        with source.prepare(np.array([41, 2, 17, 30, 5]), tmp_path):
            found = source.begin_read(rows)()
        assert_same(found, expected)

    def test_an_editor_without_a_mask_trains_as_from_its_cache(self, recipe: TrainRecipe, tmp_path: Path) -> None:
        def everywhere(prefix: PrefixKV) -> PrefixKV:
            return PrefixKV(prefix.layers, None)

        dataset, editor = MemoryDataset([LENGTH] * EPISODES), ArithmeticEditor(spoil=everywhere)
        build_cache(dataset, editor, tmp_path / "cache", FLOAT32, BuildSettings())
        source = online(editor, dataset, batch=2)
        with source.prepare(np.arange(5), tmp_path):
            assert_same(
                source.begin_read(np.arange(5))(), CachedPrefixes(tmp_path / "cache").begin_read(np.arange(5))()
            )

    def test_numbers_in_bfloat16_reach_the_expert_as_float32(self, tmp_path: Path) -> None:
        def halved(prefix: PrefixKV) -> PrefixKV:
            return prefix.to("cpu", torch.bfloat16)

        source = online(ArithmeticEditor(spoil=halved))
        with source.prepare(np.arange(3), tmp_path):
            found = source.begin_read(np.arange(3))()
        assert {kv.k.dtype for kv in found.layers} | {kv.v.dtype for kv in found.layers} == {torch.float32}


class TestCost:
    @pytest.mark.parametrize("draws", [1, 4])
    def test_a_row_is_encoded_once_for_all_draws(self, recipe: TrainRecipe, tmp_path: Path, draws: int) -> None:
        editor = ArithmeticEditor()
        many = dataclasses.replace(recipe, flow=FlowRecipe(shift=5.0, inference_steps=2, draws=draws))
        Trainer(online(editor), many).train(tmp_path / "run")
        assert editor.encoded == recipe.steps * recipe.batch + LENGTH  # prefixes of the validation rows are kept

    def test_images_are_decoded_once(self, recipe: TrainRecipe, tmp_path: Path) -> None:
        dataset = MemoryDataset([LENGTH] * EPISODES)
        Trainer(online(dataset=dataset), recipe).train(tmp_path / "run")
        everything = tuple(range(EPISODES))
        assert (
            sorted(dataset.streams) == [everything] * 2
        )  # one pass for the training steps, one for the samples of the policy

    def test_only_needed_rows_are_decoded(self, recipe: TrainRecipe, tmp_path: Path) -> None:
        dataset, progress = MemoryDataset([LENGTH] * EPISODES), Progress()
        few = dataclasses.replace(recipe, episodes=1, validation_fraction=0.0)
        trainer = Trainer(online(dataset=dataset, watch=progress), few)
        trainer.train(tmp_path / "run")
        assert dataset.streams[0] == tuple(trainer.data.train_episodes)
        assert progress.before == [(LENGTH, LENGTH * 4 * 4 * 3)]
        assert progress.rows == LENGTH

    def test_a_dry_run_reports_the_bytes_of_temporary_files(
        self, recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        dry = Trainer(online(), recipe).dry_run()
        assert dry.scratch_bytes == EPISODES * LENGTH * 4 * 4 * 3
        assert list(tmp_path.iterdir()) == []

    def test_training_from_a_cache_needs_no_temporary_space(self, cache: Path, recipe: TrainRecipe) -> None:
        assert Trainer(CachedPrefixes(cache), recipe).dry_run().scratch_bytes == 0


class TestContinuation:
    @pytest.mark.parametrize("step", [0, 4, 5, 7, 11, 12])
    def test_a_stopped_run_resumes_to_the_same_bits(
        self, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path, step: int
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            Trainer(online(), recipe).train(tmp_path / "run", on_step=stop_at(step))
        Trainer(online(), recipe).train(tmp_path / "run")
        assert result_of(tmp_path / "run") == result_of(uninterrupted)

    def test_a_finished_run_is_not_changed(self, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path) -> None:
        run, dataset = shutil.copytree(uninterrupted, tmp_path / "run"), MemoryDataset([LENGTH] * EPISODES)
        trainer = Trainer(online(dataset=dataset), recipe)
        trainer.train(run)
        assert result_of(run) == result_of(uninterrupted)
        assert dataset.streams == [tuple(trainer.data.validation_episodes)]

    def test_a_run_resumes_after_its_dataset_was_moved(
        self, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        run, moved = shutil.copytree(uninterrupted, tmp_path / "run"), MemoryDataset([LENGTH] * EPISODES)
        moved.info = dataclasses.replace(moved.info, root=Path("elsewhere"))
        Trainer(online(dataset=moved), recipe).train(run)
        assert result_of(run) == result_of(uninterrupted)

    @pytest.mark.parametrize(
        ("field", "options"),
        [
            ("editor fingerprint", {"editor": ArithmeticEditor(weights="trained longer")}),
            ("dataset", {"dataset": MemoryDataset([LENGTH] * EPISODES, identity="another")}),
            ("stride", {"stride": 2}),
        ],
    )
    def test_a_run_on_other_prefixes_is_refused(
        self, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path, field: str, options: dict[str, Any]
    ) -> None:
        run = shutil.copytree(uninterrupted, tmp_path / "run")
        with pytest.raises(RunError, match=f"holds a run that differs in its {field}: "):
            Trainer(online(**options), recipe).train(run)
        assert files(run) == files(uninterrupted)

    def test_an_online_run_does_not_resume_with_a_cache(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        run = shutil.copytree(uninterrupted, tmp_path / "run")
        with pytest.raises(RunError, match="its codec: none, but this run has fp32"):
            Trainer(CachedPrefixes(cache), recipe).train(run)

    def test_the_run_records_its_source(self, recipe: TrainRecipe, uninterrupted: Path) -> None:
        run = json.loads((uninterrupted / "run.json").read_text())
        origin = online().info
        assert run == {
            "online": str(Path("memory").resolve()),
            "fingerprint": origin.digest,
            "editor": "arithmetic",
            "dataset": origin.dataset.identity[:16],
            "content": None,
            "table": origin.table_checksum[:16],
            "codec": "none",
            "keys": {"state": "observation.state", "action": "action", "cameras": ["top"], "instruction": None},
            "selected": None,
            "variants": 1,
            "stride": 1,
            "rows": EPISODES * LENGTH,
            "precision": "float32",
            "split": {"train": "0-3,5", "validation": "4"},
        }
        dataset = MemoryDataset([LENGTH] * EPISODES)
        record = read_bundle(uninterrupted / "policy").training
        assert record == TrainingRecord(dataset=dataset.info.identity, train="0-3,5", validation="4")
        assert record.split == Trainer(online(), recipe).data.split
        assert len(log_of(uninterrupted).read_text().splitlines()) == recipe.steps

    def test_the_policy_keeps_sample_rows_with_their_images(self, uninterrupted: Path) -> None:
        rows = {row.row: row for row in MemoryDataset([LENGTH] * EPISODES).rows()}
        kept = Samples.load(uninterrupted / "policy" / SAMPLES).observations
        for number, observation in zip((8, 24, 40), kept, strict=True):  # the middles of batches of 16
            assert np.array_equal(observation.images["top"], rows[number].images["top"])
            assert observation.instruction == rows[number].instruction


class TestFailure:
    def test_no_temporary_files_are_left(self, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path) -> None:
        def nothing_yet(step: int, values: dict[str, float]) -> None:
            found = {p.name for p in run.iterdir() if p.is_file()}
            assert found == {LOCK, "config.yaml", "metrics.jsonl", "run.json"}
            raise KeyboardInterrupt

        run = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            Trainer(online(), recipe).train(run, on_step=nothing_yet)
        assert [p.name for p in tmp_path.iterdir()] == ["run"]
        assert {p.name for p in uninterrupted.iterdir()} - {"tensorboard"} == {
            *("config.yaml", "run.json", "metrics.jsonl", "result.json", "checkpoints", "policy")
        }

    def test_a_full_disk_is_reported_before_anything_is_decoded(
        self, recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage, dataset = shutil.disk_usage(tmp_path), MemoryDataset([LENGTH] * EPISODES)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=EPISODES * LENGTH * 48 - 1))
        with pytest.raises(RunError, match="pictures of 48 rows take"):
            Trainer(online(dataset=dataset), recipe).train(tmp_path / "run")
        assert dataset.streams == []

    @pytest.mark.parametrize("batch", [{"stride": 0}, {"batch": 0}])
    def test_a_stride_or_batch_below_one_is_a_usage_error(self, batch: dict[str, int]) -> None:
        with pytest.raises(UsageError, match="at least 1"):
            online(**batch)

    def test_a_prefix_that_does_not_match_the_layout_stops_the_run(self, recipe: TrainRecipe, tmp_path: Path) -> None:
        def shorter(prefix: PrefixKV) -> PrefixKV:
            return PrefixKV(prefix.layers[:1], prefix.valid)

        with pytest.raises(CacheError, match="the editor returned 1 layers, but its spec declares 2"):
            Trainer(online(ArithmeticEditor(spoil=shorter)), recipe).train(tmp_path / "run")

    def test_a_row_missing_from_the_dataset_is_named(self, recipe: TrainRecipe, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="row 9 has no picture"):
            Trainer(online(dataset=Gap([LENGTH] * EPISODES)), recipe).train(tmp_path / "run")

    def test_a_non_finite_loss_names_the_rows_of_the_dataset(self, recipe: TrainRecipe, tmp_path: Path) -> None:
        trainer = Trainer(online(stride=2), recipe)
        trainer.source.table.action[:] = np.nan
        with pytest.raises(NonFiniteLossError) as error:
            trainer.train(tmp_path / "run")
        named = [int(n) for n in error.value.message.split("rows of the batch:")[1].split(",")]
        assert all(n % 2 == 0 for n in named)
        assert max(named) >= EPISODES * LENGTH // 2

    def test_reading_rows_that_were_not_prepared_is_a_programming_error(self, tmp_path: Path) -> None:
        source = online()
        with pytest.raises(RuntimeError, match="not passed"):
            source.begin_read(np.array([0]))
        with source.prepare(np.array([1, 3]), tmp_path), pytest.raises(RuntimeError, match="not passed"):
            source.begin_read(np.array([1, 2]))


class Gap(MemoryDataset):
    """A dataset that lists row 9 in its metadata but does not return it with images."""

    def _row(self, episode: Any, frame: int, images: bool) -> Row:
        row = super()._row(episode, frame, images)
        return dataclasses.replace(row, row=-1) if images and row.row == 9 else row


class Progress:
    """Record the calls of the progress callbacks."""

    def __init__(self) -> None:
        self.before: list[tuple[int, int]] = []
        self.rows = 0

    @contextmanager
    def __call__(self, rows: int, size: int) -> Iterator[Callable[[int], object]]:
        self.before.append((rows, size))
        yield self.add

    def add(self, count: int) -> None:
        self.rows += count


def assert_same(found: PrefixKV, expected: PrefixKV) -> None:
    assert found.valid is not None
    assert expected.valid is not None
    assert torch.equal(found.valid, expected.valid)
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)
