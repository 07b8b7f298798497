"""Receding-horizon control: observe, plan a chunk, execute its first actions, repeat. Also a random baseline."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np

from imagewam_cli.data.types import FloatArray, Observation


class ChunkPolicy(abc.ABC):
    """Base class of policies that plan action chunks.

    execute: number of actions to execute before planning again.
    """

    execute: int
    _queue: tuple[FloatArray, ...] = ()

    @abc.abstractmethod
    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        """Plan chunks (B, T, A) of commands in robot units for B independent scenes."""

    def command(self, actions: FloatArray) -> FloatArray:
        """Convert actions (..., A), as a dataset records them, to commands like those of `chunks`."""
        return actions

    def act(self, observation: Observation) -> FloatArray:
        """Return the next action (A,). Plan a new chunk when no planned action is left."""
        if not self._queue:
            self._queue = tuple(self.chunks([observation])[0][: self.execute])
        action, *rest = self._queue
        self._queue = tuple(rest)
        return action

    def reset(self) -> None:
        """Discard the planned actions. Call this at the start of every episode."""
        self._queue = ()


class RandomPolicy(ChunkPolicy):
    """A baseline: uniform random actions in [-1, 1], each repeated for a few steps so that the robot moves."""

    execute = 8

    def __init__(self, action_dim: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._action_dim = action_dim

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        actions = self._rng.uniform(-1, 1, size=(len(observations), 1, self._action_dim))
        return np.repeat(actions, self.execute, axis=1).astype(np.float32)
