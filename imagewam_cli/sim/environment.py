"""The simulator contract: reset, step, success. Third parties wrap a gymnasium environment in it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass

from imagewam_cli.data.types import Float32Array, FloatArray, Observation


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one action.

    success: the task is done; finished: the episode is over and accepts no further action.
    """

    observation: Observation
    success: bool
    finished: bool


class Environment(abc.ABC):
    """A simulator that runs one scene at a time.

    It must be deterministic: seed, split and actions determine every observation.
    """

    name: str
    fps: float
    max_steps: int
    cameras: Mapping[str, tuple[int, int]]
    """Camera name -> (height, width) of its pictures."""
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "test")
    """Names of the scene families. Demonstrations use `train`, evaluation the others."""

    @abc.abstractmethod
    def reset(self, seed: int, split: str) -> Observation:
        """Start scene `seed` of `split` and return the first observation."""

    @abc.abstractmethod
    def step(self, action: FloatArray) -> StepResult:
        """Execute one action (A,) in robot units: float32, or float64 from a policy that needs it.

        Raises:
            SimulationError: the action has the wrong shape or is not finite, or the episode has ended.
        """

    @abc.abstractmethod
    def kind(self) -> str:
        """Return the kind of task in the current scene. Results are reported per kind."""

    def demonstrate(self) -> Float32Array:
        """Return the scripted demonstrator's next action, (A,).

        Raises:
            SimulationError: this environment has no demonstrator.
        """
        from imagewam_cli.errors import SimulationError

        raise SimulationError(f"environment {self.name!r} has no scripted demonstrator")
