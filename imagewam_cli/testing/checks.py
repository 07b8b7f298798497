"""All checks of the editor contract, the most informative failures first.

A check is a function of a `Subject`. It returns if the check passes, and raises `ContractError` if it fails, or
`NotApplicable` if it does not apply to this editor. The first line of its docstring states the `promise` that it
checks. This module needs no pytest.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagewam_cli.testing import consumer_checks, spec_checks, value_checks
from imagewam_cli.testing.subject import ContractError, NotApplicable, Subject

Check = Callable[[Subject], None]

CHECKS: tuple[Check, ...] = (
    spec_checks.modes_of_the_entry_load,
    spec_checks.shapes_are_those_of_the_spec,
    spec_checks.pooled_shapes_are_those_of_the_spec,
    spec_checks.description_is_the_spec,
    value_checks.same_input_gives_the_same_bits,
    value_checks.a_batch_is_its_rows,
    value_checks.padding_changes_nothing,
    value_checks.another_picture_changes_the_prefix,
    value_checks.every_camera_changes_the_prefix,
    value_checks.another_timestep_changes_the_prefix,
    value_checks.another_instruction_changes_the_prefix,
    value_checks.a_blank_picture_hides_everything,
    value_checks.random_weights_change_the_prefix,
    spec_checks.segments_are_slices,
    spec_checks.layers_are_slices,
    spec_checks.prefix_mode_has_no_target,
    spec_checks.unknown_choices_are_refused,
    spec_checks.wrong_size_is_refused,
    consumer_checks.a_cache_gives_back_what_was_encoded,
    consumer_checks.expert_attends_jointly,
    consumer_checks.graph_equals_encode,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check on one mode of an editor."""

    mode: str
    check: str
    promise: str
    result: Literal["kept", "broken", "not applicable"]
    message: str | None = None
    fix: str | None = None


def examine(subject: Subject) -> Iterator[Finding]:
    """Run every check in turn. A failed check does not stop the next ones, unless the editor rejects the mode."""
    for check in CHECKS:
        finding = _finding(check, subject)
        yield finding
        if check is spec_checks.modes_of_the_entry_load and finding.result == "broken":
            return


def promise(check: Check) -> str:
    """Return the promise of a check, in one line."""
    return (check.__doc__ or check.__name__).partition("\n")[0]


def _finding(check: Check, subject: Subject) -> Finding:
    labels = {"mode": subject.mode, "check": check.__name__, "promise": promise(check)}
    try:
        check(subject)
    except NotApplicable as reason:
        return Finding(**labels, result="not applicable", message=str(reason))
    except ContractError as error:
        return Finding(**labels, result="broken", message=error.message, fix=error.fix)
    except Exception as error:  # noqa: BLE001 - foreign code: any exception is a finding
        message = f"{type(error).__name__}: {error}"
        return Finding(**labels, result="broken", message=message, fix=f"see {_place(error, subject.kind)}")
    return Finding(**labels, result="kept")


def _place(error: Exception, kind: type) -> str:
    """Return the innermost line of the plugin in the error's traceback, or the line that raised it."""
    folder = Path(inspect.getfile(kind)).parent
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if Path(f.filename).parent == folder), frames[-1])
    return f"{frame.filename}:{frame.lineno}"
