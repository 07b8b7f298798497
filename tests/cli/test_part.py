"""The part of a cache: from --part, from SLURM arrays and from torchrun."""

from __future__ import annotations

import pytest

from imagewam_cli.cli.part import assigned_part
from imagewam_cli.errors import UsageError
from imagewam_cli.kvcache.format.manifest import BuildPart

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "5"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, None),
        ("1/3", {}, BuildPart(index=1, count=3)),
        ("1/3", ARRAY, BuildPart(index=1, count=3)),
        (None, ARRAY, BuildPart(index=4, count=5)),
        (None, ARRAY | {"SLURM_ARRAY_TASK_STEP": "2"}, BuildPart(index=2, count=5)),
        (None, {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}, BuildPart(index=0, count=2)),
        (None, TORCHRUN, BuildPart(index=2, count=4)),
        (None, {"RANK": "2", "WORLD_SIZE": "4"}, None),
    ],
)
def test_a_part_comes_from_the_option_or_the_launcher(
    text: str | None, environment: dict[str, str], expected: BuildPart | None
) -> None:
    assert assigned_part(text, environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "1"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"},
    ],
    ids=["--array=2", "--array=1,5,9"],
)
def test_an_array_with_gaps_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="cannot be mapped to a part") as error:
        assigned_part(None, environment)
    assert "--part i/N" in str(error.value.hint)


@pytest.mark.parametrize("text", ["1", "a/b", "1/", "/3", "-1/3", "3/3"])
def test_a_malformed_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        assigned_part(text, {})
