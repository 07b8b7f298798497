"""Instructions from LeRobot's language columns, whose cells are lists of messages.

A message has a `style` (subtask, plan, task_aug, ...), a `content`, and in `language_persistent` the `timestamp` at
which it begins to apply. `--instruction-key language_persistent/subtask` names the column and the style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imagewam_cli.errors import DatasetError

DTYPE = "language"
"""dtype of the columns in meta/info.json."""
_TOLERANCE = 1e-4
"""Seconds by which rounding may move a message before its frame."""


def active_messages(
    cells: Sequence[Sequence[Mapping[str, Any]] | None], style: str, timestamps: Sequence[float], where: str
) -> list[str]:
    """Return for each frame the newest message of a style that has begun.

    Raises:
        DatasetError: a frame has no such message, or several that began at the same time.
    """
    frames = enumerate(zip(cells, timestamps, strict=True))
    return [_active(cell or (), style, at, f"{where}, frame {i}") for i, (cell, at) in frames]


def _active(messages: Sequence[Mapping[str, Any]], style: str, at: float, where: str) -> str:
    begun = [
        (float(message.get("timestamp") or 0.0), str(message["content"]))
        for message in messages
        if message.get("style") == style and message.get("content")
    ]
    newest = max((start for start, _ in begun if start <= at + _TOLERANCE), default=None)
    texts = {text for start, text in begun if start == newest}
    if len(texts) != 1:
        known = sorted({str(message.get("style")) for message in messages})
        found = "no message" if not texts else f"{len(texts)} messages"
        raise DatasetError(
            f"{where} has {found} of style {style!r} that could be its instruction; its messages have the styles: "
            f"{', '.join(known) or 'none'}",
            "name a style that every frame has once with --instruction-key COLUMN/STYLE, or omit the option",
        )
    return texts.pop()
