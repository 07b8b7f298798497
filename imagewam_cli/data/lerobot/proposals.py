"""Guess from the names of features which are the state, the action and the instruction, for hints and `info`.

A guess is only ever shown to the user, with one exception: a dataset that has nothing but actions is read without a
state, with a warning (`keys`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from imagewam_cli.data.lerobot.info import Feature
from imagewam_cli.data.types import KeyMap

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns of every LeRobot dataset."""

_NUMBERS = ("float", "int", "uint")
_TEXTS = ("string", "large_string", "str")
_ACTION = {"action", "actions"}
_STATES = ("observation.state", "state", "observation/state", "observation.states", "states", "observation.proprio")
"""Usual names of a state, best first. Several features may begin with one of them: `observation.states.joint`."""
_NO_ROLE = {"next", "annotation", "reward", "done", "success", "discount", "terminal", "valid", "validity", "timestamp"}
"""Words of features that are neither a state nor an action."""
_COMMAND = {"command", "commands", "cmd", "target", "goal", "desired"}
"""Words of features that tell the robot what to do, under another name than action."""
_SENTENCE = ("language", "instruction", "description", "task", "prompt", "caption")
"""Parts of the names of features that hold a sentence, best first."""
_MAX_STATE = 128
"""Longest feature without a usual name that may be a state. Longer ones are embeddings, point clouds or pictures."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Features that may have a role, in the dataset's order; empty if none may."""

    state: tuple[str, ...]
    action: tuple[str, ...]
    instruction: tuple[str, ...]
    """Features of which each alone may be the instruction, best first."""

    def options(self, missing: Iterable[str]) -> str:
        """Return the options for the roles in `missing` ("state", "action") that have a proposal."""
        return " ".join(
            f"--{role}-key {shlex.quote(','.join(keys))}" for role in missing if (keys := getattr(self, role))
        )

    def keys(self, missing: Collection[str]) -> KeyMap:
        """Return LeRobot's usual keys with the proposals for the roles in `missing`."""
        state = ",".join(self.state) if "state" in missing else ""
        action = ",".join(self.action) if "action" in missing else ""
        return KeyMap(state=state or KeyMap.state, action=action or KeyMap.action)


def propose(features: Iterable[Feature]) -> Proposal:
    """Return the features whose names are those of a state, an action or an instruction."""
    known = list(features)
    numbers = [f for f in known if is_numeric(f) and f.size and f.key not in BOOKKEEPING and not _words(f) & _NO_ROLE]
    actions = [f for f in numbers if is_action(f)]
    others = [f for f in numbers if not _words(f) & (_ACTION | _COMMAND)]
    return Proposal(state=_states(others), action=_actions(actions), instruction=_instructions(known))


def is_numeric(feature: Feature) -> bool:
    """Return whether a feature holds numbers. Booleans and text cannot be normalized."""
    return feature.dtype.startswith(_NUMBERS)


def is_action(feature: Feature) -> bool:
    """Return whether the name of a feature says that it is an action."""
    return bool(_words(feature) & _ACTION)


def may_be_instruction(feature: Feature) -> bool:
    """Return whether a feature holds one text per frame, or one integer, which may be an index into the tasks."""
    if feature.key in BOOKKEEPING and feature.key != "task_index":
        return False
    return feature.size == 1 and (feature.dtype in _TEXTS or feature.dtype.startswith(("int", "uint")))


def is_text(feature: Feature) -> bool:
    """Return whether a feature holds texts."""
    return feature.dtype in _TEXTS


def _actions(actions: list[Feature]) -> tuple[str, ...]:
    keys = [f.key for f in actions]
    exact = [key for key in ("action", "actions") if key in keys]
    return tuple(exact[:1] or [f.key for f in actions if _first_word(f) in _ACTION] or keys)


def _states(others: list[Feature]) -> tuple[str, ...]:
    keys = [f.key for f in others]
    for name in _STATES:
        if name in keys:
            return (name,)
        group = [key for key in keys if key.startswith((f"{name}.", f"{name}/"))]
        if group:
            return tuple(group)
    small = [f for f in others if f.dtype.startswith("float") and f.size <= _MAX_STATE]
    observed: Callable[[Feature], bool] = lambda f: _first_word(f) in ("observation", "observations", "obs")  # noqa: E731
    return tuple(f.key for f in small if observed(f)) or tuple(f.key for f in small)


def _instructions(features: list[Feature]) -> tuple[str, ...]:
    """Return texts first, then numbers of annotations; among each, the most telling names."""
    no_role = _NO_ROLE - {"annotation"}
    texts = [f for f in features if is_text(f)]
    numbers = [f for f in features if may_be_instruction(f) and not is_text(f) and "annotation" in _words(f)]
    found = [f for f in [*texts, *numbers] if f.key not in BOOKKEEPING and not _words(f) & no_role]
    return tuple(f.key for f in sorted(found, key=lambda f: (not is_text(f), _sentence_rank(f))))


def _sentence_rank(feature: Feature) -> int:
    """Return the place of a feature's name among those of features that hold a sentence."""
    key = feature.key.lower()
    return next((i for i, part in enumerate(_SENTENCE) if part in key), len(_SENTENCE))


def _words(feature: Feature) -> set[str]:
    return set(re.split(r"[./_\-\s]+", feature.key.lower()))


def _first_word(feature: Feature) -> str:
    return re.split(r"[./_\-\s]+", feature.key.lower())[0]
