"""A policy is one folder.

policy.json           how it acts: horizon, replanning, schedule, cameras, names (`PolicyConfig`)
expert.json           shape of the expert           expert.safetensors   its weights
normalization.json    the normalisers of state and action, the same objects that training used
editor.json           which editor, with which weights and settings, gives the prefix (`EditorReference`)
proprio.safetensors   only where the state is a token of the text: its linear map
editor/               only where the editor was trained too: the parts that stand in place of its own
samples.safetensors   a few dataset rows with pictures, so that an export can check itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from imagewam_cli.config import dump_json, from_dict, to_dict
from imagewam_cli.data.normalization import Normalizer
from imagewam_cli.editors.contract import PrefixSettings, TokenPlacement
from imagewam_cli.errors import ConfigError, DatasetError, RunError
from imagewam_cli.files import write_atomically
from imagewam_cli.prefix.spec import KVSpec

VERSION = 1
POLICY = "policy.json"
NORMALIZATION = "normalization.json"
EDITOR = "editor.json"
SAMPLES = "samples.safetensors"
PROPRIO = "proprio.safetensors"
TUNED = "editor"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ProprioConfig:
    """The state as one token of the editor's text. text_tokens: what the text before it is cut or padded to."""

    state_dim: int
    text_width: int
    placement: TokenPlacement
    text_tokens: int


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How a policy acts."""

    version: int = VERSION
    horizon: int
    execute: int
    """Actions carried out before the next look."""
    inference_steps: int
    shift: float
    noise_seed: int
    fps: float
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    grippers: tuple[int, ...] = ()
    """Dimensions of the action that were learned in [0, 1], 1 open, and are sent as -1 open, 1 closed, nothing between
    (LIBERO)."""
    proprio: ProprioConfig | None = None
    """None: the state enters on the action side."""


@dataclass(frozen=True, kw_only=True)
class EditorReference:
    """The editor that a policy needs. `fingerprint` is compared when it is loaded again."""

    name: str
    settings: PrefixSettings
    spec: KVSpec
    fingerprint: Mapping[str, Any]
    tuned: bool = False
    """Whether the policy's `editor/` has parts that stand in place of the editor's own."""


@dataclass(frozen=True, kw_only=True)
class BundleParts:
    """Everything of a policy folder but the expert."""

    config: PolicyConfig
    editor: EditorReference
    state_normalizer: Normalizer
    action_normalizer: Normalizer


def write_bundle(folder: Path, parts: BundleParts) -> None:
    """Write the JSON files; the expert is written by `expert.checkpoint.save_expert`."""
    folder.mkdir(parents=True, exist_ok=True)
    normalizers = {"state": parts.state_normalizer.to_dict(), "action": parts.action_normalizer.to_dict()}
    write_atomically(folder / NORMALIZATION, dump_json(normalizers).encode())
    write_atomically(folder / EDITOR, dump_json(to_dict(parts.editor)).encode())
    write_atomically(folder / POLICY, dump_json(to_dict(parts.config)).encode())


def read_bundle(folder: Path) -> BundleParts:
    """The parts of a policy folder.

    Raises:
        RunError: a file is missing, damaged, or of a newer version.
    """
    version = _json(folder / POLICY).get("version")  # first: a newer version may have other keys
    if version != VERSION:
        raise RunError(
            f"{folder / POLICY} has version {version!r}; this imagewam reads version {VERSION}", "upgrade imagewam"
        )
    return BundleParts(
        config=_read(folder / POLICY, PolicyConfig),
        editor=_read(folder / EDITOR, EditorReference),
        state_normalizer=_normalizer(folder / NORMALIZATION, "state"),
        action_normalizer=_normalizer(folder / NORMALIZATION, "action"),
    )


def find_bundle(path: Path) -> Path:
    """The policy folder that `path` means: itself, or `policy/` of a run.

    Raises:
        RunError: neither.
    """
    for folder in (path, path / "policy"):
        if (folder / POLICY).exists():
            return folder
    if not path.exists():
        raise RunError(f"{path} does not exist", "train a policy with `imagewam train-expert`")
    raise RunError(f"{path} holds no policy: it has no {POLICY}", "train one with `imagewam train-expert`")


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
        raise RunError(f"{path} is missing", "train the policy again, or copy the whole folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} is damaged: it is not a mapping")
    return values
