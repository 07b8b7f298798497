"""Parts told, and parts that SLURM and torchrun tell."""

from __future__ import annotations

import pytest

from imagewam_cli.cli.share import share_of
from imagewam_cli.errors import UsageError
from imagewam_cli.kvcache.format.manifest import Share

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "5"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, None),
        ("1/3", {}, Share(index=1, count=3)),
        ("1/3", ARRAY, Share(index=1, count=3)),
        (None, ARRAY, Share(index=4, count=5)),
        (None, ARRAY | {"SLURM_ARRAY_TASK_STEP": "2"}, Share(index=2, count=5)),
        (None, {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}, Share(index=0, count=2)),
        (None, TORCHRUN, Share(index=2, count=4)),
        (None, {"RANK": "2", "WORLD_SIZE": "4"}, None),
    ],
)
def test_share(text: str | None, environment: dict[str, str], expected: Share | None) -> None:
    assert share_of(text, environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "1"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"},
    ],
    ids=["--array=2", "--array=1,5,9"],
)
def test_an_array_with_gaps_does_not_tell_the_part(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="cannot be told") as error:
        share_of(None, environment)
    assert "--part i/N" in str(error.value.hint)


@pytest.mark.parametrize("text", ["1", "a/b", "1/", "/3", "-1/3", "3/3"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        share_of(text, {})
