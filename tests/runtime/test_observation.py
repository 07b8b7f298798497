"""Test which observations a policy takes, and what it says about the others."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagewam_cli.runtime.observation import Observation, ObservationError, ObservationReader, read_picture

READER = ObservationReader(cameras=("top", "wrist"), state_names=("x", "y"))
PICTURE = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
GREY = PICTURE[:, :, 0]
OPAQUE = np.dstack([PICTURE, np.full((9, 12), 255, np.uint8)])


def observation(**parts: Any) -> Observation:
    given = {"images": {"top": PICTURE, "wrist": PICTURE}, "state": np.zeros(2, np.float32), "instruction": "go"}
    return Observation(**given | parts)


def palette() -> Image.Image:
    return Image.fromarray(GREY).convert("P")


@pytest.mark.parametrize(
    "picture",
    [
        PICTURE,
        PICTURE[::-1][::-1],
        np.asfortranarray(PICTURE),
        PICTURE.transpose(2, 0, 1),
        PICTURE[None],
        PICTURE.transpose(2, 0, 1)[None, None],
        PICTURE.tolist(),
        PICTURE.astype(np.int64),
        PICTURE.astype(">i4"),
        (PICTURE / 255).astype(np.float32),
        (PICTURE / 255).astype(np.float16),
        (PICTURE / 255).astype(">f8"),
        PICTURE.transpose(2, 0, 1) / 255 * 1.0001,
        torch.from_numpy(PICTURE),
        torch.from_numpy(PICTURE).permute(2, 0, 1).float() / 255,
        torch.from_numpy(PICTURE).float().div(255).requires_grad_(),
        OPAQUE,
        OPAQUE.transpose(2, 0, 1),
        OPAQUE / 255,
        Image.fromarray(PICTURE),
        Image.fromarray(OPAQUE),
    ],
)
def test_forms_with_one_meaning_become_the_same_picture(picture: Any) -> None:
    found = read_picture(picture, "top")
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, PICTURE)


@pytest.mark.parametrize(
    "picture",
    [GREY, GREY[:, :, None], GREY[None], torch.from_numpy(GREY[None].copy()), Image.fromarray(GREY), palette()],
)
def test_grey_becomes_three_equal_channels(picture: Any) -> None:
    np.testing.assert_array_equal(read_picture(picture, "top"), np.repeat(GREY[:, :, None], 3, axis=2))


def test_a_picture_that_may_not_be_written_is_taken() -> None:
    fixed = PICTURE.copy()
    fixed.setflags(write=False)
    np.testing.assert_array_equal(read_picture(fixed, "top"), PICTURE)


def test_an_ordinary_picture_is_not_copied() -> None:
    assert np.shares_memory(read_picture(PICTURE, "top"), PICTURE)


@pytest.mark.parametrize(
    ("picture", "given"),
    [
        (np.zeros((0, 0, 3), np.uint8), r"an empty picture, uint8 \(0, 0, 3\)"),
        (np.zeros((0,), np.uint8), r"uint8 \(0,\)"),
        (np.zeros((1, 1, 3), np.uint8), r"uint8 \(1, 1, 3\)"),
        (np.zeros((9, 12, 2), np.uint8), r"uint8 \(9, 12, 2\)"),
        (np.zeros((9, 3, 12), np.uint8), r"uint8 \(9, 3, 12\)"),
        (np.stack([PICTURE, PICTURE]), r"uint8 \(2, 9, 12, 3\)"),
        (PICTURE.astype(np.float32), r"float32 \(9, 12, 3\) from 0 to 255"),
        (PICTURE / np.float32(127.5) - 1, r"float32 \(9, 12, 3\) from -1 to 1"),
        (np.full((9, 12, 3), np.nan), r"float64 \(9, 12, 3\) from nan to nan"),
        ((PICTURE > 99).astype(np.float32), r"float32 \(9, 12, 3\) from 0 to 1 without any value between"),
        (PICTURE > 99, r"bool \(9, 12, 3\)"),
        (PICTURE.astype(np.int8), r"int8 \(9, 12, 3\)"),
        (PICTURE.astype(np.uint16), r"uint16 \(9, 12, 3\)"),
        (PICTURE.astype(np.int32) * 257, r"int32 \(9, 12, 3\) from 0 to 65535"),
        (GREY.astype(np.uint16), r"uint16 \(9, 12\)"),
        (GREY / 255, r"float64 \(9, 12\)"),
        (PICTURE.astype(complex), r"complex128 \(9, 12, 3\)"),
        (PICTURE.astype(object), r"object \(9, 12, 3\)"),
        (np.dstack([PICTURE, GREY]), r"uint8 \(9, 12, 4\) with a fourth channel from \d+ to 2\d\d"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "a picture of mode I;16"),
        (Image.fromarray(GREY.astype(np.float32)), "a picture of mode F"),
    ],
)
def test_a_picture_without_one_meaning_is_refused(picture: Any, given: str) -> None:
    with pytest.raises(ObservationError, match=rf"^camera 'top': got {given}; wanted uint8 \(height, width, 3\), RGB"):
        READER.read([observation(images={"top": picture, "wrist": PICTURE})])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "camera 'top' is None; wanted uint8"),
        ("frame.png", "camera 'top' is of type str; wanted uint8"),
        ({"bytes": b""}, "camera 'top' is of type dict; wanted uint8"),
        ([[1, 2], [3]], "camera 'top' is of type list that numpy cannot read"),
        (np.ma.masked_equal(PICTURE, PICTURE[0, 0, 0]), "camera 'top' has masked values"),
    ],
)
def test_what_is_no_picture_is_refused(picture: Any, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        READER.read([observation(images={"top": picture, "wrist": PICTURE})])


def test_floats_that_are_all_zero_are_black() -> None:
    np.testing.assert_array_equal(read_picture(np.zeros((9, 12, 3)), "top"), np.zeros((9, 12, 3), np.uint8))


def test_cameras_are_named_on_both_sides() -> None:
    with pytest.raises(ObservationError, match="no picture of camera 'wrist'; there are: top, front") as caught:
        READER.read([observation(images={"top": PICTURE, "front": PICTURE})])
    assert "the policy's cameras are named top, wrist" in (caught.value.hint or "")
    with pytest.raises(ObservationError, match="images is of type ndarray, but a mapping from camera to picture"):
        READER.read([observation(images=PICTURE)])


def test_other_cameras_are_ignored() -> None:
    (found,) = READER.read([observation(images={"top": PICTURE, "wrist": PICTURE, "depth": None})])
    assert list(found.images) == ["top", "wrist"]


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        (np.array([1, 2], np.float32), np.float32),
        (np.array([1, 2], ">f4"), np.float32),
        (np.array([1, 2], np.float16), np.float32),
        (np.array([2, 1], np.float64)[::-1], np.float64),
        (np.array([1, 2], np.int16), np.float64),
        ([1, 2], np.float64),
        ((1.0, True + True), np.float64),
        (torch.tensor([1.0, 2.0], requires_grad=True), np.float32),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), np.float32),
    ],
)
def test_states_become_floats_in_their_own_precision(state: Any, kept: type) -> None:
    (found,) = READER.read([observation(state=state)])
    assert found.state.dtype == kept
    assert found.state.dtype.isnative
    np.testing.assert_array_equal(found.state, [1, 2])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.array([np.nan, 1]), "the state is not finite: x is nan$"),
        (np.array([-np.inf, np.nan], np.float32), "the state is not finite: x is -inf, y is nan$"),
        (np.zeros((1, 2)), r"state has shape \(1, 2\), but the policy needs \(2,\): x, y"),
        (np.float32(1), r"state has shape \(\), but the policy needs \(2,\): x, y"),
        ([1, 2, 3], r"state has shape \(3,\), but the policy needs \(2,\): x, y"),
        (np.array([True, False]), "state has the type bool, but the policy needs numbers: x, y"),
        (np.array([1, None]), "state has the type object, but the policy needs numbers: x, y"),
        (["1", "2"], "state has the type <U1, but the policy needs numbers: x, y"),
        (np.array([1, 2j]), "state has the type complex128, but"),
        ([[1], [2, 3]], "state is of type list that numpy cannot read"),
        (None, r"state is None; wanted numbers \(2,\)"),
        ({"x": 1, "y": 2}, "state is of type dict; wanted numbers"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused(state: Any, message: str) -> None:
    with pytest.raises(ObservationError) as caught:
        READER.read([observation(state=state)])
    assert re.search(message, caught.value.message)
    assert "\n" not in str(caught.value)


def test_a_policy_without_a_state_ignores_it() -> None:
    for state in (None, np.zeros(7), np.array([np.nan])):
        (found,) = ObservationReader(("top",), ()).read([observation(state=state)])
        assert found.state.shape == (0,)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [(None, "instruction is None"), ("", "instruction is empty"), (" \n", "instruction is empty"), (b"go", "bytes")],
)
def test_an_instruction_that_says_nothing_is_refused(instruction: Any, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        READER.read([observation(instruction=instruction)])


def test_what_is_no_observation_is_refused() -> None:
    values: dict[str, Any] = {"images": {}, "state": [0, 0], "instruction": "go"}
    with pytest.raises(
        ObservationError, match="of type dict with the keys images, state, instruction has no attribute"
    ):
        READER.read([values])  # type: ignore[list-item]
    with pytest.raises(ObservationError, match="a single observation came, but a list of them is wanted"):
        READER.read(observation())  # type: ignore[arg-type]
    with pytest.raises(ObservationError, match="a single observation came"):
        READER.read(values)


def test_the_faulty_observation_of_a_batch_is_named() -> None:
    with pytest.raises(ObservationError, match=r"^observation 1: the state is not finite: y is nan"):
        READER.read([observation(), observation(state=np.array([0, np.nan]))])
    assert READER.read([]) == []
