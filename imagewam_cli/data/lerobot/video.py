"""Decode the frames of mp4 files, in order and each once.

A video is opened at its first requested episode, decoded forward through all its episodes, and closed after the last
one. Nothing seeks: a dataset is read from front to back, and AV1 and H.264 must be decoded from a key frame anyway.
Frames of skipped episodes or between strides are decoded, because later ones depend on them, but not converted to RGB:
conversion costs as much as decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from imagewam_cli.data.lerobot.metadata import Episode
from imagewam_cli.data.lerobot.video_files import VideoCut
from imagewam_cli.data.lerobot.video_stream import recorded_stream, unreadable_video
from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import DatasetError
from imagewam_cli.files import local_name

DECODER_THREADS = 2
"""Threads per open video. Several cameras decode at the same time, and the editor needs the other cores."""


class VideoFile:
    """One mp4 being decoded from its first frame to its last."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            av.FFmpegError, OSError: the file cannot be opened.
            DatasetError: the file has no video stream.
        """
        self.path = path
        self.position = 0
        """Number of the next frame."""
        self._container = av.open(local_name(path))
        try:
            stream = recorded_stream(self._container, path)
        except DatasetError:
            self._container.close()
            raise
        stream.codec_context.thread_count = DECODER_THREADS
        self._frames = self._container.decode(stream)
        # Reuse one reformatter: creating its conversion tables costs more than converting a small frame.
        self._reformatter = VideoReformatter()

    def next_frame(self) -> av.VideoFrame | None:
        """Return the next decoded frame, or None after the last."""
        frame = next(self._frames, None)
        self.position += frame is not None
        return frame

    def to_rgb(self, frame: av.VideoFrame) -> UInt8Image:
        """Convert to uint8 (H, W, 3), contiguous: the decoder pads its lines."""
        rgb = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        return np.ascontiguousarray(rgb, dtype=np.uint8)

    def close(self) -> None:
        self._container.close()


class VideoCamera:
    """Read the frames of one video camera, episode by episode, with one mp4 open at a time."""

    def __init__(self, key: str, size: tuple[int, int], cuts: Mapping[int, VideoCut]) -> None:
        """key: the camera's feature key; size: (height, width) that every frame must have; cuts: by episode."""
        self.key = key
        self.size = size
        self._cuts = cuts
        self._file: VideoFile | None = None

    def frames(self, episode: Episode, stride: int) -> Iterator[UInt8Image]:
        """Yield frames 0, stride, 2 * stride, ... of an episode, uint8 (H, W, 3).

        Raises:
            DatasetError: the mp4 cannot be opened or decoded, ends before the episode, continues after the episode
                that ends it, or has frames of a different size. The message names the mp4 and the episode.
        """
        cut = self._cuts[episode.index]
        where = f"{cut.path}, episode {episode.index}"
        try:
            video = self._open(cut)
            while video.position < cut.first_frame and video.next_frame() is not None:
                pass
            for number in range(episode.length):
                frame = video.next_frame()
                if frame is None:
                    raise DatasetError(
                        f"{where}: the video ends after {number} of {episode.length} frames",
                        f"copy the video again, or leave the episode out: --exclude-episodes {episode.index}",
                    )
                if number % stride:
                    continue
                if (frame.height, frame.width) != self.size:
                    raise DatasetError(
                        f"{where}: frames are {frame.height}x{frame.width} (height x width), "
                        f"but meta/info.json declares {self.size[0]}x{self.size[1]}",
                        "meta/info.json and the videos do not match",
                    )
                yield video.to_rgb(frame)
            if cut.ends_file:
                if video.next_frame() is not None:
                    # An extra frame anywhere in the file shifts every later image against its action.
                    raise DatasetError(
                        f"{where}: the video continues after the {episode.length} frames of its last episode",
                        "pictures and actions would not match; record or convert the dataset again",
                    )
                self.close()
        except (av.FFmpegError, OSError) as error:
            raise unreadable_video(cut.path, where, error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, cut: VideoCut) -> VideoFile:
        # The position is past the episode only if the mp4 holds its episodes out of order: decode it again.
        if self._file is None or self._file.path != cut.path or self._file.position > cut.first_frame:
            self.close()
            self._file = VideoFile(cut.path)
        return self._file
