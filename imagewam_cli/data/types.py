"""Observations, action chunks and dataset rows, as numpy arrays in the robot's own units. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from imagewam_cli.runtime.observation import FloatArray as FloatArray
from imagewam_cli.runtime.observation import Observation as Observation

UInt8Image = npt.NDArray[np.uint8]
"""One picture, (H, W, 3), RGB."""

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ActionChunk:
    """T consecutive actions (T, A) in robot units; `is_pad` (T,) marks steps beyond the episode's end."""

    actions: FloatArray
    is_pad: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class EpisodeInfo:
    """One recorded episode: rows `first_row` .. `first_row + length - 1` of the dataset."""

    index: int
    length: int
    first_row: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One frame of a recorded episode.

    row: index in the whole dataset; frame: index in the episode; images: camera -> uint8 (H, W, 3);
    state: (S,) and action: (A,), float32 or float64 as recorded; timestamp: seconds from the episode's start.
    """

    row: int
    episode: int
    frame: int
    timestamp: float
    instruction: str
    state: FloatArray
    action: FloatArray
    images: Mapping[str, UInt8Image] = field(default_factory=dict)
    variant: int = 0
    """Number of the view: 0 is the recorded frame, others are augmented (`imagewam_cli.data.augmentation`)."""

    def observation(self) -> Observation:
        """Return the policy's input at this row."""
        return Observation(images=self.images, state=self.state, instruction=self.instruction)


NO_STATE = "none"
"""`KeyMap.state` of a dataset that is read without a state; its states have no dimension."""


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Names of the features that are the state, the action, the cameras and the instruction.

    Empty `cameras` means every camera of the dataset, in its own order.
    """

    state: str = "observation.state"
    """A feature, or several separated by commas: their values are concatenated in this order. `NO_STATE`: no state."""
    action: str = "action"
    """Like `state`."""
    cameras: tuple[str, ...] = ()
    instruction: str | None = None
    """Feature that holds the instruction, as text or as an index into the tasks; None: the task of each frame."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Metadata of a dataset, known before any frame is decoded."""

    root: Path
    format: str
    fps: float
    robot_type: str | None
    cameras: Mapping[str, tuple[int, int]]
    """camera name (without the `observation.images.` prefix) -> (height, width)"""
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    total_episodes: int
    total_rows: int
    identity: str
    """Hex digest of the metadata that fixes the dataset's content; changes when the dataset changes."""
    keys: KeyMap = KeyMap()
    """Names of the features that are read."""
    selected: str | None = None
    """The episodes that are read, such as "0-9,12"; None: all of them."""

    @property
    def state_dim(self) -> int:
        """Number of dimensions of the state."""
        return len(self.state_names)

    @property
    def action_dim(self) -> int:
        """Number of dimensions of an action."""
        return len(self.action_names)


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """One feature of a dataset, whatever it is called."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """Names of its values or axes; empty if the dataset has none."""
    kind: str
    """What it can be: "numbers", "camera", "depth", "text", "task index", "bookkeeping" or "other"."""
    example: str | None = None
    """First text of a feature that may be the instruction."""


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """All features of a dataset, and which of them may be state, action and instruction, judging by their names."""

    features: tuple[FeatureInfo, ...]
    keys: KeyMap
    """LeRobot's usual keys, or others where the usual ones are absent."""
    options: str
    """The options that name `keys`, to paste into a command; empty if the usual keys exist."""
    instructions: tuple[str, ...]
    """Features of which each may be the instruction instead of the tasks, best first."""


class Dataset(Protocol):
    """A recorded dataset. Rows are streamed, so memory does not grow with the number of episodes."""

    @property
    def info(self) -> DatasetInfo:
        """Metadata of the dataset."""
        ...

    def episodes(self) -> Sequence[EpisodeInfo]:
        """Return all episodes in order."""
        ...

    def rows(self, *, episodes: Sequence[int] | None = None, stride: int = 1, images: bool = True) -> Iterator[Row]:
        """Yield every `stride`-th frame of the given episodes (default: all), in order of (episode, frame).

        Each video file is decoded once, sequentially. With `images=False` nothing is decoded and `Row.images` is empty.

        Raises:
            DatasetError: a file is missing or damaged; the message names it and the episode. What the names and headers
                of files tell is raised by the call, before the first row.
        """
        ...
