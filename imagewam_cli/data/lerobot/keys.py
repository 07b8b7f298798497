"""Select the features of a dataset that are the cameras, the state and the action."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from imagewam_cli.data.lerobot.info import Feature, Info
from imagewam_cli.data.types import KeyMap
from imagewam_cli.errors import DatasetError, nearest

USUAL_KEYS = KeyMap()
"""LeRobot's usual names, all cameras."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The features that a reader uses."""

    state: Feature
    action: Feature
    cameras: Mapping[str, Feature]
    """camera name -> feature, in the requested order"""


def select_features(info: Info, keys: KeyMap) -> Selection:
    """Return the features that `keys` names; without camera names, all cameras in the dataset's order.

    Raises:
        DatasetError: a feature has the wrong kind, or does not exist; the message lists the existing ones.
    """
    return Selection(
        state=_vector(info, keys.state, "state", "--state-key"),
        action=_vector(info, keys.action, "action", "--action-key"),
        cameras=_cameras(info, keys.cameras),
    )


def _vector(info: Info, key: str, role: str, option: str) -> Feature:
    # Booleans and text cannot be normalized. Bookkeeping columns can, so choosing one is allowed.
    vectors = [name for name, feature in info.features.items() if feature.dtype.startswith(("float", "int", "uint"))]
    feature = info.features.get(key)
    if feature is None or key not in vectors:
        problem = "has no feature" if feature is None else "stores no numbers under"
        raise DatasetError(
            f"{info.root} {problem} {key!r} for the {role}; it has: {_join_names(vectors)}",
            _suggest(key, vectors, option),
        )
    if len(feature.shape) != 1:
        raise DatasetError(
            f"feature {key!r} of {info.root} has shape {list(feature.shape)}, but the {role} must be a vector",
            f"choose a different feature with {option}",
        )
    return feature


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
