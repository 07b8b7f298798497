"""Receding-horizon control: observe, plan a chunk, execute its first actions, repeat. Also a random baseline."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imagewam_cli.data.types import FloatArray, Observation
from imagewam_cli.errors import DatasetError, RunError
from imagewam_cli.runtime.actions import ActionQueue, PlanError, Session
from imagewam_cli.runtime.export_folder import ExportFolderError
from imagewam_cli.runtime.observation import ObservationError, ObservationLike

if TYPE_CHECKING:
    from imagewam_cli.policy.bundle import TrainingRecord
    from imagewam_cli.policy.matching import Interface


class ChunkPolicy(abc.ABC):
    """Base class of policies that plan action chunks.

    execute: number of actions to execute before planning again.
    """

    execute: int
    folder: Path | None = None
    """Folder that the policy was loaded from."""

    @property
    def interface(self) -> Interface | None:
        """Names of its cameras and numbers, and its rate; None if it does not say."""
        return None

    @property
    def training(self) -> TrainingRecord | None:
        """The episodes that it was trained on; None if they were not recorded."""
        return None

    @abc.abstractmethod
    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        """Plan chunks (B, T, A) of commands in robot units for B independent scenes."""

    def read(self, observations: Sequence[Any]) -> Sequence[Observation]:
        """Return the observations, checked and converted to what `chunks` takes. This class accepts any.

        Raises:
            DatasetError: an observation cannot be used.
        """
        return observations

    def command(self, actions: FloatArray) -> FloatArray:
        """Convert actions (..., A), as a dataset records them, to commands like those of `chunks`."""
        return actions

    def act(self, observation: ObservationLike) -> FloatArray:
        """Return the next action (A,). Plan a new chunk when no planned action is left or the instruction changed.

        Use one `session` per robot if several robots share the policy: their plans must not be mixed. The policy's own
        plan is continued only in the thread that made it.

        Raises:
            DatasetError: the observation cannot be used.
            RunError: the planned actions are not finite.
        """
        return self._queue.next(observation, self)

    def reset(self) -> None:
        """Discard the planned actions. Call this at the start of every episode."""
        self._queue.clear()

    def session(self) -> Session:
        """Return an independent robot for this policy: its `act` and `reset` have planned actions of their own."""
        return Session(self)

    @property
    def _queue(self) -> ActionQueue:
        """The policy's own planned actions, made when they are first needed: subclasses need not call `__init__`."""
        queue: ActionQueue = self.__dict__.setdefault("_planned", ActionQueue(per_thread=True))
        return queue


@contextmanager
def own_errors() -> Iterator[None]:
    """Turn the errors of the torch-free runtime into imagewam's, with their hints."""
    try:
        yield
    except ObservationError as error:
        raise DatasetError(error.message, error.hint) from None
    except ExportFolderError as error:
        raise RunError(error.message, error.hint) from None
    except PlanError as error:
        raise RunError(str(error), "check the observation, and the policy's normalization and weights") from None


class RandomPolicy(ChunkPolicy):
    """A baseline: uniform random actions in [-1, 1], each repeated for a few steps so that the robot moves."""

    execute = 8

    def __init__(self, action_dim: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._action_dim = action_dim

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        actions = self._rng.uniform(-1, 1, size=(len(observations), 1, self._action_dim))
        return np.repeat(actions, self.execute, axis=1).astype(np.float32)
