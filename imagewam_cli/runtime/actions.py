"""Receding-horizon control: plan a chunk of actions, execute its first ones, plan again.

`Policy` in torch and `OnnxPolicy` keep their planned actions in the same `ActionQueue`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from imagewam_cli.runtime.observation import ObservationLike

Actions = npt.NDArray[np.floating[Any]]


class PlanError(RuntimeError):
    """A policy planned numbers that no robot can execute."""


class Planner(Protocol):
    """A policy that plans action chunks. execute: number of actions to execute before planning again."""

    execute: int

    def read(self, observations: Sequence[Any]) -> Sequence[Any]:
        """Return the observations, checked and converted."""
        ...

    def chunks(self, observations: Sequence[Any]) -> Actions:
        """Plan chunks (B, T, A) of commands in robot units for B independent scenes."""
        ...


@dataclass(frozen=True)
class _Plan:
    """Planned actions that are still to be executed, and what they were planned for."""

    actions: tuple[Actions, ...] = ()
    instruction: str | None = None
    thread: object = None


_EMPTY = _Plan()
_this_thread = threading.local()


class ActionQueue:
    """The planned actions of one robot.

    A plan is continued only for the instruction that it was made for. It is replaced as a whole, so that no thread sees
    half of one, and it does not outlive an error.
    """

    def __init__(self, *, per_thread: bool = False) -> None:
        """per_thread: continue a plan only in the thread that made it.

        A policy's own queue needs this: threads that share the policy may drive different robots.
        """
        self._per_thread, self._plan, self._warned = per_thread, _EMPTY, False

    def next(self, observation: ObservationLike, planner: Planner) -> Actions:
        """Return the next action (A,). Plan a new chunk when no planned action is left or the instruction changed.

        Raises what `planner` raises. Every observation is checked, also one that needs no plan.
        """
        [observation] = planner.read([observation])
        plan, thread = self._plan, _thread() if self._per_thread else None
        instruction = getattr(observation, "instruction", None)
        if plan.actions and plan.thread is not thread and not self._warned:
            self._warned = True
            warnings.warn(
                "several threads call `act`, so plans are not continued; use one `policy.session()` per robot",
                RuntimeWarning,
                stacklevel=3,
            )
        if not plan.actions or plan.thread is not thread or plan.instruction != instruction:
            self.clear()
            if planner.execute < 1:
                raise ValueError(f"execute must be at least 1, got {planner.execute}")
            chunk = planner.chunks([observation])[0][: planner.execute]
            plan = _Plan(tuple(chunk), instruction, thread)
        self._plan = _Plan(plan.actions[1:], instruction, thread)
        return plan.actions[0]

    def clear(self) -> None:
        """Discard the planned actions."""
        self._plan = _EMPTY

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle a policy without its plan, which belongs to the robot that it drives now."""
        return self.__dict__ | {"_plan": _EMPTY}


class Session:
    """One robot that a policy drives. Several sessions share a policy, and each has its own planned actions.

    Use a session in one thread at a time; it may change threads between two actions.
    """

    def __init__(self, policy: Planner) -> None:
        self._policy, self._queue = policy, ActionQueue()

    def act(self, observation: ObservationLike) -> Actions:
        """Return the next action (A,), as the policy's own `act` does."""
        return self._queue.next(observation, self._policy)

    def reset(self) -> None:
        """Discard the planned actions. Call this at the start of every episode."""
        self._queue.clear()


def require_finite(chunks: Actions, names: Sequence[str]) -> Actions:
    """Return the chunks (B, T, A), whose dimensions have these names.

    Raises:
        PlanError: a number is NaN or infinite.
    """
    finite = np.isfinite(chunks)
    if not finite.all():
        wrong = ", ".join(names[int(i)] for i in np.flatnonzero(~finite.all(axis=(0, 1))))
        raise PlanError(f"the policy planned numbers that are not finite: {wrong}")
    return chunks


def _thread() -> object:
    """Return an object that belongs to this thread alone. Thread ids do not: they are used again."""
    return _this_thread.__dict__.setdefault("identity", object())
