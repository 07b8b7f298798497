"""`table.safetensors`: states and actions of every dataset frame, small beside K and V, so that training needs only
the cache.

A cached row names its dataset frame; the chunk of actions that follows it is cut here, for whatever horizon a run
wants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imagewam_cli.data.chunks import action_chunk
from imagewam_cli.data.types import ActionChunk, Float32Array, Row
from imagewam_cli.errors import CacheError

_REPAIR = "run the same `imagewam cache` command again: it writes the table anew"


@dataclass(frozen=True, kw_only=True)
class FrameTable:
    """All frames of the dataset, in dataset order.

    state (N, S), action (N, A) float32 in robot units; first_row, length (E,) int64: where each episode lies.
    """

    state: Float32Array
    action: Float32Array
    first_row: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    episode: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> FrameTable:
        """Collect the rows of whole episodes, in order."""
        states, actions, episodes = [], [], []
        for row in rows:
            states.append(row.state)
            actions.append(row.action)
            episodes.append(row.episode)
        numbers, starts, lengths = np.unique(np.array(episodes), return_index=True, return_counts=True)
        return cls(
            state=np.stack(states).astype(np.float32),
            action=np.stack(actions).astype(np.float32),
            first_row=starts.astype(np.int64),
            length=lengths.astype(np.int64),
            episode=numbers.astype(np.int64),
        )

    @classmethod
    def load(cls, path: Path) -> FrameTable:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
            return cls(**{name: tensors[name] for name in ("state", "action", "first_row", "length", "episode")})
        except FileNotFoundError:
            raise CacheError(f"{path} is missing", _REPAIR) from None
        except (KeyError, ValueError, OSError, SafetensorError) as error:
            raise CacheError(f"{path} is damaged: {error}", _REPAIR) from None

    def to_bytes(self) -> bytes:
        from safetensors.numpy import save

        data: bytes = save(
            {
                "state": self.state,
                "action": self.action,
                "first_row": self.first_row,
                "length": self.length,
                "episode": self.episode,
            }
        )
        return data

    def chunk(self, episode: int, frame: int, horizon: int) -> ActionChunk:
        """The `horizon` actions from `frame` of `episode` on, in robot units, padded at the episode's end."""
        actions = self.actions_of(episode)
        return action_chunk(actions, frame, horizon)

    def actions_of(self, episode: int) -> Float32Array:
        return self.action[self._span(episode)]

    def states_of(self, episode: int) -> Float32Array:
        return self.state[self._span(episode)]

    def _span(self, episode: int) -> slice:
        i = int(np.searchsorted(self.episode, episode))
        if i == len(self.episode) or self.episode[i] != episode:
            raise CacheError(f"the cache has no episode {episode}")
        return slice(int(self.first_row[i]), int(self.first_row[i] + self.length[i]))
