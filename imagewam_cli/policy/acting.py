"""Receding horizon: look, plan a chunk, carry out its first actions, look again. And the baselines to compare with."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np

from imagewam_cli.data.types import Float32Array, Observation


class ChunkPolicy(abc.ABC):
    """Anything that plans action chunks. `execute`: actions to carry out before planning again."""

    execute: int
    _queue: tuple[Float32Array, ...] = ()

    @abc.abstractmethod
    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        """Chunks (B, T, A) in robot units for B independent scenes."""

    def command(self, actions: Float32Array) -> Float32Array:
        """What is sent to the robot for actions (..., A) as a dataset records them; `chunks` are such commands."""
        return actions

    def act(self, observation: Observation) -> Float32Array:
        """The next action (A,), planning anew when the actions to execute are used up."""
        if not self._queue:
            self._queue = tuple(self.chunks([observation])[0][: self.execute])
        action, *rest = self._queue
        self._queue = tuple(rest)
        return action

    def reset(self) -> None:
        """Forget the planned actions; call it when an episode starts."""
        self._queue = ()


class RandomPolicy(ChunkPolicy):
    """Uniform actions in [-1, 1], held for a while so that they go somewhere."""

    execute = 8

    def __init__(self, action_dim: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._action_dim = action_dim

    def chunks(self, observations: Sequence[Observation]) -> Float32Array:
        actions = self._rng.uniform(-1, 1, size=(len(observations), 1, self._action_dim))
        return np.repeat(actions, self.execute, axis=1).astype(np.float32)
