"""`table.safetensors`: the states and actions of every dataset frame, so that training needs only the cache.

Each cached row refers to a dataset frame. Its action chunk is read from this table, for any horizon. The table
is small compared to K and V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.chunks import action_chunk
from imagewam_cli.data.precision import compact
from imagewam_cli.data.types import ActionChunk, FloatArray, Row
from imagewam_cli.errors import CacheError, warn
from imagewam_cli.files import checksum_of
from imagewam_cli.kvcache.format.manifest import repair_hint

_NAMED = 3
"""Number of equal dimensions that a warning names."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FrameTable:
    """All frames of the dataset, in dataset order.

    N frames, E episodes; indices are int64.
    """

    state: FloatArray
    """(N, S) in robot units: float32 if that holds every number exactly, else float64."""
    action: FloatArray
    """(N, A), like `state`."""
    instruction: Indices
    """(N,) indices into the manifest's instructions."""
    first_row: Indices
    """(E,) row of each episode's first frame."""
    length: Indices
    """(E,) number of frames in each episode."""
    episode: Indices
    """(E,) numbers of the episodes, ascending."""

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> tuple[FrameTable, tuple[str, ...]]:
        """Collect the rows of whole episodes. Return the table, and the distinct instructions in order of first
        appearance."""
        states, actions, episodes, instructions = [], [], [], []
        numbers_of: dict[str, int] = {}
        for row in rows:
            instructions.append(numbers_of.setdefault(row.instruction, len(numbers_of)))
            states.append(row.state)
            actions.append(row.action)
            episodes.append(row.episode)
        numbers, starts, lengths = np.unique(np.array(episodes), return_index=True, return_counts=True)
        table = cls(
            state=compact(np.stack(states)),
            action=compact(np.stack(actions)),
            instruction=np.array(instructions, np.int64),
            first_row=starts.astype(np.int64),
            length=lengths.astype(np.int64),
            episode=numbers.astype(np.int64),
        )
        return table, tuple(numbers_of)

    @classmethod
    def load(cls, path: Path, checksum: str) -> FrameTable:
        """Read the file.

        Raises:
            CacheError: the file is missing or damaged, or its XXH3-128 is not `checksum`.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = path.read_bytes()
            if checksum_of(data) != checksum:
                raise ValueError("it differs from its checksum")
            tensors = load(data)
            return cls(**{field.name: tensors[field.name] for field in dataclasses.fields(cls)})
        except FileNotFoundError:
            raise CacheError(f"{path} is missing", repair_hint(path.parent)) from None
        except (KeyError, ValueError, OSError, SafetensorError) as error:
            raise CacheError(f"{path} is damaged: {error}", repair_hint(path.parent)) from None

    def to_bytes(self) -> bytes:
        """Return the content of the file that `load` reads."""
        from safetensors.numpy import save

        data: bytes = save({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        return data

    def stored_as(self, checksum: str) -> FrameTable:
        """Return the table whose file has this checksum: this one, or the same numbers rounded to float32.

        Caches made before tables had float64 hold rounded numbers. If neither table has the checksum, return this one.
        """
        rounded = dataclasses.replace(self, state=self.state.astype(np.float32), action=self.action.astype(np.float32))
        return rounded if checksum_of(rounded.to_bytes()) == checksum else self

    def copied_dimensions(self) -> dict[int, int]:
        """Return the dimensions of the state that change and equal one of the action in every frame: state -> action.

        A policy would copy them instead of looking at the pictures.
        """
        actions = {_column_checksum(self.action, i): i for i in range(self.action.shape[1])}
        states = {
            i: _column_checksum(self.state, i) for i in range(self.state.shape[1]) if np.ptp(self.state[:, i]) > 0
        }
        return {i: actions[column] for i, column in states.items() if column in actions}

    def frames(self, episodes: Iterable[int], stride: int) -> tuple[Indices, Indices, Indices]:
        """Return every `stride`-th frame of these episodes: rows of the table, episodes, and frames, (M,) each."""
        parts = [
            (np.arange(span.start, span.stop, stride), episode, np.arange(0, span.stop - span.start, stride))
            for episode, span in ((episode, self._span(episode)) for episode in episodes)
        ]
        rows, frames = (np.concatenate([np.zeros(0, np.int64), *(part[i] for part in parts)]) for i in (0, 2))
        return rows, np.repeat([part[1] for part in parts], [len(part[0]) for part in parts]).astype(np.int64), frames

    def chunk(self, episode: int, frame: int, horizon: int) -> ActionChunk:
        """Return the `horizon` actions from `frame` on, in robot units, padded at the episode's end."""
        actions = self.actions_of(episode)
        return action_chunk(actions, frame, horizon)

    def actions_of(self, episode: int) -> FloatArray:
        """Return all actions of an episode, (L, A), in robot units.

        Raises:
            CacheError: there is no such episode.
        """
        return self.action[self._span(episode)]

    def states_of(self, episode: int) -> FloatArray:
        """Return all states of an episode, (L, S), in robot units.

        Raises:
            CacheError: there is no such episode.
        """
        return self.state[self._span(episode)]

    def _span(self, episode: int) -> slice:
        i = int(np.searchsorted(self.episode, episode))
        if i == len(self.episode) or self.episode[i] != episode:
            raise CacheError(f"the cache has no episode {episode}")
        return slice(int(self.first_row[i]), int(self.first_row[i] + self.length[i]))


def warn_of_copies(table: FrameTable, state_names: Sequence[str], action_names: Sequence[str]) -> None:
    """Warn if dimensions of the state equal dimensions of the action in every frame."""
    copied = table.copied_dimensions()
    if not copied:
        return
    pairs = [f"{state_names[i]!r} = {action_names[j]!r}" for i, j in copied.items()]
    which = ", ".join(pairs[:_NAMED]) + (f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else "")
    warn(
        f"{len(copied)} of {len(state_names)} dimensions of the state equal the action in every frame ({which}), so a "
        "policy would copy them instead of looking: check --state-key and --action-key of `imagewam cache`"
    )


def _column_checksum(values: FloatArray, dimension: int) -> str:
    return checksum_of(np.ascontiguousarray(values[:, dimension], np.float64).tobytes())
