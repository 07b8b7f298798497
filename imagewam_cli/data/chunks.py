"""Action chunks: the T actions that follow one frame, padded beyond the episode's end.

Pure numpy; reads no file. The training dataset knows the episode and passes its actions.
"""

from __future__ import annotations

import numpy as np

from imagewam_cli.data.types import ActionChunk, FloatArray
from imagewam_cli.errors import UsageError


def action_chunk(actions: FloatArray, frame: int, horizon: int) -> ActionChunk:
    """Return the chunk that starts at `frame`: actions `frame .. frame + horizon - 1` of one episode.

    Args:
        actions: (L, A), all actions of the episode, in any units.
        frame: index in the episode, 0 <= frame < L.
        horizon: T, at least 1.

    Returns:
        `actions` (T, A), a copy; steps beyond the end repeat the last action and have `is_pad` (T,) true.

    Raises:
        UsageError: `actions` is not (L, A) with L >= 1, `frame` is outside the episode, or `horizon` < 1.
    """
    if actions.ndim != 2 or len(actions) == 0:
        raise UsageError(
            f"actions of shape {actions.shape} are not those of an episode",
            "pass all actions of one episode, (L, A) with L >= 1",
        )
    length = len(actions)
    if not 0 <= frame < length:
        raise UsageError(f"frame {frame} is outside the episode of {length} frames", f"use 0 .. {length - 1}")
    if horizon < 1:
        raise UsageError(f"a horizon of {horizon} actions is empty", "use a horizon of at least 1")
    steps = np.arange(frame, frame + horizon)
    return ActionChunk(actions=actions[np.minimum(steps, length - 1)], is_pad=steps >= length)
