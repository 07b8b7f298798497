"""Opening a dataset without knowing its format: the one door for the command line and the cache builder.

A format is a `DatasetFormat`, installed as a plugin; LeRobot's is the core's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from imagewam_cli.data.types import Dataset, KeyMap
from imagewam_cli.errors import DatasetError
from imagewam_cli.registry import Registry

_LEROBOT_MARKER = "meta/info.json"
_USUAL_KEYS = KeyMap()


class DatasetFormat(Protocol):
    """What a `DatasetFormatEntry.load` names: a class without constructor arguments."""

    def detect(self, root: Path) -> bool:
        """Is the folder a dataset of this format? Looks at file names only."""
        ...

    def open(self, root: Path, keys: KeyMap) -> Dataset:
        """The dataset; only metadata is read.

        Raises:
            DatasetError: its version is not supported, its metadata is damaged or lists no episodes, or a feature of
                `keys` does not exist (the message names those that do).
        """
        ...


class LeRobotFormat:
    """LeRobot v2.1 and v3.0, known by `meta/info.json`."""

    def detect(self, root: Path) -> bool:
        return (root / _LEROBOT_MARKER).is_file()

    def open(self, root: Path, keys: KeyMap) -> Dataset:
        from imagewam_cli.data.lerobot.reader import LeRobotDataset

        return LeRobotDataset(root, keys)


def open_dataset(path: str | Path, keys: KeyMap = _USUAL_KEYS) -> Dataset:
    """The dataset in folder `path`; `keys` says which features are the state, the action and the cameras.

    Only metadata is read. Cameras are named by their feature key without `observation.images.`
    (`observation.image` is `image`); `keys.cameras` takes either form.

    Raises:
        DatasetError: `path` is not a folder, or no dataset of an installed format; else as `DatasetFormat.open`.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise DatasetError(f"dataset {root} {problem}", f"pass the folder that contains {_LEROBOT_MARKER}")
    formats = Registry.installed().dataset_formats
    for entry in formats:
        dataset_format: DatasetFormat = formats.load(entry.name)()
        if dataset_format.detect(root):
            return dataset_format.open(root, keys)
    raise DatasetError(
        f"{root} has no {_LEROBOT_MARKER}: it is not a LeRobot dataset",
        _nested_hint(root) or "pass the folder that contains meta/ and data/",
    )


def _nested_hint(root: Path) -> str | None:
    """Downloads often put the dataset one folder deeper."""
    nested = sorted(marker.parent.parent for marker in root.glob(f"*/{_LEROBOT_MARKER}"))
    return f"did you mean {str(nested[0])!r}?" if nested else None
