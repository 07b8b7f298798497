"""Open an mp4, choose the stream with the recorded frames, and count them without decoding.

The frames of an episode are told by their order and number, so counting and decoding must agree on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.stream import Disposition

from imagewam_cli.data.lerobot.json_text import DAMAGED
from imagewam_cli.errors import DatasetError
from imagewam_cli.file_content import content_fault
from imagewam_cli.files import local_name


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What the headers of an mp4 say about its frames."""

    frames: int
    """Frames that decoding yields."""
    rate: float | None
    """Frames per second; None if the file does not say."""
    pix_fmt: str | None


def recorded_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """Return the video stream with the recorded frames: not a cover picture, and the longest if there are several.

    Raises:
        DatasetError: there is no video stream, or several are equally long.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise DatasetError(f"{path} has no video stream", DAMAGED)
    longest = max(stream.frames for stream in streams)
    chosen = [stream for stream in streams if stream.frames == longest]
    if len(chosen) > 1:
        raise DatasetError(
            f"{path} has {len(chosen)} video streams of {longest} frames", "keep one stream: one camera per file"
        )
    return chosen[0]


def read_facts(path: Path) -> VideoFacts:
    """Count the frames of an mp4, from its header if that is enough.

    Raises:
        DatasetError: the file is missing, is no video, or has no video stream.
    """
    try:
        with av.open(local_name(path)) as container:
            stream = recorded_stream(container, path)
            rate = stream.average_rate
            frames = stream.frames
            spanned = (
                round(stream.duration * stream.time_base * stream.base_rate)
                if stream.duration and stream.time_base and stream.base_rate
                else None
            )
            # An edit list hides frames that the header counts; the duration then differs.
            if frames == 0 or spanned != frames:
                frames = len(_shown(container, stream))
            return VideoFacts(frames=frames, rate=float(rate) if rate else None, pix_fmt=stream.codec_context.pix_fmt)
    except (av.FFmpegError, OSError) as error:
        raise unreadable_video(path, str(path), error) from error


def frame_times(path: Path) -> npt.NDArray[np.float64]:
    """Return the seconds of each frame after the first, ascending (N,), without decoding.

    Raises:
        DatasetError: the file is missing, is no video, or has no video stream.
    """
    try:
        with av.open(local_name(path)) as container:
            stream = recorded_stream(container, path)
            ticks = np.sort(np.array(_shown(container, stream), dtype=np.int64))
            return np.asarray((ticks - ticks[:1]) * float(stream.time_base or 1), dtype=np.float64)
    except (av.FFmpegError, OSError) as error:
        raise unreadable_video(path, str(path), error) from error


def _shown(container: av.container.InputContainer, stream: av.VideoStream) -> list[int]:
    """Return the time stamps of the frames that decoding yields, in the order of the file."""
    return [
        packet.pts if packet.pts is not None else number
        for number, packet in enumerate(container.demux(stream))
        if packet.size and not packet.is_discard
    ]


def unreadable_video(path: Path, where: str, error: Exception) -> DatasetError:
    """Return the error for a file that PyAV cannot read. where: the path, with what else locates the fault."""
    if isinstance(error, FileNotFoundError):
        return DatasetError(f"{where}: the video is missing", DAMAGED)
    fault = content_fault(path)
    if fault is not None:
        return DatasetError(f"{where}: the file {fault.problem}", fault.hint)
    return DatasetError(f"{where}: the video cannot be decoded: {error}", DAMAGED)
