"""Read and write policy folders.

policy.json           settings (`PolicyConfig`): horizon, replanning, schedule, cameras, names; action transforms
expert.json           the expert's config
expert.safetensors    the expert's weights
normalization.json    normalizers of state and action, the same objects that training used
editor.json           the editor, its weights and settings (`EditorReference`)
proprio.safetensors   linear map of the state token, if the state is a token of the text
editor/               fine-tuned parts of the editor, which replace the original ones
training.json         the episodes that it was trained on (`TrainingRecord`)
samples.safetensors   a few dataset rows with pictures, so that an export can check itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from imagewam_cli.config import dump_json, from_dict, to_dict
from imagewam_cli.data import dimensions
from imagewam_cli.data.normalization import Normalizer
from imagewam_cli.data.splits import Split
from imagewam_cli.data.types import KeyMap
from imagewam_cli.editors.contract import TokenPlacement
from imagewam_cli.editors.settings import PrefixOptions
from imagewam_cli.errors import ConfigError, DatasetError, RunError, UsageError
from imagewam_cli.files import write_atomically
from imagewam_cli.policy.action_transforms import ActionTransform, read_grippers, read_transform
from imagewam_cli.prefix.spec import KVSpec

VERSION = 1
RELATIVE_VERSION = 2
"""Written for a policy whose normalizers an imagewam that reads only version 1 would apply differently."""
POLICY = "policy.json"
NORMALIZATION = "normalization.json"
EDITOR = "editor.json"
SAMPLES = "samples.safetensors"
TRAINING = "training.json"
PROPRIO = "proprio.safetensors"
TUNED = "editor"

_TRANSFORMS = "action_transforms"
_GRIPPERS = "grippers"
"""Key of older policies: indices of the action dimensions that `GripperSign` transforms."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ProprioConfig:
    """Settings of a robot state that is one token of the editor's text.

    text_tokens: length to which the text is truncated or padded before the token is added.
    """

    state_dim: int
    text_width: int
    placement: TokenPlacement
    text_tokens: int


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Settings that decide how a policy acts."""

    version: int = VERSION
    horizon: int
    execute: int
    """Number of actions to execute before planning again."""
    inference_steps: int
    shift: float
    noise_seed: int
    fps: float
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    keys: KeyMap | None = None
    """The dataset's features that it was trained on; None if it was made before policies kept them, or imported."""
    proprio: ProprioConfig | None = None
    """Settings of the state token; None if the state goes to the expert instead of the text."""


@dataclass(frozen=True, kw_only=True)
class EditorReference:
    """The editor that a policy needs. `fingerprint` is checked whenever the editor is loaded."""

    name: str
    settings: PrefixOptions
    spec: KVSpec
    fingerprint: Mapping[str, object]
    tuned: bool = False
    """Whether the policy's `editor/` folder holds fine-tuned parts that replace the editor's own."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """The episodes that a policy was trained on, and those that were held out for its validation.

    dataset: identity of the dataset. train, validation: numbers of episodes as text, such as "0-9,12"; other episodes
    of the dataset were not used.
    """

    dataset: str
    train: str
    validation: str

    @property
    def split(self) -> Split:
        """The numbers of the episodes.

        Raises:
            RunError: the record is damaged.
        """
        try:
            return Split.from_dict({"train": self.train, "validation": self.validation})
        except UsageError as error:
            raise RunError(f"the policy's record of its training is damaged: {error.message}") from None


@dataclass(frozen=True, kw_only=True)
class BundleParts:
    """Everything in a policy folder except the expert."""

    config: PolicyConfig
    editor: EditorReference
    state_normalizer: Normalizer
    action_normalizer: Normalizer
    action_transforms: tuple[ActionTransform, ...] = ()
    """Transforms from denormalized actions to robot commands, in order."""
    training: TrainingRecord | None = None
    """None for policies that were imported, or made before it was recorded."""


def write_bundle(folder: Path, parts: BundleParts) -> None:
    """Write the JSON files of a policy folder; `expert.checkpoint.save_expert` writes the expert."""
    folder.mkdir(parents=True, exist_ok=True)
    normalizers = {"state": parts.state_normalizer.to_dict(), "action": parts.action_normalizer.to_dict()}
    write_atomically(folder / NORMALIZATION, dump_json(normalizers).encode())
    write_atomically(folder / EDITOR, dump_json(to_dict(parts.editor)).encode())
    if parts.training is not None:
        write_atomically(folder / TRAINING, dump_json(to_dict(parts.training)).encode())
    policy = to_dict(parts.config)
    if parts.config.keys is None:
        del policy["keys"]
    if not (parts.state_normalizer.as_before and parts.action_normalizer.as_before):
        policy["version"] = RELATIVE_VERSION
    if parts.action_transforms:  # omitted when empty, so that an older imagewam can read the policy
        policy[_TRANSFORMS] = [transform.to_dict() for transform in parts.action_transforms]
    write_atomically(folder / POLICY, dump_json(policy).encode())


def read_bundle(folder: Path) -> BundleParts:
    """Read the JSON files of a policy folder.

    Raises:
        RunError: a file is missing or damaged, or has a different version.
    """
    policy = _json(folder / POLICY)
    version = policy.get("version")  # checked first: a newer version may have other keys
    if version not in (VERSION, RELATIVE_VERSION):
        raise RunError(
            f"{folder / POLICY} has version {version!r}; this imagewam reads version {VERSION} or {RELATIVE_VERSION}",
            "upgrade imagewam",
        )
    config, transforms = _policy(folder / POLICY, policy | {"version": VERSION})
    return BundleParts(
        config=config,
        editor=_read(folder / EDITOR, EditorReference),
        state_normalizer=_normalizer(folder / NORMALIZATION, "state"),
        action_normalizer=_normalizer(folder / NORMALIZATION, "action"),
        action_transforms=transforms,
        training=_read(folder / TRAINING, TrainingRecord) if (folder / TRAINING).exists() else None,
    )


def inherited_faults(parts: BundleParts) -> list[str]:
    """Name the dimensions that an older policy, or a published one, normalizes badly; one line each kind."""
    names = parts.config.state_names, parts.config.action_names
    return [
        *dimensions.inherited_faults("state", names[0], parts.state_normalizer),
        *dimensions.inherited_faults("action", names[1], parts.action_normalizer),
    ]


def find_bundle(path: Path) -> Path:
    """Return the policy folder at `path`: the folder itself, or `policy/` inside a run.

    Raises:
        RunError: `path` does not exist or contains no policy.
    """
    for folder in (path, path / "policy"):
        if (folder / POLICY).exists():
            return folder
    if not path.exists():
        raise RunError(f"{path} does not exist", "train a policy with `imagewam train-expert`")
    raise RunError(f"{path} holds no policy: it has no {POLICY}", "train one with `imagewam train-expert`")


def _policy(path: Path, values: dict[str, Any]) -> tuple[PolicyConfig, tuple[ActionTransform, ...]]:
    transforms, grippers = values.pop(_TRANSFORMS, []), values.pop(_GRIPPERS, [])
    try:
        config = from_dict(PolicyConfig, values, source=str(path))
        if not isinstance(transforms, list):
            raise ConfigError(f"{_TRANSFORMS!r} must be a list, got {type(transforms).__name__}")
        names = config.action_names
        read = tuple(read_transform(transform, names) for transform in transforms)
        return config, (*read_grippers(grippers, names), *read)
    except ConfigError as error:
        raise RunError(f"{path} is damaged: {error.message}", error.hint) from None


def _read(path: Path, into: type[T]) -> T:
    try:
        return from_dict(into, _json(path), source=str(path))
    except ConfigError as error:
        raise RunError(f"{path} is damaged: {error.message}", error.hint) from None


def _normalizer(path: Path, field: str) -> Normalizer:
    values = _json(path).get(field)
    try:
        return Normalizer.from_dict(values if isinstance(values, dict) else {})
    except DatasetError as error:
        raise RunError(f"{path} is damaged: {field}: {error.message}", error.hint) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing", "copy the whole policy folder, or train the policy again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} is damaged: it is not a mapping")
    return values
