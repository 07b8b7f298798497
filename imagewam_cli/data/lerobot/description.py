"""Describe all features of a LeRobot dataset, for `imagewam info`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imagewam_cli.data.lerobot.info import Feature
from imagewam_cli.data.lerobot.keys import USUAL_KEYS
from imagewam_cli.data.lerobot.metadata import load_metadata
from imagewam_cli.data.lerobot.proposals import BOOKKEEPING, is_numeric, is_text, propose
from imagewam_cli.data.lerobot.tables import undeclared_features
from imagewam_cli.data.types import DatasetDescription, FeatureInfo
from imagewam_cli.files import local_name


def describe(root: Path) -> DatasetDescription:
    """Describe the features that meta/info.json declares and the columns that only the data files have.

    Raises:
        DatasetError: the metadata is damaged.
    """
    metadata = load_metadata(root)
    data_file = metadata.episodes[0].data_file
    features = {**metadata.info.features, **undeclared_features(data_file, metadata.info.features)}
    proposal = propose(features.values())
    missing = [role for role in ("state", "action") if getattr(USUAL_KEYS, role) not in features]
    examples = _examples(data_file, proposal.instruction, metadata.tasks)
    return DatasetDescription(
        features=tuple(_described(feature, examples.get(key)) for key, feature in features.items()),
        keys=proposal.keys(missing),
        options=proposal.options(missing),
        instructions=proposal.instruction,
    )


def _described(feature: Feature, example: str | None) -> FeatureInfo:
    return FeatureInfo(
        key=feature.key,
        dtype=feature.dtype,
        shape=feature.shape,
        names=feature.names,
        kind="task index" if example is not None and is_numeric(feature) else _kind(feature),
        example=example,
    )


def _kind(feature: Feature) -> str:
    if feature.dtype in ("image", "video"):
        return "camera" if feature.is_camera else "depth"
    if feature.key in BOOKKEEPING:
        return "bookkeeping"
    if is_text(feature):
        return "text"
    return "numbers" if is_numeric(feature) else "other"


def _examples(path: Path, keys: tuple[str, ...], tasks: Mapping[int, object]) -> dict[str, str]:
    """Return the first text of each feature, or the task that its first number names; nothing if it is not readable."""
    try:
        file = pq.ParquetFile(local_name(path), pre_buffer=False)
        columns = [key for key in keys if key in file.schema_arrow.names]
        row = next(file.iter_batches(batch_size=1, columns=columns), None) if columns else None
    except (OSError, pa.ArrowException):
        return {}
    found = {} if row is None else {key: _text(row.column(key)[0].as_py(), tasks) for key in columns}
    return {key: text for key, text in found.items() if text is not None}


def _text(value: Any, tasks: Mapping[int, object]) -> str | None:
    while isinstance(value, list) and value:
        value = value[0]
    text = tasks.get(value) if isinstance(value, int) else value
    return text if isinstance(text, str) else None
