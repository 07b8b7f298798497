"""Read LeRobot v2.0, v2.1 and v3.0 folders as a stream of rows.

Rows, frames and metadata must agree, or a `DatasetError` names the file and the episode. Nothing is repaired silently:
a loss curve would not reveal an image paired with the wrong action. Where only one reading is possible, a warning says
what was found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from imagewam_cli.data.episodes import ALL_EPISODES, EpisodeSelection, renumbered, selected_info
from imagewam_cli.data.instructions import require_instruction
from imagewam_cli.data.lerobot.data_files import DataFiles
from imagewam_cli.data.lerobot.depth import without_depth
from imagewam_cli.data.lerobot.episode_faults import EpisodeFault, episode_error
from imagewam_cli.data.lerobot.images import ImageCamera, picture_files
from imagewam_cli.data.lerobot.info import Feature
from imagewam_cli.data.lerobot.keys import USUAL_KEYS, select_features
from imagewam_cli.data.lerobot.metadata import Episode, load_metadata
from imagewam_cli.data.lerobot.tables import EpisodeTable, read_episode_tables, with_undeclared
from imagewam_cli.data.lerobot.video import VideoCamera
from imagewam_cli.data.lerobot.video_files import VideoCut, VideoFiles
from imagewam_cli.data.types import DatasetInfo, EpisodeInfo, KeyMap, Row, UInt8Image
from imagewam_cli.errors import DatasetError, UsageError


class _Camera(Protocol):
    """A source of the images of one camera."""

    def frames(self, episode: Episode, stride: int) -> Iterator[UInt8Image]: ...

    def close(self) -> None: ...


class LeRobotDataset:
    """A LeRobot dataset on disk; implements `imagewam_cli.data.types.Dataset`.

    Opening reads the metadata only. Reading holds one episode's numbers and one decoded frame per camera in memory.
    """

    def __init__(self, root: Path, keys: KeyMap = USUAL_KEYS, episodes: EpisodeSelection = ALL_EPISODES) -> None:
        """
        Args:
            root: the folder with `meta/`, `data/` and, for video cameras, `videos/`.
            keys: which features are the state, the action, the cameras and the instruction; default: LeRobot's usual
                names.
            episodes: the episodes to read; nothing of the others is read.

        Raises:
            DatasetError: metadata is missing, damaged or contradictory, the version is not supported, there are no
                episodes, or a feature of `keys` or a chosen episode does not exist.
            UsageError: state and action share a feature.
        """
        self._metadata = load_metadata(root)
        known = {episode.index: episode for episode in self._metadata.episodes}
        chosen = [known[index] for index in episodes.choose(list(known), root)]
        _require_rows(root, chosen)
        info = with_undeclared(self._metadata.info, keys, chosen[0].data_file)
        self._episodes = renumbered([EpisodeInfo(index=e.index, length=e.length, first_row=0) for e in chosen])
        self._by_index = {
            here.index: replace(episode, first_row=here.first_row)
            for here, episode in zip(self._episodes, chosen, strict=True)
        }
        self._selection = without_depth(
            info, select_features(info, keys), list(self._by_index.values()), asked=keys.cameras
        )
        self._data_files = DataFiles(info)
        self._video_files = VideoFiles(info, self._metadata.episodes)
        self._sizes = {name: feature.image_size() for name, feature in self._selection.cameras.items()}
        whole = DatasetInfo(
            root=root,
            format=f"lerobot-{info.version}",
            fps=info.fps,
            robot_type=info.robot_type,
            cameras=self._sizes,
            state_names=self._selection.state_names,
            action_names=self._selection.action_names,
            total_episodes=len(self._metadata.episodes),
            total_rows=sum(episode.length for episode in self._metadata.episodes),
            identity=self._metadata.identity,
            keys=self._selection.keys(keys),
        )
        self._info = selected_info(whole, self._episodes)

    @property
    def info(self) -> DatasetInfo:
        return self._info

    def episodes(self) -> Sequence[EpisodeInfo]:
        """Return all chosen episodes, ascending by index."""
        return self._episodes

    def rows(self, *, episodes: Sequence[int] | None = None, stride: int = 1, images: bool = True) -> Iterator[Row]:
        """Yield every `stride`-th frame of the given episodes (default: all), in order of (episode, frame).

        Each mp4 is decoded once, from its start to its last requested episode. Other mp4s are not opened.
        With `images=False` nothing is decoded and `Row.images` is empty.

        Raises:
            UsageError: `stride` is below 1.
            DatasetError: an episode does not exist, or files of some episodes are missing or have too few or too many
                frames (raised at once, for all of them), or a file is damaged or contradicts the metadata (raised while
                iterating). The message names the file and the episode.
        """
        if stride < 1:
            raise UsageError(f"a stride of {stride} yields no rows", "use a stride of at least 1")
        cameras = self._selection.cameras if images else {}
        wanted, cuts = self._check_files(self._wanted(episodes), cameras.values())
        return self._stream(wanted, stride, cameras, cuts)

    def sentences(self) -> Iterator[tuple[int, str | None]]:
        """Yield the episode and the instruction of every frame, also of those that `rows` refuses: empty or missing.

        Raises:
            DatasetError: a file is missing or damaged (raised while iterating).
        """
        located, faults = self._data_files.locate(self._wanted(None))
        if faults:
            raise episode_error(faults, list(self._by_index))
        alone = replace(self._selection, state=(), action=(), cameras={})
        for path, group in itertools.groupby(located, key=lambda episode: episode.data_file):
            together = list(group)
            for episode, table in zip(together, read_episode_tables(path, together, alone), strict=True):
                for found in table.instruction:
                    text = self._metadata.tasks.get(int(found)) if isinstance(found, np.integer) else found
                    yield episode.index, None if text is None else str(text)

    def check_pictures(self) -> None:
        """Check the files of all episodes, and that videos have their frames, without decoding.

        Raises:
            DatasetError: the message lists all episodes that cannot be read.
        """
        self._check_files(self._wanted(None), self._selection.cameras.values())

    def files(self, *, cameras: Sequence[str], episodes: Sequence[int] | None = None) -> Sequence[str]:
        """Return the files that hold rows, or pictures of these cameras, of the given episodes (default: all).

        Paths are relative to the dataset's folder, with forward slashes. A file that also holds other episodes counts.

        Raises:
            DatasetError: an episode does not exist, or a file is missing.
        """
        features = [self._selection.cameras[name] for name in cameras]
        videos = [feature.key for feature in features if feature.is_video]
        wanted, faults = self._data_files.locate(self._wanted(episodes))
        faults = self._video_files.missing(wanted, videos) | faults
        if faults:
            raise episode_error(faults, [episode.index for episode in self._wanted(episodes)])
        paths = [p for e in wanted for p in (e.data_file, *(e.videos[key].path for key in videos))]
        root = self._info.root
        pictures = [path for f in features if not f.is_video for path in picture_files(f.key, root, wanted)]
        return [
            path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
            for path in dict.fromkeys([*paths, *pictures])
        ]

    def _wanted(self, episodes: Sequence[int] | None) -> Sequence[Episode]:
        if episodes is None:
            return list(self._by_index.values())
        for index in episodes:
            if index not in self._by_index:
                raise DatasetError(
                    f"{self._info.root} has no episode {index}",
                    f"it has {len(self._by_index)} episodes, {min(self._by_index)} .. {max(self._by_index)}",
                )
        return [self._by_index[index] for index in sorted(set(episodes))]

    def _check_files(
        self, wanted: Sequence[Episode], cameras: Iterable[Feature]
    ) -> tuple[Sequence[Episode], Mapping[str, Mapping[int, VideoCut]]]:
        """Return the episodes with the files that hold their rows, and their frames in the videos by feature key.

        Files are examined before any row is read, so that a fault is not found after hours. Each is examined once.
        """
        located, faults = self._data_files.locate(wanted)
        cuts, unseen = self._video_files.locate(wanted, [feature.key for feature in cameras if feature.is_video])
        faults = unseen | faults
        if faults:
            raise episode_error(faults, [episode.index for episode in wanted])
        return located, cuts

    def _stream(
        self,
        wanted: Sequence[Episode],
        stride: int,
        cameras: Mapping[str, Feature],
        cuts: Mapping[str, Mapping[int, VideoCut]],
    ) -> Iterator[Row]:
        with ExitStack() as stack:
            sources = {name: self._open(name, feature, wanted, cuts) for name, feature in cameras.items()}
            for source in sources.values():
                stack.callback(source.close)
            for path, group in itertools.groupby(wanted, key=lambda episode: episode.data_file):
                together = list(group)
                tables = read_episode_tables(path, together, self._selection)
                for episode, table in zip(together, tables, strict=True):
                    yield from self._episode(episode, table, stride, sources)

    def _open(
        self,
        name: str,
        feature: Feature,
        wanted: Sequence[Episode],
        cuts: Mapping[str, Mapping[int, VideoCut]],
    ) -> _Camera:
        if feature.is_video:
            return VideoCamera(feature.key, self._sizes[name], cuts[feature.key])
        return ImageCamera(feature.key, self._sizes[name], self._info.root, wanted)

    def _episode(
        self, episode: Episode, table: EpisodeTable, stride: int, sources: Mapping[str, _Camera]
    ) -> Iterator[Row]:
        instructions = self._instructions(episode, table)
        numbers = range(0, episode.length, stride)
        streams = [source.frames(episode, stride) for source in sources.values()]
        # A strict zip runs every stream to its end, where the stream checks that its file also ends.
        pictures: Iterator[tuple[UInt8Image, ...]] = (
            zip(*streams, strict=True) if streams else itertools.repeat((), len(numbers))
        )
        for frame, shown in zip(numbers, pictures, strict=True):
            yield Row(
                row=episode.first_row + frame,
                episode=episode.index,
                frame=frame,
                timestamp=float(table.timestamps[frame]),
                instruction=instructions[frame],
                state=table.state[frame],
                action=table.action[frame],
                images=dict(zip(sources, shown, strict=True)),
            )

    def _instructions(self, episode: Episode, table: EpisodeTable) -> Sequence[str]:
        """Return the instruction of each frame."""
        where, found = f"{episode.data_file}, episode {episode.index}", table.instruction
        if not isinstance(found, np.ndarray):
            texts = {text: require_instruction(text, where) for text in set(found)}
            return [texts[text] for text in found]
        unknown = sorted(set(found.tolist()) - self._metadata.tasks.keys())
        if unknown:
            feature = self._selection.instruction
            raise DatasetError(
                f"{where}: {'task_index' if feature is None else feature.key} {unknown[0]} "
                f"is not among the {len(self._metadata.tasks)} tasks of the dataset",
                "the task list in meta/ and the data files do not match"
                if feature is None
                else "choose a different feature with --instruction-key",
            )
        texts = {
            number: require_instruction(self._metadata.tasks[number], f"{where}, task {number}")
            for number in set(found.tolist())
        }
        return [texts[number] for number in found.tolist()]


def _require_rows(root: Path, chosen: Sequence[Episode]) -> None:
    """Raise the error for all episodes without a row."""
    empty = {
        episode.index: EpisodeFault(path=root / "meta", problem=f"its length is {episode.length}")
        for episode in chosen
        if episode.length < 1
    }
    if empty:
        raise episode_error(empty, [episode.index for episode in chosen])
