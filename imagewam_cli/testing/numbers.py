"""Promises about the numbers: a prefix is a pure function of picture, instruction, weights and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from imagewam_cli.errors import UsageError
from imagewam_cli.testing.subject import (
    LONG,
    OTHER,
    REORDERED,
    SHORT,
    TWO_CAMERAS,
    ContractError,
    NotApplicable,
    Subject,
    counting_tokens,
    require,
    require_different,
    require_equal,
)


def same_input_gives_the_same_bits(subject: Subject) -> None:
    """the same input gives the same bits, twice in one editor and again in another"""
    fix = "draw noise with `target_noise`, and take the mean of the VAE's distribution, never a sample"
    first = _prefix(subject, SHORT)
    require_equal(_prefix(subject, SHORT), first, "encoded twice", fix)
    editor = subject.load_anew()
    again = counting_tokens(editor.encode(subject.pictures(1), (SHORT,)), editor.spec, 0)
    require_equal(again, first, "loaded and encoded again", fix)


def a_batch_is_its_rows(subject: Subject) -> None:
    """rows encoded together are what they are alone"""
    editor, instructions, pictures = subject.load(), (SHORT, LONG, OTHER), subject.pictures(3)
    together = editor.encode(pictures, instructions)
    for i, instruction in enumerate(instructions):
        alone = counting_tokens(editor.encode(pictures[i : i + 1], (instruction,)), editor.spec, 0)
        require_equal(
            counting_tokens(together, editor.spec, i),
            alone,
            f"row {i} of a batch of 3, beside the same row alone",
            "no row may see another's: mask padded text in every attention, draw the same noise for all rows",
            rounding=True,
        )


def padding_changes_nothing(subject: Subject) -> None:
    """an instruction is what it is alone, when a longer one has been announced too"""
    refused = []
    for padding in ("trim", "keep"):
        try:
            _compare_paddings(subject, padding)
        except UsageError as error:
            refused.append(error.message)
    require(len(refused) < 2, f"every `text_padding` is refused: {refused}", "accept the one that is the default")


def _compare_paddings(subject: Subject, padding: str) -> None:
    changes: dict[str, Any] = {"text_padding": padding, "segments": subject.segments()}
    shown = [_prefix(subject, SHORT, announced=announced, **changes) for announced in ((SHORT,), (SHORT, LONG))]
    require_equal(
        shown[1],
        shown[0],
        f"text_padding {padding}: {SHORT!r} padded to the length of {LONG!r}",
        "hide padding from every attention, number tokens as without it, and mark it False in `valid`",
        rounding=True,
    )


def another_picture_changes_the_prefix(subject: Subject) -> None:
    """another picture gives another prefix"""
    require_different(
        _prefix(subject, SHORT, seed=1),
        _prefix(subject, SHORT),
        "two pictures of noise give one prefix: the picture does not reach the kept tokens",
        "see what `run` does with its pictures, and whether the default timestep leaves anything of them",
    )


def every_camera_changes_the_prefix(subject: Subject) -> None:
    """with two cameras, another picture of either gives another prefix, in each camera layout that takes two"""
    for changes in subject.with_two_cameras():
        editor = subject.load(**changes)
        (before,), (after,) = (subject.pictures(1, seed, TWO_CAMERAS) for seed in (0, 1))
        shown = [before, *(before | {camera: after[camera]} for camera in TWO_CAMERAS)]
        first, *others = (counting_tokens(editor.encode([row], (SHORT,)), editor.spec, 0) for row in shown)
        del editor  # before the next one is loaded
        for camera, other in zip(TWO_CAMERAS, others, strict=True):
            require_different(
                other,
                first,
                f"camera_layout {changes['camera_layout']}: two pictures of the camera {camera!r} give one prefix",
                "`run` gets the cameras of `settings` side by side: each must reach the kept tokens",
            )


def another_timestep_changes_the_prefix(subject: Subject) -> None:
    """another timestep (`--timestep`) gives another prefix"""
    default, before = subject.load().spec.timestep, _prefix(subject, SHORT)
    other = 0.5 if default != 0.5 else 1.0
    try:
        spec = subject.load(timestep=other).spec
    except UsageError as error:
        raise NotApplicable(f"it has one timestep alone: {error.message}") from None
    require(spec.timestep == other, f"asked for timestep {other}, the spec says {spec.timestep}", "see `spec`")
    require_different(
        _prefix(subject, SHORT, timestep=other),
        before,
        f"the timesteps {other} and {default} give one prefix",
        "give the denoiser `settings.timestep` in its own units, and let no other stand in `run`",
    )


def another_instruction_changes_the_prefix(subject: Subject) -> None:
    """another instruction gives another prefix"""
    require_different(
        _prefix(subject, REORDERED),
        _prefix(subject, LONG),
        f"{LONG!r} and {REORDERED!r} give one prefix: the instruction does not reach the kept tokens",
        "see what `embed` returns and what `run` does with it; a prompt_template needs {instruction}",
    )


def a_blank_picture_hides_everything(subject: Subject) -> None:
    """with `--blank-images` it makes no difference what the camera shows"""
    blank = [_prefix(subject, SHORT, seed=seed, blank_images=True) for seed in (0, 1)]
    require_equal(
        blank[1],
        blank[0],
        "with `blank_images`, two pictures",
        "replace the picture before anything reads it, a text encoder that sees it included",
    )
    require_different(
        blank[0],
        _prefix(subject, SHORT),
        "a grey picture and one of noise give one prefix: `blank_images` does nothing",
        "replace the picture by grey in `encode` where the settings say so",
    )


def random_weights_change_the_prefix(subject: Subject) -> None:
    """with `--random-weights` prefix and fingerprint are others"""
    require_different(
        _prefix(subject, SHORT, random_weights=True),
        _prefix(subject, SHORT),
        "`random_weights` gives the prefix of the trained weights",
        "draw the denoiser's weights anew where the settings say so (`pipeline_folder.randomize`)",
    )
    same = subject.load().fingerprint() == subject.load(random_weights=True).fingerprint()
    if same:
        raise ContractError("`random_weights` leaves the fingerprint as it is", "build it of all the settings")


def _prefix(
    subject: Subject, instruction: str, seed: int = 0, announced: Sequence[str] = (), **changes: Any
) -> dict[str, Tensor]:
    """One row. The editor is let go of, so that the next may take its place."""
    editor = subject.load(announced, **changes)
    return counting_tokens(editor.encode(subject.pictures(1, seed), (instruction,)), editor.spec, 0)
