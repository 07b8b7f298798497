"""Test `training.loop`: a stopped run resumes to the same bits, and no run is mixed up, corrupted or lost."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imagewam_cli.cli import app
from imagewam_cli.data.samples import SAMPLES
from imagewam_cli.errors import NonFiniteLossError, RunError, UsageError
from imagewam_cli.kvcache.building.build import build_cache
from imagewam_cli.kvcache.building.shard_plan import BuildSettings
from imagewam_cli.kvcache.codecs.cast import BFLOAT16, FLOAT32
from imagewam_cli.kvcache.reading.reader import CacheReader
from imagewam_cli.kvcache.storage.manifests import put_manifest, read_manifest, storage_at
from imagewam_cli.policy.bundle import read_bundle
from imagewam_cli.prefix.kv import PrefixKV
from imagewam_cli.training import loop
from imagewam_cli.training.loop import Trainer
from imagewam_cli.training.metrics import read_metrics
from imagewam_cli.training.prefixes import CachedPrefixes
from imagewam_cli.training.recipe import ExpertRecipe, FlowRecipe, TrainRecipe
from tests.support.arithmetic_editor import ArithmeticEditor, MemoryDataset
from tests.support.faults import stop_at
from tests.support.folders import files
from tests.support.runs import EPISODES, LENGTH, log_of, result_of


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: Path, recipe: TrainRecipe) -> Path:
    """An uninterrupted run. It is read-only: copy it before you damage it."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    Trainer(CachedPrefixes(cache), recipe).train(folder)
    return folder


class TestContinuation:
    @pytest.mark.parametrize("step", [0, 1, 4, 5, 7, 10, 11, 12])
    def test_a_stopped_run_resumes_to_the_same_bits(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path, step: int
    ) -> None:
        run = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            Trainer(CachedPrefixes(cache), recipe).train(run, on_step=stop_at(step))
        Trainer(CachedPrefixes(cache), recipe).train(run)
        assert result_of(run) == result_of(uninterrupted)

    def test_a_run_stopped_again_and_again_ends_the_same(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        for step in (3, 6, 9, 11):
            with pytest.raises(KeyboardInterrupt):
                Trainer(CachedPrefixes(cache), recipe).train(run, on_step=stop_at(step))
        Trainer(CachedPrefixes(cache), recipe).train(run)
        assert result_of(run) == result_of(uninterrupted)

    def test_a_bfloat16_run_resumes_to_the_same_bits(self, cache: Path, recipe: TrainRecipe, tmp_path: Path) -> None:
        half = dataclasses.replace(recipe, precision="bfloat16")
        Trainer(CachedPrefixes(cache), half).train(tmp_path / "undisturbed")
        with pytest.raises(KeyboardInterrupt):
            Trainer(CachedPrefixes(cache), half).train(tmp_path / "run", on_step=stop_at(7))
        Trainer(CachedPrefixes(cache), half).train(tmp_path / "run")
        assert result_of(tmp_path / "run") == result_of(tmp_path / "undisturbed")

    def test_a_stopped_run_resumes_from_its_last_checkpoint(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            Trainer(CachedPrefixes(cache), recipe).train(tmp_path / "run", on_step=stop_at(9))
        steps: list[int] = []
        Trainer(CachedPrefixes(cache), recipe).train(tmp_path / "run", on_step=lambda step, values: steps.append(step))
        assert steps == [5, 6, 7, 8, 9, 10, 11, 12]

    @pytest.mark.parametrize("part", ["save_checkpoint", "save_expert", "write_bundle"])
    @pytest.mark.parametrize("times", [1, 3])
    def test_a_run_stopped_while_saving_has_its_policy_after_resuming(
        self,
        cache: Path,
        recipe: TrainRecipe,
        uninterrupted: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        part: str,
        times: int,
    ) -> None:
        """Stop at save number `times`: 1 is the first of the run, 3 the last."""
        run, real, calls = tmp_path / "run", getattr(loop, part), 0

        def stopped(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == times:
                raise KeyboardInterrupt
            real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(loop, part, stopped)
            with pytest.raises(KeyboardInterrupt):
                Trainer(CachedPrefixes(cache), recipe).train(run)
        Trainer(CachedPrefixes(cache), recipe).train(run)
        assert result_of(run) == result_of(uninterrupted)

    @pytest.mark.parametrize("stopped_at", range(1, 5))
    def test_a_run_stopped_while_it_starts_resumes(
        self,
        cache: Path,
        recipe: TrainRecipe,
        uninterrupted: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        stopped_at: int,
    ) -> None:
        """Stop at flush number `stopped_at` and leave a half-written file, as a power cut does."""
        run, real, calls = tmp_path / "run", os.fsync, 0

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == stopped_at:
                raise KeyboardInterrupt
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            with pytest.raises(KeyboardInterrupt):
                Trainer(CachedPrefixes(cache), recipe).train(run)
        Trainer(CachedPrefixes(cache), recipe).train(run)
        assert result_of(run) == result_of(uninterrupted)

    def test_a_finished_run_is_not_changed(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        run = shutil.copytree(uninterrupted, tmp_path / "run")
        validation = Trainer(CachedPrefixes(cache), recipe).train(run)
        assert result_of(run) == result_of(uninterrupted)
        assert validation.loss == json.loads((uninterrupted / "result.json").read_text())["validation"]["loss"]

    def test_a_run_resumes_after_its_cache_was_moved(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            Trainer(CachedPrefixes(cache), recipe).train(tmp_path / "run", on_step=stop_at(6))
        moved = shutil.copytree(cache, tmp_path / "moved")
        Trainer(CachedPrefixes(moved), recipe).train(tmp_path / "run")
        assert result_of(tmp_path / "run") == result_of(uninterrupted)

    def test_another_seed_gives_another_run(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        Trainer(CachedPrefixes(cache), dataclasses.replace(recipe, seed=1)).train(tmp_path / "run")
        assert result_of(tmp_path / "run")["metrics"] != result_of(uninterrupted)["metrics"]

    def test_training_does_not_change_the_global_random_state(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        torch.manual_seed(4)
        expected = torch.rand(3)
        torch.manual_seed(4)
        Trainer(CachedPrefixes(cache), dataclasses.replace(recipe, steps=2)).train(tmp_path / "run")
        assert torch.equal(torch.rand(3), expected)


class TestMetrics:
    def test_each_step_is_logged_once_after_resuming(self, cache: Path, recipe: TrainRecipe, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            Trainer(CachedPrefixes(cache), recipe).train(run, on_step=stop_at(9))
        with log_of(run).open("a") as file:
            file.write('{"step": 10, "lo')  # a line truncated by a kill
        Trainer(CachedPrefixes(cache), recipe).train(run)
        steps = [json.loads(line)["step"] for line in log_of(run).read_text().splitlines()]
        assert steps == list(range(1, 13))

    def test_validations_are_logged_at_the_steps_of_the_recipe(self, uninterrupted: Path) -> None:
        validated = [r["step"] for r in read_metrics(log_of(uninterrupted)) if "validation_loss" in r]
        assert validated == [6, 12]

    def test_the_logged_learning_rate_is_that_of_the_recipe(self, uninterrupted: Path, recipe: TrainRecipe) -> None:
        for record in read_metrics(log_of(uninterrupted)):
            assert record["learning_rate"] == recipe.learning_rate(record["step"] - 1)

    def test_the_result_is_the_last_validation(self, uninterrupted: Path) -> None:
        last = read_metrics(log_of(uninterrupted))[-1]
        result = json.loads((uninterrupted / "result.json").read_text())
        assert result["steps"] == last["step"] == 12
        for key in ("loss", "action_error", "constant_error"):
            assert result["validation"][key] == last[f"validation_{key}"]

    def test_without_held_out_episodes_there_is_no_validation(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        alone = dataclasses.replace(recipe, validation_fraction=0.0, steps=2)
        Trainer(CachedPrefixes(cache), alone).train(tmp_path / "run")
        assert json.loads((tmp_path / "run" / "result.json").read_text()) == {"steps": 2, "validation": None}


class TestNumbers:
    def test_the_average_follows_the_weights(self, cache: Path, recipe: TrainRecipe) -> None:
        """Step i, from 0, moves the average by 1 - min(ema, (i + 1) / (i + 10)) of the distance: 0.9, then 9 / 11."""
        trainer = Trainer(CachedPrefixes(cache), recipe)
        expected = {name: p.detach().double().clone() for name, p in trainer.expert.named_parameters()}
        for step, batch in enumerate(trainer.data.batches(0, 2)):
            trainer.step(step, batch)
            for name, parameter in trainer.expert.named_parameters():
                share = (0.9, 9 / 11)[step]
                expected[name] += share * (parameter.detach().double() - expected[name])
        for name, value in trainer.average.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)

    def test_the_first_step_is_that_of_clipped_adamw(self, cache: Path, recipe: TrainRecipe) -> None:
        """AdamW first decays each weight, then moves it by the learning rate against the sign of the gradient."""
        trainer = Trainer(CachedPrefixes(cache), recipe)
        before = {name: p.detach().clone() for name, p in trainer.expert.named_parameters()}
        trainer.step(0, next(trainer.data.batches(0, 1)))
        moved = 0
        for name, parameter in trainer.expert.named_parameters():
            assert parameter.grad is not None
            clear = parameter.grad.abs() > 1e-5
            expected = before[name] * (1 - 1e-2 * 0.01) - 1e-2 * parameter.grad.sign()
            torch.testing.assert_close(parameter.detach()[clear], expected[clear], rtol=1e-3, atol=2e-5)
            moved += int(clear.sum())
        norm = torch.stack([p.grad.norm() for p in trainer.expert.parameters() if p.grad is not None]).norm()
        assert moved > 0
        assert float(norm) <= recipe.optimizer.clip_norm + 1e-5

    def test_validating_does_not_touch_the_weights(self, cache: Path, recipe: TrainRecipe) -> None:
        trainer = Trainer(CachedPrefixes(cache), recipe)
        for step, batch in enumerate(trainer.data.batches(0, 2)):
            trainer.step(step, batch)
        before = {name: p.detach().clone() for name, p in trainer.expert.named_parameters()}
        trainer.validate()
        assert all(torch.equal(p, before[name]) for name, p in trainer.expert.named_parameters())

    def test_an_expert_without_prefix_does_not_depend_on_the_prefix(
        self, cache: Path, recipe: TrainRecipe, dataset: MemoryDataset, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        editor = ArithmeticEditor(weights="others", spoil=upside_down)
        build_cache(dataset, editor, other, FLOAT32, BuildSettings(shard_mb=0.03))
        blind = dataclasses.replace(recipe, expert=ExpertRecipe(horizon=4, hidden=16, use_prefix=False))
        assert weights_after(cache, blind) == weights_after(other, blind)
        assert weights_after(cache, recipe) != weights_after(other, recipe)

    @pytest.mark.parametrize(("has", "means"), [(True, "bfloat16"), (False, "float32")])
    def test_auto_precision_is_bfloat16_if_the_processor_supports_it(
        self, cache: Path, recipe: TrainRecipe, monkeypatch: pytest.MonkeyPatch, has: bool, means: Any
    ) -> None:
        monkeypatch.setattr(loop, "_has_bfloat16", lambda: has)
        auto = weights_after(cache, dataclasses.replace(recipe, precision="auto"))
        same, other = (
            weights_after(cache, dataclasses.replace(recipe, precision=precision))
            for precision in (means, {"bfloat16": "float32", "float32": "bfloat16"}[means])
        )
        assert auto == same
        assert auto != other

    def test_more_draws_train_more_chunks_per_prefix(
        self, cache: Path, recipe: TrainRecipe, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = Trainer(CachedPrefixes(cache), dataclasses.replace(recipe, flow=FlowRecipe(draws=5)))
        seen: list[tuple[int, int]] = []
        trainer.expert.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), args[3].batch)))
        trainer.step(0, next(trainer.data.batches(0, 1)))
        assert seen == [(40, 8)]

    def test_the_policy_has_the_averaged_weights_and_the_training_statistics(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path
    ) -> None:
        newest = sorted((uninterrupted / "checkpoints").iterdir())[-1]
        policy, average = (
            load_file(uninterrupted / "policy" / "expert.safetensors"),
            load_file(newest / "average.safetensors"),
        )
        assert policy.keys() == average.keys()
        assert all(torch.equal(policy[name], average[name]) for name in policy)
        data = Trainer(CachedPrefixes(cache), recipe).data
        bundle = read_bundle(uninterrupted / "policy")
        assert bundle.state_normalizer == data.state_normalizer
        assert bundle.action_normalizer == data.action_normalizer
        assert (uninterrupted / "policy" / SAMPLES).read_bytes() == (cache / SAMPLES).read_bytes()

    def test_a_dry_run_writes_nothing_and_reports_sizes(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        trainer = Trainer(CachedPrefixes(cache), recipe)
        dry = trainer.dry_run()
        assert list(tmp_path.iterdir()) == []
        assert dry.parameters == sum(p.numel() for p in trainer.expert.parameters())
        assert (dry.rows, dry.validation_rows, dry.steps) == (40, 8, 12)
        assert dry.epochs == 12 * 8 / 40


class TestNonFinite:
    def test_a_bad_number_stops_the_run_and_names_its_rows(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        trainer, run = Trainer(CachedPrefixes(cache), recipe), tmp_path / "run"
        row = LENGTH * trainer.data.train_episodes[1] + 5  # row 5 of an episode

        def spoil(step: int, values: dict[str, float]) -> None:
            if step == 6:
                trainer.source.table.action[row] = np.nan

        with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step \d+; rows of the batch: ") as error:
            trainer.train(run, on_step=spoil)
        named = {int(n) for n in re.findall(r"\d+", error.value.message.split("rows of the batch:")[1])}
        assert len(named) == recipe.batch
        assert named & {
            row - 3,
            row - 2,
            row - 1,
            row,
        }  # a chunk of four steps that starts at one of these rows contains the bad number
        self.check_kept(cache, recipe, uninterrupted, run)

    def test_a_bad_gradient_stops_the_run_before_the_step(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        """The loss is finite but its gradient is not: the step would corrupt the next checkpoint."""
        trainer, run = Trainer(CachedPrefixes(cache), recipe), tmp_path / "run"

        def spoil(step: int, values: dict[str, float]) -> None:
            if step == 6:
                trainer.expert.action_encoder.weight.register_hook(lambda gradient: gradient * float("inf"))

        with pytest.raises(NonFiniteLossError, match=r"gradient's norm is \S+ at step 7; rows of the batch: "):
            trainer.train(run, on_step=spoil)
        assert all(bool(torch.isfinite(p).all()) for p in trainer.expert.parameters())
        self.check_kept(cache, recipe, uninterrupted, run)

    def check_kept(self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, run: Path) -> None:
        """Check that the last good checkpoint is kept, and that the run finishes with undamaged data."""
        newest = sorted((run / "checkpoints").iterdir())[-1]
        assert newest.name in ("step-000005", "step-000010")
        assert all(bool(torch.isfinite(t).all()) for t in load_file(newest / "model.safetensors").values())
        Trainer(CachedPrefixes(cache), recipe).train(run)
        assert result_of(run) == result_of(uninterrupted)


class TestRefusal:
    def test_a_run_in_shard_order_does_not_resume_on_other_shards(
        self, cache: Path, dataset: MemoryDataset, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        build_cache(dataset, ArithmeticEditor(), other, FLOAT32, BuildSettings(shard_mb=0.01))
        short = dataclasses.replace(recipe, steps=2)
        for shuffle in ("rows", "shards"):
            by = dataclasses.replace(short, shuffle=shuffle)
            Trainer(CachedPrefixes(cache), by).train(tmp_path / shuffle)
        Trainer(CachedPrefixes(other), short).train(tmp_path / "rows")
        with pytest.raises(RunError, match="holds a run that differs in its shards: "):
            Trainer(CachedPrefixes(other), by).train(tmp_path / "shards")

    @pytest.mark.parametrize(
        ("key", "what", "change"),
        [
            ("fingerprint", "editor fingerprint", {"editor": ArithmeticEditor(weights="trained longer")}),
            ("dataset", "dataset", {"dataset": MemoryDataset([LENGTH] * EPISODES, identity="another")}),
            ("table", "states or actions", {"dataset": MemoryDataset([LENGTH] * EPISODES, shift=1.0)}),
            ("codec", "codec", {"codec": BFLOAT16}),
            ("stride", "stride", {"stride": 2}),
        ],
    )
    def test_a_run_of_another_cache_is_refused_with_both_values(
        self,
        cache: Path,
        recipe: TrainRecipe,
        uninterrupted: Path,
        tmp_path: Path,
        key: str,
        what: str,
        change: dict[str, Any],
    ) -> None:
        other = tmp_path / "other"
        build_cache(
            change.get("dataset", MemoryDataset([LENGTH] * EPISODES)),
            change.get("editor", ArithmeticEditor()),
            other,
            change.get("codec", FLOAT32),
            BuildSettings(stride=change.get("stride", 1)),
        )
        values = {
            "fingerprint": lambda manifest: manifest.digest,
            "dataset": lambda manifest: manifest.dataset.identity[:16],
            "table": lambda manifest: manifest.files["table.safetensors"][:16],
            "codec": lambda manifest: manifest.codec,
            "stride": lambda manifest: manifest.dataset.stride,
        }[key]
        there, here = values(read_manifest(cache)), values(read_manifest(other))
        run = shutil.copytree(uninterrupted, tmp_path / "run")
        with pytest.raises(RunError) as error:
            Trainer(CachedPrefixes(other), recipe).train(run)
        assert f"its {what}: {there}, but this run has {here}" in error.value.message
        assert files(run) == files(uninterrupted)

    def test_a_run_on_a_part_of_the_cache_does_not_resume_on_the_whole(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        growing = shutil.copytree(cache, tmp_path / "growing")
        finished = read_manifest(growing)
        put_manifest(storage_at(growing), dataclasses.replace(finished, shards=finished.shards[:-1]))
        rows = len(CacheReader(growing))
        Trainer(CachedPrefixes(growing), dataclasses.replace(recipe, steps=1)).train(tmp_path / "run")
        put_manifest(storage_at(growing), finished)
        with pytest.raises(RunError, match=f"its rows: {rows}, but this run has {EPISODES * LENGTH}"):
            Trainer(CachedPrefixes(growing), dataclasses.replace(recipe, steps=1)).train(tmp_path / "run")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": 11}, "a run of 12 steps, but this run has only 11"),
            ({"seed": 1}, "seed = 0, but this run has 1"),
            ({"batch": 4}, "batch = 8, but this run has 4"),
            ({"flow": FlowRecipe(shift=5.0, inference_steps=2, draws=3)}, "flow.draws = 2, but this run has 3"),
            ({"normalize_state": "mean_std"}, "normalize_state = min_max, but this run has mean_std"),
        ],
    )
    def test_a_run_of_another_recipe_is_refused_with_both_values(
        self,
        cache: Path,
        recipe: TrainRecipe,
        uninterrupted: Path,
        tmp_path: Path,
        change: dict[str, Any],
        message: str,
    ) -> None:
        run = shutil.copytree(uninterrupted, tmp_path / "run")
        with pytest.raises(RunError) as error:
            Trainer(CachedPrefixes(cache), dataclasses.replace(recipe, **change)).train(run)
        assert message in error.value.message
        assert files(run) == files(uninterrupted)

    def test_a_folder_with_something_else_is_refused_and_kept(
        self, cache: Path, recipe: TrainRecipe, tmp_path: Path
    ) -> None:
        (tmp_path / "config.yaml").write_text("mine: true\n")
        with pytest.raises(UsageError, match="not a run"):
            Trainer(CachedPrefixes(cache), recipe).train(tmp_path)
        assert files(tmp_path) == {"config.yaml": b"mine: true\n"}

    def test_a_damaged_run_file_is_a_clear_error(
        self, cache: Path, recipe: TrainRecipe, uninterrupted: Path, tmp_path: Path
    ) -> None:
        run = shutil.copytree(uninterrupted, tmp_path / "run")
        (run / "run.json").write_text("{")
        with pytest.raises(RunError, match=r"run\.json is damaged"):
            Trainer(CachedPrefixes(cache), recipe).train(run)


class TestFresh:
    def train(self, cache: Path, run: Path, *more: str) -> int:
        small = ["--steps", "1", "--batch", "8", "--set", "expert.hidden=16"]
        return app.run(["--quiet", "train-expert", "--cache", str(cache), "--out", str(run), *small, *more])

    def test_fresh_starts_a_run_over(self, cache: Path, uninterrupted: Path, tmp_path: Path) -> None:
        run = shutil.copytree(uninterrupted, tmp_path / "run")
        assert self.train(cache, run) == 1  # the recipe differs
        assert self.train(cache, run, "--fresh") == 0
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]

    def test_fresh_deletes_only_runs(self, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "one.txt").write_text("mine")
        assert self.train(cache, tmp_path, "--fresh") == 2
        assert "not a run" in capsys.readouterr().err
        assert files(tmp_path) == {"photos/one.txt": b"mine"}

    def test_fresh_does_not_delete_the_cache(self, cache: Path, tmp_path: Path) -> None:
        copied = shutil.copytree(cache, tmp_path / "cache")
        assert self.train(copied, copied, "--fresh") == 2
        assert files(copied) == files(cache)


def weights_after(cache: Path, recipe: TrainRecipe) -> dict[str, list[float]]:
    trainer = Trainer(CachedPrefixes(cache), recipe)
    for step, batch in enumerate(trainer.data.batches(0, 4)):
        trainer.step(step, batch)
    return {name: p.flatten().tolist() for name, p in trainer.expert.named_parameters()}


def upside_down(prefix: PrefixKV) -> PrefixKV:
    layers = tuple(dataclasses.replace(kv, k=-2 * kv.k.flip(1), v=3 * kv.v) for kv in prefix.layers)
    return PrefixKV(layers, prefix.valid)
