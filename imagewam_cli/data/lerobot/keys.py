"""Select the features of a dataset that are the cameras, the state, the action and the instruction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from imagewam_cli.data.lerobot.info import Feature, Info
from imagewam_cli.data.lerobot.messages import DTYPE
from imagewam_cli.data.lerobot.proposals import is_action, is_numeric, may_be_instruction, propose
from imagewam_cli.data.types import NO_STATE, KeyMap
from imagewam_cli.errors import DatasetError, UsageError, nearest, warn

USUAL_KEYS = KeyMap()
"""LeRobot's usual names, all cameras."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The features that a reader uses."""

    state: tuple[Feature, ...]
    """Features whose values, one after the other, are the state; empty if there is no state."""
    action: tuple[Feature, ...]
    cameras: Mapping[str, Feature]
    """camera name -> feature, in the requested order"""
    instruction: Feature | None
    """A column of texts, of indices into the tasks, or of messages; None: the column `task_index`."""
    style: str | None = None
    """Style of the messages that are instructions; None if the column holds none."""

    def keys(self, asked: KeyMap) -> KeyMap:
        """Return `asked` with the features of state and action as they were found."""
        state, action = (",".join(feature.key for feature in role) for role in (self.state, self.action))
        return replace(asked, state=state or NO_STATE, action=action)

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
    listed = {"state": _listed(info, keys.state, "state"), "action": _listed(info, keys.action, "action")}
    if keys.state == USUAL_KEYS.state and _has_no_state(info, listed["action"]):
        warn(
            f"{info.root} has no state: only pictures and instructions are used (--state-key {NO_STATE} says the same "
            "without this warning)"
        )
        listed["state"] = []
    _require_usual(info, keys)
    action = tuple(_numbers(info, key, "action", taken=listed["state"]) for key in listed["action"])
    state = tuple(_numbers(info, key, "state", taken=listed["action"]) for key in listed["state"])
    shared = [feature.key for feature in state if feature in action]
    if shared:
        raise UsageError(
            f"{shared[0]!r} is both the state and the action: the policy would be told what to do",
            f"name the feature that was measured with --state-key, or pass --state-key {NO_STATE}",
        )
    instruction, style = (None, None) if keys.instruction is None else _instruction(info, keys.instruction)
    return Selection(
        state=state, action=action, cameras=_cameras(info, keys.cameras), instruction=instruction, style=style
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


def _listed(info: Info, keys: str, role: str) -> list[str]:
    """Return the keys in a comma list; none for a dataset that is read without a state."""
    if keys in info.features:
        return [keys]
    if role == "state" and keys == NO_STATE:
        return []
    listed = [key.strip() for key in keys.split(",")]
    twice = [key for key, times in Counter(listed).items() if times > 1]
    if twice:
        raise UsageError(f"--{role}-key names {twice[0]!r} twice", "name each feature once")
    return listed


def _has_no_state(info: Info, action: Sequence[str]) -> bool:
    """Return whether the dataset has neither the usual state nor any feature that may be one."""
    return USUAL_KEYS.state not in info.features and not set(propose(info.features.values()).state) - set(action)


def _require_usual(info: Info, keys: KeyMap) -> None:
    """If a usual key is absent, raise an error that proposes others for all absent ones at once."""
    proposal = propose(info.features.values())
    usual = {"state": keys.state == USUAL_KEYS.state, "action": keys.action == USUAL_KEYS.action}
    missing = [role for role in usual if usual[role] and getattr(USUAL_KEYS, role) not in info.features]
    if "state" in missing and _has_no_state(info, _listed(info, keys.action, "action")):
        missing.remove("state")
    # An action that was named as the state is proposed as the action, so another state is proposed with it.
    swapped = "action" in missing and set(_listed(info, keys.state, "state")) & set(proposal.action)
    proposed = proposal.options(["state", "action"] if swapped else missing)
    if missing and proposed:
        wanted = " and ".join(f"{getattr(USUAL_KEYS, role)!r} for the {role}" for role in missing)
        raise DatasetError(
            f"{info.root} has no feature {wanted}; it has: {_join_names(_vectors(info))}",
            f"pass {proposed}, or other features; `imagewam info` describes them",
        )


def _vectors(info: Info) -> list[str]:
    # Bookkeeping columns can be normalized, so choosing one is allowed.
    return [name for name, feature in info.features.items() if is_numeric(feature)]


def _numbers(info: Info, key: str, role: str, taken: Iterable[str]) -> Feature:
    """Return a feature that holds numbers. taken: features of the other role, which a hint does not propose."""
    vectors, option = _vectors(info), f"--{role}-key"
    feature = info.features.get(key)
    if feature is None or key not in vectors:
        problem = "has no feature" if feature is None else "stores no numbers under"
        not_this = {*taken, *_of_other_role(info, role)}
        proposed = [name for name in vectors if name not in not_this]
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


def _of_other_role(info: Info, role: str) -> Iterable[str]:
    """Return the features that a hint does not propose for a role: actions for the state, and the state for actions."""
    if role == "state":
        return [feature.key for feature in info.features.values() if is_action(feature)]
    return propose(info.features.values()).state


def _instruction(info: Info, asked: str) -> tuple[Feature, str | None]:
    """Return the feature of the instruction, and the style of its messages if it holds such."""
    key, _, style = (asked, "", "") if asked in info.features else asked.partition("/")
    messages = info.features.get(key)
    if messages is not None and messages.dtype == DTYPE:
        if not style:
            raise DatasetError(
                f"{info.root} stores messages of several styles under {key!r}, of which one is the instruction",
                f"name its style, such as --instruction-key {key}/subtask",
            )
        return messages, style
    key = asked
    texts = [name for name, feature in info.features.items() if may_be_instruction(feature)]
    feature = info.features.get(key)
    if feature is None or key not in texts:
        problem = "has no feature" if feature is None else "stores neither a text nor a task number under"
        raise DatasetError(
            f"{info.root} {problem} {key!r} for the instruction; it has: {_join_names(texts)}",
            _suggest(key, texts, "--instruction-key"),
        )
    return feature, None


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
        depth = next((f for f in info.features.values() if f.is_depth and camera in (f.key, f.camera_name)), None)
        if camera not in names and depth is not None:
            raise DatasetError(
                f"{info.root}: camera {camera!r} holds depth, not color",
                f"choose among {_join_names(by_name)} with --camera",
            )
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
