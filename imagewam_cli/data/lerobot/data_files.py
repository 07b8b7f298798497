"""Find the data file that holds the rows of each episode.

The episode table of v3 names a file for each episode. Merged and converted datasets have stale numbers there, so the
files themselves are asked which episodes they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imagewam_cli.data.episodes import episodes_text
from imagewam_cli.data.lerobot.episode_faults import EpisodeFault
from imagewam_cli.data.lerobot.info import Info
from imagewam_cli.data.lerobot.metadata import Episode
from imagewam_cli.data.lerobot.tables import flat_index
from imagewam_cli.errors import warn
from imagewam_cli.file_content import content_fault
from imagewam_cli.files import local_name


class DataFiles:
    """The data files of one dataset, each asked once which episodes it holds."""

    def __init__(self, info: Info) -> None:
        self._info = info
        self._held: dict[Path, frozenset[int]] = {}
        self._others: list[Path] | None = None
        self._faults: dict[Path, EpisodeFault] = {}
        self._told: set[int] = set()
        """Episodes that a warning has named."""

    def locate(self, episodes: Sequence[Episode]) -> tuple[list[Episode], dict[int, EpisodeFault]]:
        """Return the episodes with the files that hold their rows, and a fault for each without one.

        Warns if rows are in another file than the episode table says.
        """
        located, faults, moved = [], {}, {}
        for episode in episodes:
            path = self._file_of(episode)
            if path is None:
                faults[episode.index] = self._faults.get(episode.data_file) or EpisodeFault(
                    path=episode.data_file, problem="no data file has rows of the episode"
                )
                continue
            if path != episode.data_file and episode.index not in self._told:
                moved[episode.index] = path
            located.append(replace(episode, data_file=path))
        self._told.update(moved)
        if moved:
            first = min(moved)
            warn(
                f"{self._info.root / 'meta/episodes'}: the data file of episodes {episodes_text(moved)} is not the one "
                f"that the table names (data/file_index); their rows were found in other files, those of episode "
                f"{first} in {moved[first]}"
            )
        return located, faults

    def _file_of(self, episode: Episode) -> Path | None:
        path = episode.data_file
        if self._info.layout == "v2":  # the name of the file tells its episode
            if not path.is_file():
                self._faults[path] = EpisodeFault(path=path, problem="the file is missing", missing=True)
                return None
            return path
        if episode.index in self._episodes_in(path):
            return path
        return next((other for other in self._all_files() if episode.index in self._episodes_in(other)), None)

    def _all_files(self) -> Sequence[Path]:
        if self._others is None:
            fixed = self._info.data_path.split("{")[0]
            folder = self._info.root / (fixed if fixed.endswith("/") else str(Path(fixed).parent))
            self._others = sorted(folder.rglob("*.parquet"))
        return self._others

    def _episodes_in(self, path: Path) -> frozenset[int]:
        if path not in self._held:
            held: frozenset[int] = frozenset()
            try:
                held = _episodes_in(pq.ParquetFile(local_name(path)))
            except FileNotFoundError:
                self._faults[path] = EpisodeFault(path=path, problem="the file is missing", missing=True)
            except (pa.ArrowException, OSError) as error:
                found = content_fault(path)
                self._faults[path] = EpisodeFault(
                    path=path,
                    problem=f"the file {found.problem}" if found else f"is not a readable parquet file: {error}",
                    hint=found.hint if found else "the recording was never finished, or the copy failed",
                )
            self._held[path] = held
        return self._held[path]


def _episodes_in(file: Any) -> frozenset[int]:
    """Return the episodes with rows in a parquet file, from its footer where a row group holds one episode."""
    held: set[int] = set()
    for number in range(file.metadata.num_row_groups):
        low, high = _limits(file.metadata.row_group(number))
        if low is None or low != high:
            column = file.read_row_group(number, columns=["episode_index"]).column(0)
            held.update(pc.unique(flat_index(column)).to_pylist())
        else:
            held.add(low)
    return frozenset(held)


def _limits(group: Any) -> tuple[int | None, int | None]:
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == "episode_index":
            statistics = column.statistics
            if statistics is not None and statistics.has_min_max:
                return statistics.min, statistics.max
    return None, None
