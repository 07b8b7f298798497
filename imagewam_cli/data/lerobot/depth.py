"""Tell depth maps from cameras: by the metadata, or, if they do not say, by the first picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image

from imagewam_cli.data.lerobot.images import encoded_bytes
from imagewam_cli.data.lerobot.info import Feature, Info
from imagewam_cli.data.lerobot.keys import Selection
from imagewam_cli.data.lerobot.metadata import Episode
from imagewam_cli.data.lerobot.pixels import depth_kind, is_wide_gray
from imagewam_cli.data.lerobot.tables import episode_runs
from imagewam_cli.data.lerobot.video_stream import read_facts
from imagewam_cli.errors import DatasetError, warn

_TRIED = 5
"""Episodes to look at before giving up: the files of some may be missing."""


def without_depth(info: Info, selection: Selection, episodes: Sequence[Episode], asked: Sequence[str]) -> Selection:
    """Return the selection without features that hold depth, and warn of all that are left out.

    Args:
        selection: the cameras that would be read.
        episodes: those that will be read; the first picture that can be read tells.
        asked: the cameras that the user named; empty: all.

    Raises:
        DatasetError: the user named a camera that holds depth.
    """
    found = {
        name: kind
        for name, feature in selection.cameras.items()
        if feature.may_hold_depth and (kind := _depth_of(info.root, feature, episodes)) is not None
    }
    if asked:
        for name, kind in found.items():
            raise DatasetError(
                f"{info.root}: camera {name!r} holds {kind}, which is depth, not color",
                "name color cameras with --camera, or none for all of them",
            )
        return selection
    declared = {feature.camera_name: "depth" for feature in info.features.values() if feature.is_depth}
    left_out = declared | found
    if left_out:
        names = ", ".join(f"{name!r} ({kind})" for name, kind in left_out.items())
        warn(f"{info.root}: depth is not read as a picture, so these cameras are left out: {names}")
    return replace(selection, cameras={n: f for n, f in selection.cameras.items() if n not in found})


def _depth_of(root: Path, feature: Feature, episodes: Sequence[Episode]) -> str | None:
    """Return what a camera holds if it is depth; None if it is color, or no picture can be read."""
    for episode in episodes[:_TRIED]:
        with suppress(DatasetError, OSError, KeyError):  # reading the rows names the fault
            if feature.is_video:
                pix_fmt = read_facts(episode.videos[feature.key].path).pix_fmt
                return f"{pix_fmt} frames" if is_wide_gray(pix_fmt) else None
            runs = episode_runs(episode.data_file, [episode], ["episode_index", feature.key], 1)
            found = next((run for index, run in runs if index == episode.index), None)
            if found is not None:
                cell = found.column(feature.key)[0].as_py()
                encoded = encoded_bytes(root, feature.key, cell, str(episode.data_file))
                with Image.open(io.BytesIO(encoded)) as picture:
                    return depth_kind(picture, encoded)
    return None
