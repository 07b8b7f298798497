"""The simulator contract: reset, step, success. Third parties wrap a gymnasium environment in it."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from imagewam_cli.data.types import Float32Array, FloatArray, Observation
from imagewam_cli.errors import PluginError, SimulationError
from imagewam_cli.policy.matching import Interface
from imagewam_cli.registry import Registry

_CONTRACT = "the plugin must follow the contract of imagewam_cli.plugin.Environment"


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
        raise SimulationError(f"environment {self.name!r} has no scripted demonstrator")


def interface_of(env: Environment) -> Interface:
    """Return the names and the rate of an environment, to match a policy with.

    Raises:
        PluginError: as `check_environment`.
    """
    check_environment(env, str(getattr(env, "name", type(env).__name__)))
    return Interface(
        what=f"the environment {env.name!r}",
        cameras=tuple(env.cameras),
        state_names=tuple(env.state_names),
        action_names=tuple(env.action_names),
        fps=float(env.fps),
    )


def load_environment(name: str) -> Callable[[], Environment]:
    """Return the factory of an installed environment, after checking one that it made.

    Raises:
        UnknownNameError: no environment has this name.
        PluginError: the environment does not declare what the contract asks for.
    """
    make: Callable[[], Environment] = Registry.installed().environments.load(name)
    try:
        env = make()
    except TypeError as error:  # an abstract class, or a factory that needs arguments
        raise PluginError(f"the environment {name!r} cannot be created: {error}", _CONTRACT) from None
    check_environment(env, name)
    return make


def check_environment(env: Environment, name: str) -> None:
    """Check that an environment declares its name, rate, length, cameras, names and splits.

    Raises:
        PluginError: a declaration is missing or has another type; the message names it.
    """
    for attribute, holds, wanted in _DECLARED:
        value = getattr(env, attribute, None)
        if value is None or not holds(value):
            problem = "does not declare" if value is None else f"declares {value!r} as"
            raise PluginError(f"the environment {name!r} {problem} {attribute}", f"{attribute} must be {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _are_names(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value)


def _are_cameras(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and np.shape(size) == (2,) and all(_is_number(n) for n in size)
        for name, size in value.items()
    )


_DECLARED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("name", lambda name: isinstance(name, str), "its name"),
    ("fps", _is_number, "its control rate in Hz, above 0"),
    ("max_steps", _is_number, "the number of steps of an episode, at least 1"),
    ("cameras", _are_cameras, "a mapping of each camera's name to its (height, width)"),
    ("state_names", _are_names, "a tuple with one name per dimension of the state"),
    ("action_names", lambda names: _are_names(names) and len(names) > 0, "a tuple with one name per dimension"),
    ("splits", lambda names: _are_names(names) and len(names) > 0, "a tuple with at least one name"),
)
"""Attribute of an environment, check of its value, and what it must be."""
