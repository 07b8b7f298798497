"""Select the features of a dataset that are the cameras, the state, the action and the instruction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from imagewam_cli.data.lerobot.info import Feature, Info
from imagewam_cli.data.types import NO_STATE, KeyMap
from imagewam_cli.errors import DatasetError, UsageError, nearest

USUAL_KEYS = KeyMap()
"""LeRobot's usual names, all cameras."""

_NUMBERS = ("float", "int", "uint")
_TEXT = ("string", "large_string")
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The features that a reader uses."""

    state: tuple[Feature, ...]
    """Features whose values, one after the other, are the state; empty if there is no state."""
    action: tuple[Feature, ...]
    cameras: Mapping[str, Feature]
    """camera name -> feature, in the requested order"""
    instruction: Feature | None
    """A column of texts or of indices into the tasks; None: the column `task_index`."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """One name per dimension of the state."""
        return vector_names(self.state)

    @property
    def action_names(self) -> tuple[str, ...]:
        """One name per dimension of an action."""
        return vector_names(self.action)


def select_features(info: Info, keys: KeyMap) -> Selection:
    """Return the features that `keys` names; without camera names, all cameras in the dataset's order.

    Raises:
        DatasetError: a feature has the wrong kind, or does not exist; the message lists the existing ones.
        UsageError: state and action share a feature.
    """
    action = _vector(info, keys.action, "action", "--action-key")
    state = () if keys.state == NO_STATE else _vector(info, keys.state, "state", "--state-key", taken=action)
    shared = [feature.key for feature in state if feature in action]
    if shared:
        raise UsageError(
            f"{shared[0]!r} is both the state and the action: the policy would be told what to do",
            f"name the feature that was measured with --state-key, or pass --state-key {NO_STATE}",
        )
    return Selection(
        state=state,
        action=action,
        cameras=_cameras(info, keys.cameras),
        instruction=None if keys.instruction is None else _instruction(info, keys.instruction),
    )


def vector_names(features: Iterable[Feature]) -> tuple[str, ...]:
    """Return the names of the dimensions of several features, one after the other.

    A feature of which a name occurs in another one has its key before each of its names.
    """
    named = [(feature, feature.dimension_names()) for feature in features]
    times = Counter(name for _, names in named for name in set(names))
    return tuple(
        f"{feature.key}.{name}" if any(times[other] > 1 for other in names) else name
        for feature, names in named
        for name in names
    )


def _vector(info: Info, keys: str, role: str, option: str, taken: Iterable[Feature] = ()) -> tuple[Feature, ...]:
    """Return the features that `keys` lists. taken: those that have another role, which a hint does not propose."""
    listed = [keys] if keys in info.features else [key.strip() for key in keys.split(",")]
    twice = [key for key, times in Counter(listed).items() if times > 1]
    if twice:
        raise UsageError(f"{option} names {twice[0]!r} twice", "name each feature once")
    return tuple(_numbers(info, key, role, option, taken) for key in listed)


def _numbers(info: Info, key: str, role: str, option: str, taken: Iterable[Feature]) -> Feature:
    # Booleans and text cannot be normalized. Bookkeeping columns can, so choosing one is allowed.
    vectors = [name for name, feature in info.features.items() if feature.dtype.startswith(_NUMBERS)]
    feature = info.features.get(key)
    if feature is None or key not in vectors:
        problem = "has no feature" if feature is None else "stores no numbers under"
        proposed = [name for name in vectors if name not in {other.key for other in taken}]
        raise DatasetError(
            f"{info.root} {problem} {key!r} for the {role}; it has: {_join_names(vectors)}",
            _suggest(key, proposed, option),
        )
    if feature.size == 0:
        raise DatasetError(
            f"feature {key!r} of {info.root} has shape {list(feature.shape)}, so the {role} would have no number",
            f"choose a different feature with {option}",
        )
    return feature


def _instruction(info: Info, key: str) -> Feature:
    option = "--instruction-key"
    texts = [name for name, feature in info.features.items() if _may_be_instruction(feature)]
    feature = info.features.get(key)
    if feature is None or key not in texts:
        problem = "has no feature" if feature is None else "stores neither a text nor a task number under"
        raise DatasetError(
            f"{info.root} {problem} {key!r} for the instruction; it has: {_join_names(texts)}",
            _suggest(key, texts, option),
        )
    return feature


def _may_be_instruction(feature: Feature) -> bool:
    """Return whether a feature holds one text per frame, or one integer, which may be an index into the tasks."""
    if feature.key in _BOOKKEEPING and feature.key != "task_index":
        return False
    return feature.size == 1 and (feature.dtype in _TEXT or feature.dtype.startswith(("int", "uint")))


def _cameras(info: Info, asked: Iterable[str]) -> dict[str, Feature]:
    by_name: dict[str, Feature] = {}
    for feature in info.features.values():
        if feature.is_camera:
            # If `observation.image` and `observation.images.image` both exist, the second keeps its full key.
            name = feature.camera_name if feature.camera_name not in by_name else feature.key
            by_name[name] = feature
    names = {name: name for name in by_name} | {feature.key: name for name, feature in by_name.items()}
    selected = {}
    for camera in asked:
        if camera not in names:
            raise DatasetError(
                f"{info.root} has no camera {camera!r}; it has: {_join_names(by_name)}",
                _suggest(camera, by_name, "--camera"),
            )
        selected[names[camera]] = by_name[names[camera]]
    return selected or by_name


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _suggest(name: str, choices: Iterable[str], option: str) -> str:
    available = list(choices)
    if not available:
        return f"this dataset has no feature that {option} could name"
    return f"{nearest(name, available)} (pass it with {option})"
