"""The part of a cache that this process builds: from --part, from a SLURM array, or from torchrun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagewam_cli.kvcache.format.manifest import BuildPart


def assigned_part(option: str | None, environment: Mapping[str, str]) -> BuildPart | None:
    """Return the part that an option like "0/3" names, or else the part of the SLURM array task or torchrun rank.

    Returns None if none of the three is set: the process builds the whole cache.

    Raises:
        UsageError: the option is not of the form i/N, the part does not exist, or the array has gaps.
    """
    from imagewam_cli.errors import UsageError
    from imagewam_cli.kvcache.format.manifest import BuildPart

    if option is not None:
        index, _, count = option.partition("/")
        if not (index.isdigit() and count.isdigit()):
            raise UsageError(f"--part must look like 0/3, got {option!r}", "valid parts are 0/N to (N-1)/N")
        return BuildPart(index=int(index), count=int(count))
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{k}", d)) for k, d in (("MIN", "0"), ("STEP", "1")))
        task, tasks = int(environment["SLURM_ARRAY_TASK_ID"]), int(environment["SLURM_ARRAY_TASK_COUNT"])
        # an array with gaps, such as --array=1,5,9, has tasks but no consecutive numbers
        if (task - first) // step >= tasks or (tasks == 1 and task > 0):
            raise UsageError(
                f"task {task} of a SLURM array of {tasks} tasks cannot be mapped to a part",
                "pass --part i/N if the array has gaps, or if you rerun a single task of an array",
            )
        return BuildPart(index=(task - first) // step, count=tasks)
    if "TORCHELASTIC_RUN_ID" in environment:
        return BuildPart(index=int(environment["RANK"]), count=int(environment["WORLD_SIZE"]))
    return None
