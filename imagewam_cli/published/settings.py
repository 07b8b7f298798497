"""Read the settings in a published policy's train_config.yaml that the policy needs.

The file is a tree whose layout differs between releases, so a value is found by its key, at any depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from imagewam_cli.editors.contract import TokenPlacement
from imagewam_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a published policy; the defaults are those of the published FLUX.2 configs.

    horizon: None for the robot's default.
    """

    placement: TokenPlacement = "packed"
    text_tokens: int = 512
    horizon: int | None = None
    inference_steps: int = 10


def read_train_config(path: Path) -> TrainSettings:
    """Read the settings from a train_config.yaml.

    Keys: pack_proprio_after_text, qwen_context_len, num_frames (horizon + 1), eval_num_inference_steps.

    Raises:
        ConfigError: the file is missing or not YAML, or a key has several values or one of the wrong type.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    default = TrainSettings()
    pack = _value(path, tree, "pack_proprio_after_text", bool)
    frames = _value(path, tree, "num_frames", int)
    if frames is not None and frames < 2:
        raise ConfigError(f"{path}: num_frames is {frames}, which leaves no actions: it must be at least 2")
    return TrainSettings(
        placement=default.placement if pack is None else "packed" if pack else "appended",
        text_tokens=_value(path, tree, "qwen_context_len", int) or default.text_tokens,
        horizon=None if frames is None else frames - 1,
        inference_steps=_value(path, tree, "eval_num_inference_steps", int) or default.inference_steps,
    )


def _value(path: Path, tree: Any, key: str, kind: type) -> Any:
    """Return the only value of the key, or None, ignoring references to other keys ("${...}")."""
    found = {v for v in _values(tree, key) if v is not None and not (isinstance(v, str) and v.startswith("${"))}
    if len(found) > 1:
        raise ConfigError(f"{path}: {key} has {len(found)} values: {', '.join(sorted(map(str, found)))}")
    value = next(iter(found), None)
    if value is not None and type(value) is not kind:
        raise ConfigError(f"{path}: {key} is {value!r}, not a {'number' if kind is int else 'yes or no'}")
    return value


def _values(tree: Any, key: str) -> Iterator[Any]:
    """Yield the scalar values of the key at any depth; a mapping or list under that key is another setting."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name == key and not isinstance(value, Mapping | list):
                yield value
            yield from _values(value, key)
    elif isinstance(tree, list):
        for item in tree:
            yield from _values(item, key)
