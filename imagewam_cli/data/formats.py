"""Open a dataset of any installed format.

Plugins add formats as a `DatasetFormat`. LeRobot's is built in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from imagewam_cli.data.episodes import ALL_EPISODES, EpisodeSelection, SelectedDataset
from imagewam_cli.data.types import Dataset, DatasetDescription, KeyMap
from imagewam_cli.errors import DatasetError
from imagewam_cli.files import expanded
from imagewam_cli.registry import Registry

_LEROBOT_MARKER = "meta/info.json"
_USUAL_KEYS = KeyMap()


class DatasetFormat(Protocol):
    """A dataset format; `DatasetFormatEntry.load` names a class that takes no arguments."""

    def detect(self, root: Path) -> bool:
        """Return whether the folder holds a dataset of this format, judging by its file names alone."""
        ...

    def open(self, root: Path, keys: KeyMap) -> Dataset:
        """Open the dataset, reading only its metadata.

        Raises:
            DatasetError: its version is not supported, its metadata is damaged or lists no episodes, or a feature of
                `keys` does not exist (the message names the existing ones).
        """
        ...


@runtime_checkable
class SelectiveFormat(Protocol):
    """A `DatasetFormat` that reads nothing of the episodes that are left out, so that their faults do not matter."""

    def open_selected(self, root: Path, keys: KeyMap, episodes: EpisodeSelection) -> Dataset:
        """Open the chosen episodes of a dataset, like `DatasetFormat.open`. Rows are counted within these episodes.

        Raises:
            DatasetError: also if a chosen or excluded episode does not exist, or none is left.
        """
        ...


@runtime_checkable
class ChecksPictures(Protocol):
    """A `Dataset` that can tell without decoding which episodes lack frames."""

    def check_pictures(self) -> None:
        """Check the files of all episodes and cameras.

        Raises:
            DatasetError: files are missing, or have too few frames; the message lists all such episodes.
        """
        ...


@runtime_checkable
class ListsSentences(Protocol):
    """A `Dataset` that can read its instructions alone, also those that are missing or empty."""

    def sentences(self) -> Iterator[tuple[int, str | None]]:
        """Yield the episode and the instruction of every frame; None for a missing one.

        Raises:
            DatasetError: a file is missing or damaged.
        """
        ...


@runtime_checkable
class DescribedFormat(Protocol):
    """A `DatasetFormat` that lists the features of a dataset, whatever they are called."""

    def describe(self, root: Path) -> DatasetDescription:
        """Describe the features.

        Raises:
            DatasetError: the metadata is damaged.
        """
        ...


class LeRobotFormat:
    """LeRobot v2.0, v2.1 and v3.0, recognized by `meta/info.json`."""

    def detect(self, root: Path) -> bool:
        return (root / _LEROBOT_MARKER).is_file()

    def open(self, root: Path, keys: KeyMap) -> Dataset:
        from imagewam_cli.data.lerobot.reader import LeRobotDataset

        return LeRobotDataset(root, keys)

    def open_selected(self, root: Path, keys: KeyMap, episodes: EpisodeSelection) -> Dataset:
        from imagewam_cli.data.lerobot.reader import LeRobotDataset

        return LeRobotDataset(root, keys, episodes)

    def describe(self, root: Path) -> DatasetDescription:
        from imagewam_cli.data.lerobot.description import describe

        return describe(root)


def open_dataset(path: str | Path, keys: KeyMap = _USUAL_KEYS, episodes: EpisodeSelection = ALL_EPISODES) -> Dataset:
    """Open the dataset in folder `path`, reading only its metadata.

    `keys` names the features that are the state, the action, the cameras and the instruction. A camera's name is its
    feature key without `observation.images.` (`observation.image` is `image`); `keys.cameras` takes either form.
    `episodes` leaves out all others, whatever the format.

    Raises:
        DatasetError: `path` is not a folder, holds no dataset of an installed format, or cannot be opened (see
            `DatasetFormat.open`); or an episode does not exist.
    """
    dataset_format, root = _format_of(path)
    if episodes.is_all:
        return dataset_format.open(root, keys)
    if isinstance(dataset_format, SelectiveFormat):
        return dataset_format.open_selected(root, keys, episodes)
    return SelectedDataset(dataset_format.open(root, keys), episodes)


def describe_features(path: str | Path) -> DatasetDescription | None:
    """Describe the features of the dataset in folder `path`; None if its format cannot list them.

    Raises:
        DatasetError: as `open_dataset`.
    """
    dataset_format, root = _format_of(path)
    return dataset_format.describe(root) if isinstance(dataset_format, DescribedFormat) else None


def _format_of(path: str | Path) -> tuple[DatasetFormat, Path]:
    root = expanded(path)
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise DatasetError(f"dataset {root} {problem}", f"pass the folder that contains {_LEROBOT_MARKER}")
    formats = Registry.installed().dataset_formats
    for entry in formats:
        dataset_format: DatasetFormat = formats.load(entry.name)()
        if dataset_format.detect(root):
            return dataset_format, root
    raise DatasetError(
        f"{root} has no {_LEROBOT_MARKER}: it is not a LeRobot dataset",
        _nested_hint(root) or "pass the folder that contains meta/ and data/",
    )


def sentences_of(dataset: Dataset) -> Iterator[tuple[int, str | None]]:
    """Yield the episode and the instruction of every frame.

    Raises:
        DatasetError: a file is missing or damaged; or an instruction is missing or empty, if the format cannot list it.
    """
    if isinstance(dataset, ListsSentences):
        return dataset.sentences()
    return ((row.episode, row.instruction) for row in dataset.rows(images=False))


def check_pictures(dataset: Dataset) -> None:
    """Check that there is a camera, and the files of all episodes as far as the format can tell without decoding.

    Raises:
        DatasetError: the dataset has no camera; or files are missing or have too few frames, and the message lists all
            such episodes.
    """
    if not dataset.info.cameras:
        raise DatasetError(
            f"{dataset.info.root} has no camera: an image editor needs pictures",
            "`imagewam info` lists the dataset's features; depth maps are not used",
        )
    if isinstance(dataset, ChecksPictures):
        dataset.check_pictures()


def _nested_hint(root: Path) -> str | None:
    """Suggest a sub-folder that holds a dataset: downloads often nest it one folder deeper."""
    nested = sorted(marker.parent.parent for marker in root.glob(f"*/{_LEROBOT_MARKER}"))
    return f"did you mean {str(nested[0])!r}?" if nested else None
