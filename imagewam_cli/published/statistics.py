"""Read the published code's dataset_stats.json.

Format: {"state": {KEY: {...}}, "action": {KEY: {...}}, ...}. Each innermost mapping has global_min, global_max,
global_q01, global_q99, global_mean and global_std, with one number per dimension. It also has the same per step, which
no published policy uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagewam_cli.data.normalization import FieldStats
from imagewam_cli.errors import DatasetError

_NAMES = ("min", "max", "mean", "std", "q01", "q99")
_HINT = "pass the dataset_stats.json that was published with the checkpoint"


def read_statistics(path: Path) -> tuple[FieldStats, FieldStats]:
    """Read the statistics of state and action, in this order.

    Raises:
        DatasetError: the file is missing, is damaged or describes several robots.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}", _HINT) from None
    if not isinstance(values, Mapping):
        raise DatasetError(f"{path} contains no statistics", _HINT)
    if values.get("type") == "per_embodiment":
        robots = ", ".join(values.get("embodiments", {}))
        raise DatasetError(
            f"{path} has separate statistics for the robots {robots}", "save the statistics of one robot to a file"
        )
    return _field(path, values, "state"), _field(path, values, "action")


def _field(path: Path, values: Mapping[str, Any], field: str) -> FieldStats:
    keys = values.get(field)
    if not isinstance(keys, Mapping) or len(keys) != 1:
        raise DatasetError(f"{path} must have exactly one set of {field} statistics", _HINT)
    (found,) = keys.values()
    try:
        return FieldStats.from_dict({name: found[f"global_{name}"] for name in _NAMES})
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{path}: the statistics of {field} lack {error}", _HINT) from None
