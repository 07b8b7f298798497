"""Checks of the values of a prefix: it is a pure function of picture, instruction, weights and settings."""

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
    require,
    require_different,
    require_equal,
    valid_tokens_of,
)


def same_input_gives_the_same_bits(subject: Subject) -> None:
    """the same input gives the same bits, twice in one editor and again after a reload"""
    fix = "draw noise with `target_noise`, and take the mean of the VAE's distribution, never a sample"
    first = _prefix(subject, SHORT)
    require_equal(_prefix(subject, SHORT), first, "encoded twice", fix)
    editor = subject.reload()
    again = valid_tokens_of(editor.encode(subject.pictures(1), (SHORT,)), editor.spec, 0)
    require_equal(again, first, "loaded and encoded again", fix)


def a_batch_is_its_rows(subject: Subject) -> None:
    """rows encoded in one batch equal the same rows encoded one by one"""
    editor, instructions, pictures = subject.load(), (SHORT, LONG, OTHER), subject.pictures(3)
    together = editor.encode(pictures, instructions)
    for i, instruction in enumerate(instructions):
        alone = valid_tokens_of(editor.encode(pictures[i : i + 1], (instruction,)), editor.spec, 0)
        require_equal(
            valid_tokens_of(together, editor.spec, i),
            alone,
            f"row {i} of a batch of 3, compared with the same row alone",
            "no row may depend on another: mask padded text in every attention, and draw the same noise for all rows",
            rounding=True,
        )


def padding_changes_nothing(subject: Subject) -> None:
    """the prefix of an instruction does not change if the editor is loaded with a longer instruction as well"""
    refused = []
    for padding in ("trim", "keep"):
        try:
            _compare_paddings(subject, padding)
        except UsageError as error:
            refused.append(error.message)
    require(len(refused) < 2, f"every `text_padding` is refused: {refused}", "accept at least the default")


def _compare_paddings(subject: Subject, padding: str) -> None:
    changes: dict[str, Any] = {"text_padding": padding, "segments": subject.segments()}
    prefixes = [_prefix(subject, SHORT, known=known, **changes) for known in ((SHORT,), (SHORT, LONG))]
    require_equal(
        prefixes[1],
        prefixes[0],
        f"text_padding {padding}: {SHORT!r} padded to the length of {LONG!r}",
        "mask padding in every attention, keep the position ids of the other tokens, and mark it False in `valid`",
        rounding=True,
    )


def another_picture_changes_the_prefix(subject: Subject) -> None:
    """a different picture gives a different prefix"""
    require_different(
        _prefix(subject, SHORT, seed=1),
        _prefix(subject, SHORT),
        "two different noise pictures give the same prefix: the picture does not reach the kept tokens",
        "check that `run` uses its pictures, and that the default timestep does not replace them with noise",
    )


def every_camera_changes_the_prefix(subject: Subject) -> None:
    """with two cameras, a different picture of either gives a different prefix, in every layout that accepts two"""
    for changes in subject.with_two_cameras():
        editor = subject.load(**changes)
        (before,), (after,) = (subject.pictures(1, seed, TWO_CAMERAS) for seed in (0, 1))
        rows = [before, *(before | {camera: after[camera]} for camera in TWO_CAMERAS)]
        first, *others = (valid_tokens_of(editor.encode([row], (SHORT,)), editor.spec, 0) for row in rows)
        del editor  # before the next one is loaded
        for camera, other in zip(TWO_CAMERAS, others, strict=True):
            require_different(
                other,
                first,
                f"camera_layout {changes['camera_layout']}: two pictures of camera {camera!r} give the same prefix",
                "`run` gets the cameras side by side; each must reach the kept tokens",
            )


def another_timestep_changes_the_prefix(subject: Subject) -> None:
    """a different timestep (`--timestep`) gives a different prefix"""
    default, before = subject.load().spec.timestep, _prefix(subject, SHORT)
    other = 0.5 if default != 0.5 else 1.0
    try:
        spec = subject.load(timestep=other).spec
    except UsageError as error:
        raise NotApplicable(f"it has only one timestep: {error.message}") from None
    require(spec.timestep == other, f"requested timestep {other}, but the spec has {spec.timestep}", "correct `spec`")
    require_different(
        _prefix(subject, SHORT, timestep=other),
        before,
        f"the timesteps {other} and {default} give the same prefix",
        "pass `settings.timestep` to the denoiser in its own units, and use no other timestep in `run`",
    )


def another_instruction_changes_the_prefix(subject: Subject) -> None:
    """a different instruction gives a different prefix"""
    require_different(
        _prefix(subject, REORDERED),
        _prefix(subject, LONG),
        f"{LONG!r} and {REORDERED!r} give the same prefix: the instruction does not reach the kept tokens",
        "check what `embed` returns and that `run` uses it; a prompt_template needs {instruction}",
    )


def a_blank_picture_hides_everything(subject: Subject) -> None:
    """with `--blank-images`, the prefix does not depend on the pictures"""
    blank = [_prefix(subject, SHORT, seed=seed, blank_images=True) for seed in (0, 1)]
    require_equal(
        blank[1],
        blank[0],
        "with `blank_images`, two pictures",
        "replace the picture before anything reads it, including a text encoder",
    )
    require_different(
        blank[0],
        _prefix(subject, SHORT),
        "a gray picture and a noise picture give the same prefix: `blank_images` does nothing",
        "replace the picture with gray in `encode` if `settings.blank_images` is set",
    )


def random_weights_change_the_prefix(subject: Subject) -> None:
    """with `--random-weights`, prefix and fingerprint change"""
    require_different(
        _prefix(subject, SHORT, random_weights=True),
        _prefix(subject, SHORT),
        "`random_weights` gives the prefix of the trained weights",
        "initialize the denoiser at random (`imagewam_cli.editors.loading.folder.randomize`) if the settings do so",
    )
    same = subject.load().fingerprint() == subject.load(random_weights=True).fingerprint()
    if same:
        raise ContractError("`random_weights` does not change the fingerprint", "include all settings in it")


def _prefix(
    subject: Subject, instruction: str, seed: int = 0, known: Sequence[str] = (), **changes: Any
) -> dict[str, Tensor]:
    """Encode one row. No reference to the editor is kept, so that it can be freed before the next is loaded."""
    editor = subject.load(known, **changes)
    return valid_tokens_of(editor.encode(subject.pictures(1, seed), (instruction,)), editor.spec, 0)
