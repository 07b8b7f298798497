"""Match a policy with a dataset or a simulator that it was not trained on: by the names of its numbers and cameras.

A policy plans the third number of an action because it was trained on it; what that number means is in its name. Other
data may have the same numbers in another order, other cameras, or another rate. `match` returns how to read such data,
and refuses what does not fit: numbers in a wrong order move a robot wrongly.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imagewam_cli.data.types import Dataset, DatasetInfo, EpisodeInfo, FloatArray, Observation, Row, UInt8Image
from imagewam_cli.errors import RunError, UsageError, warn
from imagewam_cli.policy.acting import ChunkPolicy

_RATE_TOLERANCE = 0.01
"""Relative difference of rates that count as equal, such as 29.97 and 30."""
_NUMBERED = re.compile(r"(.*?)[_.\[ ]?(\d+)\]?")


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a policy, a dataset or a simulator calls its cameras and numbers, and its rate.

    what: the thing in words, for messages.
    nominal: the names and the rate come from a preset, not from training data, so they prove nothing.
    """

    what: str
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fps: float
    nominal: bool = False

    @classmethod
    def of(cls, dataset: Dataset) -> Interface:
        """Return the interface of a dataset."""
        info = dataset.info
        return cls(
            what=str(info.root),
            cameras=tuple(info.cameras),
            state_names=info.state_names,
            action_names=info.action_names,
            fps=info.fps,
        )


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How to read other data as a policy's own.

    cameras: the policy's camera -> the other's. state, action: for each of the policy's numbers, its index in the
    other's; None: the same order.
    """

    cameras: Mapping[str, str]
    state: tuple[int, ...] | None
    action: tuple[int, ...] | None

    @property
    def is_identity(self) -> bool:
        """Whether names and order are the same."""
        return self.state is None and self.action is None and all(a == b for a, b in self.cameras.items())

    def images(self, images: Mapping[str, UInt8Image]) -> dict[str, UInt8Image]:
        """Return the pictures of the policy's cameras, by its names."""
        return {ours: images[theirs] for ours, theirs in self.cameras.items() if theirs in images}

    def state_of(self, state: FloatArray) -> FloatArray:
        """Return a state (S,) of the other in the policy's order."""
        return state if self.state is None else state[list(self.state)]

    def action_of(self, action: FloatArray) -> FloatArray:
        """Return an action (A,) of the other in the policy's order."""
        return action if self.action is None else action[list(self.action)]

    def actions_for(self, actions: FloatArray) -> FloatArray:
        """Return actions (..., A) of the policy in the other's order."""
        return actions if self.action is None else actions[..., np.argsort(self.action)]

    def observation(self, observation: Observation) -> Observation:
        """Return an observation of the other as one of the policy."""
        return dataclasses.replace(
            observation, images=self.images(observation.images), state=self.state_of(observation.state)
        )


def match(policy: Interface, other: Interface, cameras: Mapping[str, str] | None = None) -> Matching:
    """Match a policy with other data. cameras: the other's camera -> the policy's; others must have the same name.

    Numbers in another order are read by name, with a warning. Numbers without names of their own, such as action_0 and
    action_1, are read by their order, with a warning if the other side names them differently.

    Raises:
        UsageError: `cameras` names a camera that does not exist, or one twice.
        RunError: a camera of the policy is missing, the names do not match, or the rates differ.
    """
    found = Matching(
        cameras=_cameras(policy, other, cameras or {}),
        state=_order("state", policy.state_names, other.state_names, policy, other) if policy.state_names else (),
        action=_order("action", policy.action_names, other.action_names, policy, other),
    )
    if abs(policy.fps - other.fps) > _RATE_TOLERANCE * policy.fps:
        said = f"{policy.what} plans {policy.fps:g} actions per second, but {other.what} has {other.fps:g}"
        if not policy.nominal:
            raise RunError(said, f"use data at {policy.fps:g} Hz, or train a policy on data at {other.fps:g} Hz")
        warn(f"{said}; the policy was imported, so its rate is only nominal")
    return found


def camera_names(text: Sequence[str], policy: Interface) -> dict[str, str]:
    """Parse options such as "front=top": the other's camera front is the policy's top. A bare name stands for both.

    Raises:
        UsageError: the policy has no such camera.
    """
    found: dict[str, str] = {}
    for part in text:
        theirs, equals, ours = (piece.strip() for piece in part.partition("="))
        if not theirs or (equals and not ours):
            raise UsageError(f"--camera must look like theirs=ours, got {part!r}", _camera_example(policy))
        if theirs in found:
            raise UsageError(f"--camera names {theirs!r} twice", _camera_example(policy))
        found[theirs] = ours or theirs
    for theirs, ours in found.items():
        if ours not in policy.cameras:
            raise UsageError(
                f"--camera {theirs if theirs == ours else f'{theirs}={ours}'}: {policy.what} has no camera {ours!r}; "
                f"it has: {', '.join(policy.cameras)}",
                _camera_example(policy, theirs),
            )
    return found


class MatchedDataset:
    """A dataset read with the names and the order of a policy."""

    def __init__(self, dataset: Dataset, policy: Interface, matching: Matching) -> None:
        self._dataset, self._matching = dataset, matching
        info = dataset.info
        self._info = dataclasses.replace(
            info,
            cameras={ours: info.cameras[theirs] for ours, theirs in matching.cameras.items()},
            state_names=policy.state_names,
            action_names=policy.action_names,
        )

    @property
    def info(self) -> DatasetInfo:
        return self._info

    def episodes(self) -> Sequence[EpisodeInfo]:
        return self._dataset.episodes()

    def rows(self, *, episodes: Sequence[int] | None = None, stride: int = 1, images: bool = True) -> Iterator[Row]:
        matching = self._matching
        for row in self._dataset.rows(episodes=episodes, stride=stride, images=images):
            yield dataclasses.replace(
                row,
                images=matching.images(row.images),
                state=matching.state_of(row.state),
                action=matching.action_of(row.action),
            )


def matched_dataset(policy: Interface | None, dataset: Dataset, cameras: Mapping[str, str] | None = None) -> Dataset:
    """Return the dataset as the policy reads it. policy: None for one that does not say what it reads.

    Raises:
        UsageError, RunError: as `match`.
    """
    if policy is None:
        return dataset
    matching = match(policy, Interface.of(dataset), cameras)
    return dataset if matching.is_identity else MatchedDataset(dataset, policy, matching)


class MatchedPolicy(ChunkPolicy):
    """A policy that sees and commands another robot or simulator with that one's names and order."""

    def __init__(self, policy: ChunkPolicy, matching: Matching) -> None:
        self.policy, self.matching, self.execute, self.folder = policy, matching, policy.execute, policy.folder

    def chunks(self, observations: Sequence[Observation]) -> FloatArray:
        return self.matching.actions_for(self.policy.chunks([self.matching.observation(o) for o in observations]))


def matched_policy(policy: ChunkPolicy, other: Interface, cameras: Mapping[str, str] | None = None) -> ChunkPolicy:
    """Return the policy as it acts there. A policy that does not say what it reads is returned unchanged.

    Raises:
        UsageError, RunError: as `match`.
    """
    if policy.interface is None:
        return policy
    matching = match(policy.interface, other, cameras)
    return policy if matching.is_identity else MatchedPolicy(policy, matching)


def _cameras(policy: Interface, other: Interface, given: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for theirs, ours in given.items():
        if theirs not in other.cameras:
            raise UsageError(
                f"--camera {theirs}={ours}: {other.what} has no camera {theirs!r}; it has: {_listed(other.cameras)}",
                f"write theirs=ours, such as {_camera_option(other.cameras, policy.cameras)}",
            )
        if ours not in policy.cameras or ours in found:
            problem = "two cameras stand for" if ours in found else f"{policy.what} has no camera"
            raise UsageError(f"--camera {theirs}={ours}: {problem} {ours!r}", _camera_example(policy, theirs))
        found[ours] = theirs
    missing = [ours for ours in policy.cameras if ours not in found and ours not in other.cameras]
    if missing:
        free = [theirs for theirs in other.cameras if theirs not in policy.cameras and theirs not in given]
        hint = (
            f"if they show the same, pass {_camera_option(free, missing)}"
            if free
            else f"use data with the cameras {_listed(policy.cameras)}"
        )
        raise RunError(
            f"{policy.what} needs the camera{'s' if len(missing) > 1 else ''} {_listed(missing)}, which {other.what} "
            f"lacks; it has: {_listed(other.cameras)}",
            hint,
        )
    return {ours: found.get(ours, ours) for ours in policy.cameras}


def _order(
    kind: str, ours: Sequence[str], theirs: Sequence[str], policy: Interface, other: Interface
) -> tuple[int, ...] | None:
    """Return the index in `theirs` of each name of `ours`; None for the same order."""
    if tuple(ours) == tuple(theirs):
        return None
    lists = f"{policy.what}: {_listed(ours)}; {other.what}: {_listed(theirs)}"
    if len(ours) == len(theirs) and set(ours) == set(theirs) and len(set(ours)) == len(ours):
        warn(f"the {kind} has another order and is read by name ({lists})")
        return tuple(list(theirs).index(name) for name in ours)
    if len(ours) == len(theirs) and (policy.nominal or _are_numbered(ours) or _are_numbered(theirs)):
        warn(f"the numbers of the {kind} cannot be matched by name and are read in their order ({lists})")
        return None
    differ = "number" if len(ours) != len(theirs) else "names"
    raise RunError(
        f"the {differ} of the {kind}'s dimensions differ{'s' if differ == 'number' else ''} ({lists})",
        "use data of the robot that the policy was trained for, with the same features",
    )


def _are_numbered(names: Sequence[str]) -> bool:
    """Return whether the names only count, such as action_0, action_1."""
    parts = [_NUMBERED.fullmatch(name) for name in names]
    if not all(parts):
        return False
    stems, numbers = zip(*((p[1], int(p[2])) for p in parts if p is not None), strict=True)
    return len(set(stems)) == 1 and list(numbers) in (list(range(len(names))), list(range(1, len(names) + 1)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _camera_option(theirs: Sequence[str], ours: Sequence[str]) -> str:
    pairs = list(zip(theirs, ours, strict=False))
    return " ".join(f"--camera {a}={b}" for a, b in pairs)


def _camera_example(policy: Interface, theirs: str = "front") -> str:
    return f"write theirs=ours, such as --camera {theirs}={policy.cameras[0] if policy.cameras else 'top'}"
