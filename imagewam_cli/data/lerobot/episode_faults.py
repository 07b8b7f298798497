"""Collect what is wrong with the files of some episodes into one error that says how to read the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagewam_cli.data.episodes import episodes_text
from imagewam_cli.errors import DatasetError

_LISTED = 3
"""Kinds of faults that the error spells out."""


@dataclass(frozen=True, kw_only=True)
class EpisodeFault:
    """Why an episode cannot be read."""

    path: Path
    problem: str
    """Follows the path and the episode: "the file is missing"."""
    hint: str | None = None
    """How to mend it, if there is a way other than copying the dataset again."""
    missing: bool = False
    """Whether the file does not exist, as in a partial download."""


def episode_error(faults: Mapping[int, EpisodeFault], episodes: Sequence[int]) -> DatasetError:
    """Return one error for all faults. episodes: all that were requested, with and without faults."""
    kinds: defaultdict[str, defaultdict[EpisodeFault, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, fault in sorted(faults.items()):
        kinds[fault.problem][fault].append(index)
    parts = [_part(kind) for kind in kinds.values()]
    message = "; ".join(parts[:_LISTED])
    if len(parts) > _LISTED:
        message += f"; and {len(parts) - _LISTED} more"
    if sum(len(kind) for kind in kinds.values()) > 1:
        message = f"{len(faults)} of {len(episodes)} episodes cannot be read: {message}"
    return DatasetError(message, _hint(faults, [index for index in episodes if index not in faults]))


def _part(kind: Mapping[EpisodeFault, Sequence[int]]) -> str:
    """Describe the first of several faults that differ only in their files, and count the other files."""
    fault, indices = next(iter(kind.items()))
    more = f" (and {len(kind) - 1} more files like it)" if len(kind) > 1 else ""
    return f"{fault.path}, episode{'s' * (len(indices) > 1)} {episodes_text(indices)}: {fault.problem}{more}"


def _hint(faults: Mapping[int, EpisodeFault], good: Sequence[int]) -> str:
    mending = next((fault.hint for fault in faults.values() if fault.hint), None)
    if not good:
        return mending or "copy or download the dataset again"
    if all(fault.missing for fault in faults.values()):
        return f"download the missing files, or read the episodes that are there: --only-episodes {episodes_text(good)}"
    leave_out = f"leave out what cannot be read: --exclude-episodes {episodes_text(faults)}"
    return f"{mending}; or {leave_out}" if mending else leave_out
