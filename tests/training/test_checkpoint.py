"""Test `training.checkpoint`: round trips, damaged checkpoints, full disks."""

from __future__ import annotations

import copy
import errno
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewam_cli.errors import ImagewamWarning, RunError
from imagewam_cli.training.checkpoint import load_checkpoint, save_checkpoint
from imagewam_cli.training.optimizer import ExpertOptimizer
from imagewam_cli.training.recipe import OptimizerRecipe


class State:
    """A model, its average and its optimizer after some steps of a regression."""

    def __init__(self, seed: int, *, inputs: int = 3, steps: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        layers = {"blocks": nn.Sequential(nn.Linear(inputs, 4)), "activation": nn.SiLU(), "head": nn.Linear(4, 1)}
        self.model = nn.Sequential(OrderedDict(layers))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.average = {name: p.detach() * 0.5 for name, p in self.model.named_parameters()}
        self.optimizer = ExpertOptimizer(self.model, OptimizerRecipe(learning_rate=0.1))
        self.x = torch.randn(8, inputs, generator=torch.Generator().manual_seed(0))
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()

    def save(self, folder: Path, step: int) -> None:
        save_checkpoint(folder, step, self.model, self.average, self.optimizer)

    def load(self, folder: Path) -> int:
        return load_checkpoint(folder, self.model, self.average, self.optimizer)

    def weights(self) -> dict[str, Tensor]:
        return copy.deepcopy(self.model.state_dict())


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_weights_average_and_step_are_restored(tmp_path: Path) -> None:
    saved, loaded = State(1, steps=3), State(2)
    saved.save(tmp_path, 3)
    assert loaded.load(tmp_path) == 3
    assert same(loaded.weights(), saved.weights())
    assert same(loaded.average, saved.average)


def test_the_optimizer_resumes_exactly(tmp_path: Path) -> None:
    saved, loaded = State(1, steps=3), State(2)
    saved.save(tmp_path, 3)
    loaded.load(tmp_path)
    for state in (saved, loaded):
        state.step()
        state.step()
    assert same(loaded.weights(), saved.weights())


def test_without_a_checkpoint_nothing_changes(tmp_path: Path) -> None:
    state = State(1)
    before = state.weights()
    assert state.load(tmp_path / "nowhere") == 0
    assert same(state.weights(), before)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    state = State(1, steps=1)
    for step in (5, 10, 15, 20):
        state.save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000015", "step-000020"]


def test_step_numbers_are_compared_as_numbers_not_as_text(tmp_path: Path) -> None:
    state = State(1, steps=1)
    for step in (999_000, 999_999, 1_000_500):
        state.save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1000500", "step-999999"]
    assert state.load(tmp_path) == 1_000_500


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut off", "noise"])
def test_a_damaged_checkpoint_is_a_clear_error(tmp_path: Path, name: str, how: str) -> None:
    State(1, steps=2).save(tmp_path, 2)
    path = tmp_path / "step-000002" / name
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut off": whole[: len(whole) // 2], "noise": b"\xff" * len(whole)}[how])
    with pytest.raises(RunError, match="step-000002") as error:
        State(2).load(tmp_path)
    assert error.value.hint is not None
    assert "--fresh" in error.value.hint


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": null}'])
def test_a_state_without_a_step_is_a_clear_error(tmp_path: Path, text: str) -> None:
    State(1, steps=2).save(tmp_path, 2)
    (tmp_path / "step-000002" / "state.json").write_text(text)
    with pytest.raises(RunError, match="step-000002"):
        State(2).load(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    State(1, steps=2).save(tmp_path, 2)
    with pytest.raises(RunError, match=r"4, 3.*4, 5"):
        State(2, inputs=5).load(tmp_path)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(1, steps=2)
    state.save(tmp_path, 2)
    before = state.weights()
    state.step()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            state.save(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]
    loaded = State(2)
    assert loaded.load(tmp_path) == 2
    assert same(loaded.weights(), before)


def test_an_incomplete_checkpoint_of_a_killed_run_is_ignored(tmp_path: Path) -> None:
    state = State(1, steps=2)
    state.save(tmp_path, 2)
    (tmp_path / ".step-000005.partial").mkdir()
    (tmp_path / "step-old").mkdir()
    assert State(2).load(tmp_path) == 2


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    old, new = State(1, steps=2), State(2, steps=2)
    old.save(tmp_path, 2)
    new.save(tmp_path, 2)
    loaded: Any = State(3)
    loaded.load(tmp_path)
    assert same(loaded.weights(), new.weights())


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["missing", "cut off", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    older, newer, loaded = State(1, steps=2), State(1, steps=4), State(2)
    older.save(tmp_path, 2)
    newer.save(tmp_path, 4)
    path = tmp_path / "step-000004" / name
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        path.write_bytes(whole[: len(whole) // 2] if how == "cut off" else flipped)
    if (name, how) == ("state.json", "flipped"):  # the JSON stays valid only by chance
        path.write_bytes(b"{}")
    with pytest.warns(ImagewamWarning, match=r"step-000004 is damaged .* training goes on from step 2"):
        assert loaded.load(tmp_path) == 2
    assert same(loaded.weights(), older.weights())
    assert same(loaded.average, older.average)
    for state in (older, loaded):
        state.step()
    assert same(loaded.weights(), older.weights())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000004.damaged"]
    for step in (3, 4, 5):
        loaded.save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000004.damaged", "step-000005"]


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path) -> None:
    """Older checkpoints have none."""
    State(1, steps=2).save(tmp_path, 2)
    (tmp_path / "step-000002" / "state.json").write_text('{"step": 2}')
    assert State(2).load(tmp_path) == 2
