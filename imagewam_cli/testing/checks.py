"""All checks of the editor contract, in the order in which their failures are worth reading.

A check is a function of a `Subject`. It returns if the editor keeps the promise, and raises `ContractError` if it does
not, or `NotApplicable` if the promise does not concern this editor. The first line of its docstring is the promise.
This module needs no pytest.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagewam_cli.testing import numbers, spec_checks, uses
from imagewam_cli.testing.subject import ContractError, NotApplicable, Subject

Check = Callable[[Subject], None]

CHECKS: tuple[Check, ...] = (
    spec_checks.modes_of_the_entry_load,
    spec_checks.shapes_are_those_of_the_spec,
    spec_checks.pooled_shapes_are_those_of_the_spec,
    spec_checks.description_is_the_spec,
    numbers.same_input_gives_the_same_bits,
    numbers.a_batch_is_its_rows,
    numbers.padding_changes_nothing,
    numbers.another_picture_changes_the_prefix,
    numbers.every_camera_changes_the_prefix,
    numbers.another_timestep_changes_the_prefix,
    numbers.another_instruction_changes_the_prefix,
    numbers.a_blank_picture_hides_everything,
    numbers.random_weights_change_the_prefix,
    spec_checks.segments_are_slices,
    spec_checks.layers_are_slices,
    spec_checks.prefix_mode_has_no_target,
    spec_checks.unknown_choices_are_refused,
    spec_checks.wrong_size_is_refused,
    uses.a_cache_gives_back_what_was_encoded,
    uses.expert_attends_jointly,
    uses.graph_equals_encode,
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
    """Run every check in turn. A broken promise does not stop the next checks, unless the mode itself is refused."""
    for check in CHECKS:
        finding = _finding(check, subject)
        yield finding
        if check is spec_checks.modes_of_the_entry_load and finding.result == "broken":
            return


def promise(check: Check) -> str:
    """Return the promise of a check, in one line."""
    return (check.__doc__ or check.__name__).partition("\n")[0]


def _finding(check: Check, subject: Subject) -> Finding:
    found = {"mode": subject.mode, "check": check.__name__, "promise": promise(check)}
    try:
        check(subject)
    except NotApplicable as reason:
        return Finding(**found, result="not applicable", message=str(reason))
    except ContractError as error:
        return Finding(**found, result="broken", message=error.message, fix=error.fix)
    except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is a finding
        message = f"{type(error).__name__}: {error}"
        return Finding(**found, result="broken", message=message, fix=f"see {_place(error, subject.kind)}")
    return Finding(**found, result="kept")


def _place(error: Exception, kind: type) -> str:
    """Return the innermost line of the plugin in the error's traceback, or the line that raised it."""
    folder = Path(inspect.getfile(kind)).parent
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if Path(f.filename).parent == folder), frames[-1])
    return f"{frame.filename}:{frame.lineno}"
