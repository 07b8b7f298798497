"""The contract of a simulator: reset, step, success. Third parties wrap a gymnasium environment in it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass

from imagewam_cli.data.types import Float32Array, Observation


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """After one action. success: the task is done; finished: no further action is accepted."""

    observation: Observation
    success: bool
    finished: bool


class Environment(abc.ABC):
    """One scene at a time. Deterministic: (seed, split) and the actions decide everything."""

    name: str
    fps: float
    max_steps: int
    cameras: Mapping[str, tuple[int, int]]
    """camera -> (height, width)"""
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "test")
    """Which families of scenes there are; demonstrations come from `train`, evaluation from the others."""

    @abc.abstractmethod
    def reset(self, seed: int, split: str) -> Observation:
        """Begin scene `seed` of `split`."""

    @abc.abstractmethod
    def step(self, action: Float32Array) -> StepResult:
        """Carry out one action (A,) in robot units.

        Raises:
            SimulationError: wrong shape, not finite, or the episode has ended.
        """

    @abc.abstractmethod
    def kind(self) -> str:
        """What sort of task the current scene asks for; results are reported per kind."""

    def demonstrate(self) -> Float32Array:
        """What a scripted expert does now, (A,).

        Raises:
            SimulationError: this environment has none.
        """
        from imagewam_cli.errors import SimulationError

        raise SimulationError(f"environment {self.name!r} has no scripted expert")
