"""Which part of the work is this process's: as it is told, or as SLURM's arrays and torchrun tell their processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagewam_cli.kvcache.format.manifest import Share


def share_of(text: str | None, environment: Mapping[str, str]) -> Share | None:
    """ "i/N" with i from 0; where nothing is given, the task of a SLURM array or the rank under torchrun; None: all.

    Raises:
        UsageError: not of that form, or no such part.
    """
    from imagewam_cli.errors import UsageError
    from imagewam_cli.kvcache.format.manifest import Share

    if text is not None:
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit()):
            raise UsageError(f"--part must look like 0/3, got {text!r}", "parts of N are 0/N to N-1/N")
        return Share(index=int(index), count=int(count))
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{k}", d)) for k, d in (("MIN", "0"), ("STEP", "1")))
        task, tasks = int(environment["SLURM_ARRAY_TASK_ID"]), int(environment["SLURM_ARRAY_TASK_COUNT"])
        if (task - first) // step >= tasks or (tasks == 1 and task > 0):
            raise UsageError(
                f"SLURM's array is task {task} of {tasks}: which part of how many that is cannot be told",
                "give --part i/N, also where one task of an array runs again",
            )
        return Share(index=(task - first) // step, count=tasks)
    if "TORCHELASTIC_RUN_ID" in environment:
        return Share(index=int(environment["RANK"]), count=int(environment["WORLD_SIZE"]))
    return None
