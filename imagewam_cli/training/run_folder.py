"""The folder of a run: one writer at a time, what a later command may change, and how a run is deleted to start over.

A run may be extended: a recipe that differs only in having more steps continues from the last checkpoint. The learning
rate is a function of the step and of the number of steps. `RunRecord.learning_rate` therefore keeps, for each step, the
number of steps that the run had when the step was taken.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagewam_cli.config import dump_json, dump_yaml, from_dict, load_yaml, to_dict
from imagewam_cli.data.splits import Split
from imagewam_cli.errors import ConfigError, RunError, UsageError, warn
from imagewam_cli.files import write_atomically
from imagewam_cli.kvcache.format.manifest import DATASET_FILES
from imagewam_cli.lock import LOCK, write_lock
from imagewam_cli.training.recipe import TrainRecipe
from imagewam_cli.workspace import RUN_MARKER

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
POLICY = "policy"
RESULT = "result.json"

_FREE = ("log_every", "validate_every", "save_every")
"""Keys of the recipe that change no number of a policy: they may differ when a run is resumed."""
_SPLIT, _EXTENSIONS = "split", "extensions"
"""Keys of run.json."""
_OWN = (
    RESULT,
    "metrics.jsonl",
    "tensorboard",
    "eval",
    "attention",
    DATASET_FILES,
    POLICY,
    CHECKPOINTS,
    CONFIG,
    RUN_MARKER,
)
"""What a run and its evaluations write. run.json is deleted last, so that a half-deleted run is still known as one."""
_PROCESSES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables in which torchrun, srun and mpirun say how many processes they started."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """More steps for a run.

    at_step: step of the checkpoint from which it continued; from_steps, to_steps: its number of steps before and since.
    """

    at_step: int
    from_steps: int
    to_steps: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What the folder of a run says about it.

    split: the episodes for training and for validation; None if an older imagewam began the run.
    steps_before: number of steps of the run so far; the recipe may have more.
    """

    folder: Path
    recipe: TrainRecipe
    split: Split | None
    steps_before: int
    extensions: tuple[Extension, ...] = ()

    def begin(self, first: int) -> RunRecord:
        """Note that training goes on after `first` steps. Return the record of the run from now on.

        A run that gets more steps is warned of and recorded. An unfinished run has no result.
        """
        if first < self.recipe.steps:
            (self.folder / RESULT).unlink(missing_ok=True)
        if self.steps_before == self.recipe.steps:
            return self
        extensions = tuple(e for e in self.extensions if e.at_step < first)
        if first > 0:
            last, following = self.learning_rate(first - 1), self.recipe.learning_rate(first)
            warn(
                f"{self.folder} is extended from {self.steps_before} to {self.recipe.steps} steps: from step {first} "
                f"on, the learning rate follows the schedule of {self.recipe.steps} steps, and changes from {last:.2g} "
                f"to {following:.2g}"
            )
            before = self._steps_at(first - 1)
            extensions += (Extension(at_step=first, from_steps=before, to_steps=self.recipe.steps),)
        marker = read_marker(self.folder) | {_EXTENSIONS: [to_dict(e) for e in extensions]}
        write_atomically(self.folder / RUN_MARKER, dump_json(marker).encode())
        write_atomically(self.folder / CONFIG, dump_yaml(self.recipe).encode())
        return dataclasses.replace(self, extensions=extensions, steps_before=self.recipe.steps)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, by the schedule over the number of steps that the run had then."""
        return dataclasses.replace(self.recipe, steps=self._steps_at(step)).learning_rate(step)

    def _steps_at(self, step: int) -> int:
        return next((e.from_steps for e in self.extensions if step < e.at_step), self.steps_before)


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. It is created, and removed at the end if it is empty.

    Raises:
        RunError: another process trains there.
    """
    with write_lock(folder, error=RunError, hint=_lock_hint()):
        yield


def require_unlocked(folder: Path) -> None:
    """Check early that no other process trains in the folder. Training locks it for good.

    Raises:
        RunError: another process trains there.
    """
    if (folder / LOCK).exists():
        with locked_run(folder):
            pass


def split_entry(split: Split) -> dict[str, object]:
    """Return the entry of run.json for a split: numbers of episodes, as text such as "0-9,12"."""
    return {_SPLIT: split.to_dict()}


def open_record(folder: Path, recipe: TrainRecipe) -> RunRecord:
    """Read the record of the run in this folder, which holds run.json, and write a missing config.yaml.

    Raises:
        RunError: the run has another recipe or more steps, or is damaged.
    """
    config, steps = folder / CONFIG, recipe.steps
    if config.exists() or (folder / CHECKPOINTS).exists():
        before = load_yaml(config, TrainRecipe)
        _require_same_recipe(folder, before, recipe)
        steps = before.steps
    if steps == recipe.steps:  # an extension is recorded first, see `RunRecord.begin`
        write_atomically(config, dump_yaml(recipe).encode())
    marker = read_marker(folder)
    try:
        split = Split.from_dict(marker[_SPLIT]) if _SPLIT in marker else None
        extensions = tuple(from_dict(Extension, e, source=_EXTENSIONS) for e in marker.get(_EXTENSIONS, []))
    except (UsageError, ConfigError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / RUN_MARKER} is damaged: {error}", "start over with --fresh") from None
    return RunRecord(folder=folder, recipe=recipe, split=split, steps_before=steps, extensions=extensions)


def read_marker(folder: Path) -> dict[str, Any]:
    """Read run.json.

    Raises:
        RunError: it is damaged.
    """
    path = folder / RUN_MARKER
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it is not a mapping")
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}", "start over with --fresh") from None
    return values


def delete_run(folder: Path) -> None:
    """Delete what the run in this folder and its evaluations wrote. Files of others stay.

    Raises:
        UsageError: the folder is not empty and holds no run.
    """
    if not (folder / RUN_MARKER).exists():
        if any(path.name != LOCK for path in folder.iterdir()):
            raise UsageError(
                f"{folder} is not a run, so --fresh does not delete it", "choose another folder with --out"
            )
        return
    for name in _OWN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _require_same_recipe(folder: Path, before: TrainRecipe, recipe: TrainRecipe) -> None:
    there, here = _flat(to_dict(before)), _flat(to_dict(recipe))
    elsewhere = "choose another folder with --out, or start over with --fresh"
    for key in here:
        if key not in (*_FREE, "steps") and there[key] != here[key]:
            raise RunError(f"{folder} holds a run with {key} = {there[key]}, but this run has {here[key]}", elsewhere)
    if recipe.steps < before.steps:
        raise RunError(
            f"{folder} holds a run of {before.steps} steps, but this run has only {recipe.steps}",
            f"pass --steps {before.steps} to resume it, or more to extend it; otherwise {elsewhere}",
        )


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _lock_hint() -> str:
    for variable in _PROCESSES:
        count = os.environ.get(variable, "")
        if count.isdigit() and int(count) > 1:
            return f"training runs in one process, so start it once: {variable} is {count}"
    return "wait for it to end, or choose another folder with --out"
