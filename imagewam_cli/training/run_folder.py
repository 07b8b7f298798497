"""The folder of a run: one writer at a time, and how a run is deleted to start over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imagewam_cli.errors import RunError, UsageError
from imagewam_cli.kvcache.format.manifest import DATASET_FILES
from imagewam_cli.lock import LOCK, write_lock
from imagewam_cli.workspace import RUN_MARKER

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
POLICY = "policy"
RESULT = "result.json"

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


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is created if it does not exist.

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


def _lock_hint() -> str:
    for variable in _PROCESSES:
        count = os.environ.get(variable, "")
        if count.isdigit() and int(count) > 1:
            return f"training runs in one process, so start it once: {variable} is {count}"
    return "wait for it to end, or choose another folder with --out"
