"""A small dataset in memory with known contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from imagewam_cli.data.types import DatasetInfo, EpisodeInfo, Row

INSTRUCTIONS = ("put the red block on the blue zone", "push it left", "stop")


class MemoryDataset:
    """A `Dataset` of episodes of the given lengths. Pictures, states and actions are random, seeded by the row number;
    episodes take the instructions in turn."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        size: tuple[int, int] = (4, 4),
        instructions: Sequence[str] = INSTRUCTIONS,
        identity: str = "made in memory",
        shift: float = 0.0,
    ) -> None:
        """size: (height, width) of the pictures of its only camera, `top`; shift: added to all states."""
        starts = np.cumsum([0, *lengths])
        self._episodes = [EpisodeInfo(index=i, length=n, first_row=int(starts[i])) for i, n in enumerate(lengths)]
        self._size, self._instructions, self._shift = size, tuple(instructions), shift
        self.streams: list[tuple[int, ...]] = []
        """The episodes that each picture stream was opened for. With videos, each stream would decode once."""
        self.pictures = 0
        """Number of pictures that were returned."""
        self.info = DatasetInfo(
            root=Path("memory"),
            format="memory",
            fps=10.0,
            robot_type=None,
            cameras={"top": size},
            state_names=("x", "y"),
            action_names=("dx", "dy", "grip"),
            total_episodes=len(lengths),
            total_rows=int(sum(lengths)),
            identity=hashlib.sha256(identity.encode()).hexdigest(),
        )

    def episodes(self) -> Sequence[EpisodeInfo]:
        return self._episodes

    def rows(self, *, episodes: Sequence[int] | None = None, stride: int = 1, images: bool = True) -> Iterator[Row]:
        if images:
            self.streams.append(tuple(episodes if episodes is not None else range(len(self._episodes))))
        return self._stream(episodes, stride, images)

    def _stream(self, episodes: Sequence[int] | None, stride: int, images: bool) -> Iterator[Row]:
        for episode in self._episodes:
            if episodes is None or episode.index in episodes:
                for frame in range(0, episode.length, stride):
                    self.pictures += images
                    yield self._row(episode, frame, images)

    def _row(self, episode: EpisodeInfo, frame: int, images: bool) -> Row:
        row = episode.first_row + frame
        rng = np.random.default_rng(row)
        picture = rng.integers(0, 256, (*self._size, 3), dtype=np.uint8)
        return Row(
            row=row,
            episode=episode.index,
            frame=frame,
            timestamp=frame / 10,
            instruction=self._instructions[episode.index % len(self._instructions)],
            state=rng.normal(size=2).astype(np.float32) + np.float32(self._shift),
            action=rng.normal(size=3).astype(np.float32),
            images={"top": picture} if images else {},
        )
