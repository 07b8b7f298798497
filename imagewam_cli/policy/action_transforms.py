"""Transforms between actions as a dataset records them and the commands that a robot takes.

A policy applies its transforms, in order, after denormalizing a chunk. They are saved in `policy.json`, each as
its kind and its fields. To add a kind, subclass `ActionTransform` and list the class in `_CLASSES`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from imagewam_cli.data.types import FloatArray
from imagewam_cli.errors import ConfigError, DatasetError, nearest


class ActionTransform(abc.ABC):
    """Map some dimensions of an action to the robot's convention, and back."""

    kind: ClassVar[str]
    """Name of the transform in `policy.json`."""

    def __init__(self, dimensions: Sequence[str]) -> None:
        """dimensions: names of the action dimensions to transform; the others pass through unchanged."""
        self.dimensions = tuple(dimensions)

    def apply(self, actions: FloatArray, names: Sequence[str]) -> FloatArray:
        """Convert recorded actions to commands.

        actions: (..., A); names: the A action dimensions. Returns a new array of the same shape.

        Raises:
            DatasetError: `actions` does not have A dimensions, or `names` lacks one of `dimensions`.
        """
        return self._mapped(actions, names, inverse=False)

    def invert(self, commands: FloatArray, names: Sequence[str]) -> FloatArray:
        """Convert commands (..., A) back to recorded actions. Arguments and errors are those of `apply`."""
        return self._mapped(commands, names, inverse=True)

    def to_dict(self) -> dict[str, object]:
        """Return JSON-ready values that `read_transform` reads back."""
        return {"kind": self.kind, "dimensions": list(self.dimensions)}

    @abc.abstractmethod
    def _to_command(self, values: FloatArray) -> FloatArray:
        """Convert recorded values of the chosen dimensions, (..., number of dimensions)."""

    @abc.abstractmethod
    def _from_command(self, values: FloatArray) -> FloatArray:
        """Undo `_to_command` as far as possible."""

    def _mapped(self, actions: FloatArray, names: Sequence[str], *, inverse: bool) -> FloatArray:
        if actions.shape[-1] != len(names):
            raise DatasetError(f"actions have {actions.shape[-1]} dimensions, but the policy has {len(names)}")
        missing = [name for name in self.dimensions if name not in names]
        if missing:
            raise DatasetError(
                f"the action transform {self.kind!r} needs a dimension {missing[0]!r}", nearest(missing[0], names)
            )
        chosen = [list(names).index(name) for name in self.dimensions]
        result = actions.copy()
        convert = self._from_command if inverse else self._to_command
        result[..., chosen] = convert(actions[..., chosen])
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActionTransform) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.kind, self.dimensions))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dimensions})"


class GripperSign(ActionTransform):
    """Grippers recorded in [0, 1] (1 open) and commanded as -1 (open) or 1 (closed), as LIBERO does.

    The command depends only on whether the recorded value is above or below 0.5. So `invert(apply(x))` gives 0 or 1
    instead of x (0.5 stays 0.5), while `apply(invert(c))` is exactly c for the commands -1 and 1.
    """

    kind = "gripper_sign"

    def _to_command(self, values: FloatArray) -> FloatArray:
        commands: FloatArray = -np.sign(2 * values - 1)
        return commands

    def _from_command(self, values: FloatArray) -> FloatArray:
        recorded: FloatArray = (1 - values) / 2
        return recorded


_CLASSES = {cls.kind: cls for cls in (GripperSign,)}


def apply_all(transforms: Sequence[ActionTransform], actions: FloatArray, names: Sequence[str]) -> FloatArray:
    """Apply transforms in order: recorded actions (..., A) to commands. Without transforms, return `actions` itself."""
    for transform in transforms:
        actions = transform.apply(actions, names)
    return actions


def invert_all(transforms: Sequence[ActionTransform], commands: FloatArray, names: Sequence[str]) -> FloatArray:
    """Undo `apply_all`: commands (..., A) to recorded actions, except for what each transform loses."""
    for transform in reversed(transforms):
        commands = transform.invert(commands, names)
    return commands


def read_transform(values: object, names: Sequence[str]) -> ActionTransform:
    """Build a transform from the values that `ActionTransform.to_dict` returned.

    names: the policy's action dimensions.

    Raises:
        ConfigError: the values are malformed, the kind is unknown, or a dimension is not one of `names`.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"an action transform must be a mapping, got {type(values).__name__}")
    kind, dimensions = values.get("kind"), values.get("dimensions")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ConfigError(
            f"unknown action transform {kind!r}", f"this imagewam knows {', '.join(_CLASSES)}; upgrade imagewam"
        )
    if set(values) != {"kind", "dimensions"} or not isinstance(dimensions, list):
        raise ConfigError(f"the action transform {kind!r} must have the keys 'kind' and 'dimensions' (a list)")
    for name in dimensions:
        if name not in names:
            raise ConfigError(
                f"the action transform {kind!r} names an unknown dimension {name!r}", nearest(str(name), names)
            )
    return _CLASSES[kind](dimensions)


def read_grippers(indices: object, names: Sequence[str]) -> tuple[ActionTransform, ...]:
    """Build the transform for the old key `grippers` of `policy.json`: a list of indices of LIBERO-like grippers.

    Raises:
        ConfigError: the value is not a list of indices of `names`.
    """
    if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < len(names) for i in indices):
        raise ConfigError(f"'grippers' must be a list of integers from 0 to {len(names) - 1}, got {indices!r}")
    return (GripperSign([names[i] for i in indices]),) if indices else ()
