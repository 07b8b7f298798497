"""Encode the frames of one camera into mp4 files, many episodes per file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from imagewam_cli.data.lerobot.v30_schema import VIDEO_PATH, FilePosition
from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import DatasetError, UsageError, nearest
from imagewam_cli.files import local_name

VideoCodec = Literal["h264", "av1"]

_MEGABYTE = 1024**2
_THREADS = 2
_PIXELS = "yuv420p"


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Settings of a video codec. With `g` = 2 every second frame is a key frame, so that training can seek anywhere."""

    codec: str
    """Name of the codec in ffprobe and info.json."""
    encoder: str
    crf: int
    preset: int | str
    g: int = 2
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options that change the video; recorded in info.json."""
    threading: Mapping[str, str] = field(default_factory=dict)
    """Options that limit the encoder's threads; not recorded."""
    lead: int = 0
    """Frames that the file's decoding times are ahead of its first frame. lerobot merges videos by appending packets,
    whose decoding times must grow, so files merge in either order only if all have the same lead."""

    def info(self, fps: int) -> dict[str, Any]:
        """Return the camera's `info` entry of meta/info.json, without its size."""
        return {
            "video.codec": self.codec,
            "video.pix_fmt": _PIXELS,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
            "video.g": self.g,
            "video.crf": self.crf,
            "video.preset": self.preset,
            "video.fast_decode": 0,
            "video.video_backend": "pyav",
            "video.extra_options": dict(self.options),
            "is_depth_map": False,
        }


_ENCODERS: Mapping[str, EncoderSettings] = {
    # No B-frames: frames leave the encoder in the order of their time stamps, which start at 0. lerobot's encoder may
    # make them, but does not with its `g` of 2; its files only have the lead of one frame that they would need.
    "h264": EncoderSettings(codec="h264", encoder="libx264", crf=18, preset="veryfast", options={"bf": "0"}, lead=1),
    "av1": EncoderSettings(
        codec="av1", encoder="libsvtav1", crf=30, preset=10, threading={"svtav1-params": f"lp={_THREADS}"}
    ),
}


def encoder_settings(codec: str) -> EncoderSettings:
    """Return the settings of a codec.

    Raises:
        UsageError: the codec is unknown.
    """
    if codec not in _ENCODERS:
        raise UsageError(f"unknown video codec {codec!r}", nearest(codec, _ENCODERS))
    return _ENCODERS[codec]


@dataclass(frozen=True, kw_only=True)
class VideoPosition:
    """Position of an episode: its file, and its first frame in that file."""

    position: FilePosition
    first_frame: int


class CameraEncoder:
    """Append episodes to the mp4 of one camera, and start a new file when it is full."""

    def __init__(
        self,
        root: Path,
        key: str,
        settings: EncoderSettings,
        *,
        fps: int,
        size: tuple[int, int],
        file_size_mb: float,
        chunks_size: int,
    ) -> None:
        """root: folder of the dataset; key: feature key; size: (height, width); file_size_mb: size of a full file."""
        self.key = key
        self._root = root
        self._settings = settings
        self._fps = fps
        self._size = size
        self._file_size_mb = file_size_mb
        self._chunks_size = chunks_size
        self._position = FilePosition()
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._frames = 0
        self._packets = 0
        self._bytes = 0

    def add(self, frames: Sequence[UInt8Image]) -> VideoPosition:
        """Encode one episode of uint8 (H, W, 3) frames.

        Raises:
            DatasetError: the encoder fails; the message names the file.
        """
        if self._is_full(len(frames)):
            self.close()
            self._position = self._position.next(self._chunks_size)
        first_frame = self._frames
        with self._encoding():
            for frame in frames:
                self._encode(frame)
        return VideoPosition(position=self._position, first_frame=first_frame)

    def close(self) -> None:
        """Finish the current file.

        Raises:
            DatasetError: the encoder fails; the message names the file.
        """
        if self._container is not None and self._stream is not None:
            with self._encoding():
                self._mux(self._stream.encode(None))
                self._container.close()
            self._container, self._stream = None, None
            self._frames = self._packets = self._bytes = 0

    def abandon(self) -> None:
        """Close the current file without finishing it, because it will be deleted."""
        if self._container is not None:
            with suppress(av.FFmpegError):
                self._container.close()
            self._container, self._stream = None, None

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        try:
            yield
        except av.FFmpegError as error:
            raise DatasetError(
                f"{self._path()}: cannot encode {self._size[0]}x{self._size[1]} {self._settings.codec}: {error}",
                "use a different video_codec, or None to store pictures",
            ) from error

    def _path(self) -> Path:
        return self._root / self._position.format(VIDEO_PATH, video_key=self.key)

    def _is_full(self, more: int) -> bool:
        if self._packets == 0:
            return False
        # The size on disk would be too small: encoders hold back dozens of frames.
        bytes_per_frame = self._bytes / self._packets
        return bytes_per_frame * (self._frames + more) >= self._file_size_mb * _MEGABYTE

    def _encode(self, pixels: UInt8Image) -> None:
        if self._container is None or self._stream is None:
            self._container, self._stream = self._new_file()
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = self._frames, Fraction(1, self._fps)
        self._mux(self._stream.encode(frame))
        self._frames += 1

    def _mux(self, packets: Sequence[av.Packet[av.VideoStream]]) -> None:
        assert self._container is not None
        for packet in packets:
            self._packets += 1
            self._bytes += packet.size
            if packet.dts is not None and packet.time_base:
                packet.dts -= round(self._settings.lead / (self._fps * packet.time_base))
            self._container.mux(packet)

    def _new_file(self) -> tuple[av.container.OutputContainer, av.VideoStream]:
        # SVT-AV1 prints a page of settings per file to stderr; this variable is its only switch. Errors still raise.
        os.environ.setdefault("SVT_LOG", "0")
        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = self._settings
        options = {"crf": str(settings.crf), "g": str(settings.g), "preset": str(settings.preset)}
        options |= {**settings.options, **settings.threading}
        container = av.open(local_name(path), "w")
        stream = container.add_stream(settings.encoder, rate=self._fps, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = self._size
        stream.pix_fmt = _PIXELS
        stream.codec_context.thread_count = _THREADS
        return container, stream
