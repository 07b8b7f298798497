"""Describe a dataset for `imagewam info`: its totals, features and sentences."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagewam_cli.cli.dataset_options import DatasetOptions
from imagewam_cli.cli.output import output
from imagewam_cli.cli.tables import table

if TYPE_CHECKING:
    from imagewam_cli.data.types import Dataset, DatasetDescription, FeatureInfo

_MAX_FRAMES = 1_000_000
"""Number of frames of which the instructions are counted."""
_MAX_LINES = 20
_MAX_NAMES = 4


def dataset_values(path: Path, reading: DatasetOptions) -> dict[str, Any]:
    """Describe a dataset as JSON values. If the usual keys are absent, the features that seem to be meant are used.

    Raises:
        DatasetError: the metadata is damaged, or a feature, camera or episode that an option names does not exist.
    """
    from imagewam_cli.data.formats import describe_features

    description = describe_features(path)
    dataset = _opened(path, reading, description)
    values: dict[str, Any] = {"kind": "dataset"}
    if dataset is not None:
        _warn_of_faults(dataset)
        info = dataset.info
        values |= {
            "format": info.format,
            "episodes": info.total_episodes,
            "frames": info.total_rows,
            **({"selected": info.selected} if info.selected else {}),
            "fps": info.fps,
            "robot": info.robot_type,
            "cameras": {name: list(size) for name, size in info.cameras.items()},
            "state": list(info.state_names),
            "action": list(info.action_names),
            "keys": _keys(dataset),
        }
    values["options"] = "" if description is None or reading.names_features() else description.options
    values["features"] = [_feature(feature) for feature in description.features] if description else []
    values |= {"sentences": [], "sentences_of": 0}
    if dataset is not None:
        values["sentences"], values["sentences_of"] = _sentences(dataset)
    values["instruction_features"] = list(description.instructions) if description else []
    return values


def dataset_text(values: dict[str, Any]) -> str:
    """Format the values for people."""
    plain = {k: v for k, v in values.items() if k not in _BLOCKS and v not in (None, "", {})}
    lines = [f"{key}: {_inline(value)}" for key, value in plain.items()]
    if values["features"]:
        lines += ["features:", *_indented(_features_table(values["features"]))]
    if values["sentences"]:
        lines += [_sentences_title(values), *_indented(_sentences_table(values["sentences"]))]
    if values["options"]:
        lines.append(f"options: this dataset lacks LeRobot's usual keys; pass {values['options']} to read it as above")
    if values["instruction_features"] and not (values.get("keys") or {}).get("instruction"):
        names = " or ".join(f"--instruction-key {key}" for key in values["instruction_features"][:_MAX_NAMES])
        lines.append(f"instructions: if the sentences above are not what the robot is told, pass {names}")
    return "\n".join(lines)


_BLOCKS = ("features", "sentences", "sentences_of", "options", "instruction_features")


def _opened(path: Path, reading: DatasetOptions, description: DatasetDescription | None) -> Dataset | None:
    """Open the dataset with the options, or else with the features that seem to be meant; None if none fits."""
    from imagewam_cli.errors import DatasetError

    if description is None or not description.options:
        return reading.open(path)
    try:
        return reading.open(path, description.keys)
    except DatasetError as error:
        if reading.given():
            raise
        output.say(f"{error.message}: only the features are listed")
        return None


def _warn_of_faults(dataset: Dataset) -> None:
    """Warn of episodes that cannot be read, as far as names and headers of files tell."""
    from imagewam_cli.data.formats import check_pictures
    from imagewam_cli.errors import DatasetError, warn

    try:
        check_pictures(dataset)
    except DatasetError as error:
        warn(f"{error.message} ({error.hint})" if error.hint else error.message)


def _keys(dataset: Dataset) -> dict[str, Any]:
    keys = dataset.info.keys
    return {"state": keys.state, "action": keys.action, "instruction": keys.instruction}


def _feature(feature: FeatureInfo) -> dict[str, Any]:
    return {
        "key": feature.key,
        "dtype": feature.dtype,
        "shape": list(feature.shape),
        "names": list(feature.names),
        "kind": feature.kind,
        "example": feature.example,
    }


def _sentences(dataset: Dataset) -> tuple[list[dict[str, Any]], int]:
    """Return each instruction with its numbers of episodes and frames, most frequent first, and the frames counted."""
    from imagewam_cli.data.formats import sentences_of
    from imagewam_cli.errors import DatasetError

    frames: Counter[str | None] = Counter()
    episodes: defaultdict[str | None, set[int]] = defaultdict(set)
    count = min(dataset.info.total_rows, _MAX_FRAMES)
    try:
        with output.progress(count, "frame") as bar:
            for episode, text in islice(sentences_of(dataset), count):
                frames[text] += 1
                episodes[text].add(episode)
                bar.update()
    except DatasetError as error:
        output.say(f"the sentences were not counted to the end: {error.message}")
    found = [{"text": text, "episodes": len(episodes[text]), "frames": number} for text, number in frames.most_common()]
    return found, frames.total()


def _features_table(features: list[dict[str, Any]]) -> str:
    lines = [["feature", "dtype", "shape", "kind", ""]]
    for f in features:
        shape = " x ".join(map(str, f["shape"])) or "1"
        about = repr(f["example"]) if f["example"] is not None else _shortened(f["names"])
        lines.append([f["key"], f["dtype"], shape, f["kind"], about])
    return table(lines)


def _sentences_title(values: dict[str, Any]) -> str:
    count, of, every = len(values["sentences"]), values["sentences_of"], values["frames"]
    return f"sentences: {count}" + (f" in the first {of} of {every} frames" if of < every else "")


def _sentences_table(sentences: list[dict[str, Any]]) -> str:
    lines = [["episodes", "frames", "sentence"]]
    lines += [[str(s["episodes"]), str(s["frames"]), _quoted(s["text"])] for s in sentences[:_MAX_LINES]]
    if len(sentences) > _MAX_LINES:
        lines.append(["", "", f"and {len(sentences) - _MAX_LINES} more; --format json lists all"])
    return table(lines)


def _quoted(text: str | None) -> str:
    return "(missing)" if text is None else repr(text)


def _shortened(names: list[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(v) for v in value) or "none"
    if isinstance(value, dict):
        pairs = {k: " x ".join(map(str, v)) if isinstance(v, list) else v for k, v in value.items() if v is not None}
        return ", ".join(f"{k} {v}" for k, v in pairs.items()) or "none"
    return str(value)
