"""`data.instructions`: which texts are sentences, names, or missing."""

from __future__ import annotations

import warnings

import pytest

from imagewam_cli.data.instructions import is_identifier, require_instruction, warn_of_identifiers
from imagewam_cli.errors import DatasetError, ImagewamWarning


@pytest.mark.parametrize(
    "text",
    [
        "PosttrainPnPNovelFromTrayToPotSplitA",
        "pick_up_the_cup",
        "gym_pusht/PushT-v0",
        "reach-v3",
        "task0",
        "17",
        "None",
        "nan",
        " unknown ",
        "libero.spatial",
    ],
)
def test_names_and_missing_values_are_no_sentences(text: str) -> None:
    assert is_identifier(text)
    with pytest.warns(ImagewamWarning, match=r"sets/a: 1 instruction looks like a name.*--instruction-key"):
        warn_of_identifiers(["pick up the cup", text], "sets/a")


@pytest.mark.parametrize(
    "text",
    [
        "pick up the cup",
        "Pick up cup 3",
        "grasp",
        "Jump!",
        "把红色方块放到蓝色区域",
        "カップを取る",
        "put X on top_left",
        "stop.",
    ],
)
def test_sentences_are_not_taken_for_names(text: str) -> None:
    assert not is_identifier(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_identifiers([text], "sets/a")


def test_a_warning_quotes_only_a_few() -> None:
    with pytest.warns(ImagewamWarning, match=r"5 instructions look like a name.*'t0', 't1', 't2', \.\.\.;"):
        warn_of_identifiers([f"t{i}" for i in range(5)], "sets/a")


@pytest.mark.parametrize(
    ("value", "problem"), [(None, "is missing"), ("", "is empty"), (" \n", "is empty"), (3, "is 3, not text")]
)
def test_a_missing_instruction_is_refused_with_its_place(value: object, problem: str) -> None:
    with pytest.raises(DatasetError, match=f"file, episode 4: the instruction {problem}") as error:
        require_instruction(value, "file, episode 4")
    assert "--instruction-key" in str(error.value.hint)


def test_an_instruction_is_kept_as_it_is() -> None:
    assert require_instruction(" pick it\nup ", "file") == " pick it\nup "
