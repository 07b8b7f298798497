"""Draw rolled-out episodes: a contact sheet, or a grid of episodes as GIF or MP4.

The episodes come from `sim.rollout.roll_out(..., keep_frames=N)`. Success is green and failure red.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from imagewam_cli.data.lerobot.encoder import encoder_settings
from imagewam_cli.errors import SimulationError, UsageError
from imagewam_cli.evaluation.fonts import INK_RGB, LINE_HEIGHT, PAPER_RGB, RGB, font, wrapped
from imagewam_cli.files import atomic_file, local_name
from imagewam_cli.sim.rollout import Episode

SUCCESS_RGB: RGB = (22, 148, 72)
FAILURE_RGB: RGB = (206, 44, 44)
RUNNING_RGB: RGB = (190, 192, 198)
"""Border color of an episode that has not ended yet."""

MAX_EPISODES = 12
"""Maximum number of episodes in a grid."""

_GAP = 4
_BORDER = 4
_MAX_LINES = 3
"""Maximum number of lines of a caption in a grid."""
_PALETTE_SAMPLES = 6
"""Number of frames per episode that determine a GIF's palette."""
_VIDEO_THREADS = 2


def contact_sheet(
    episodes: Sequence[Episode], columns: int = 8, frames_per_episode: int | None = None, width: int = 128
) -> Image.Image:
    """Draw a few evenly spaced pictures of each episode below a caption with its instruction.

    The caption starts with a square: green with a tick for success, red with a cross for failure.

    Args:
        columns: number of pictures in a row.
        frames_per_episode: None: `columns`, so one episode per row. With fewer, several episodes share a row.
        width: width of each picture, in pixels.

    Raises:
        UsageError: there are no episodes or frames, frames differ in size, or an episode has more frames than columns.
    """
    shown = columns if frames_per_episode is None else frames_per_episode
    if not 1 <= shown <= columns:
        raise UsageError(
            f"{shown} frames per episode do not fit {columns} columns", f"pass a number from 1 to {columns}"
        )
    size = _picture_size(episodes, width)
    per_line = columns // shown
    strip_size = (shown * (size[0] + _GAP) - _GAP, LINE_HEIGHT + _GAP + size[1])
    rows = math.ceil(len(episodes) / per_line)
    line_width = per_line * (strip_size[0] + 3 * _GAP) - 3 * _GAP
    sheet = Image.new("RGB", (line_width + 2 * _GAP, rows * (strip_size[1] + 3 * _GAP) + _GAP), PAPER_RGB)
    for i, episode in enumerate(episodes):
        row, column = divmod(i, per_line)
        left, top = _GAP + column * (strip_size[0] + 3 * _GAP), 2 * _GAP + row * (strip_size[1] + 3 * _GAP)
        _write_caption(sheet, (left, top), strip_size[0], episode)
        for number, index in enumerate(spaced(len(episode.frames), shown)):
            at = (left + number * (size[0] + _GAP), top + LINE_HEIGHT + _GAP)
            sheet.paste(_picture(episode, index, size), at)
    return sheet


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically, in the format of the suffix."""
    with atomic_file(path) as temporary:
        picture.save(temporary)


def write_gif(
    path: Path, episodes: Sequence[Episode], *, columns: int = 4, width: int = 192, fps: float = 10.0, hold: float = 1.5
) -> None:
    """Write the first 12 episodes, playing side by side, as a looping GIF.

    An episode that has ended shows its last picture with a green (success) or red (failure) border.

    Args:
        columns: number of episodes in a row.
        width: width of each episode's picture, in pixels.
        fps: pictures per second; GIF players keep multiples of 10 ms.
        hold: seconds to show the end of the longest episode.

    Raises:
        UsageError: there are no episodes or frames, frames differ in size, or `columns`, `width` or `fps` is too small.
    """
    grid = _Grid.of(episodes, columns, width, fps)
    palette = grid.palette()
    images = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in grid.frames())
    milliseconds = round(1000 / fps)
    durations = [milliseconds] * (grid.length - 1) + [milliseconds + round(1000 * hold)]
    with atomic_file(path) as temporary:
        next(images).save(
            temporary, format="GIF", save_all=True, append_images=images, duration=durations, loop=0, optimize=False
        )


def write_mp4(
    path: Path, episodes: Sequence[Episode], *, columns: int = 4, width: int = 192, fps: float = 10.0, hold: float = 1.5
) -> None:
    """Write the same grid as an H.264 MP4 that browsers play. Arguments are those of `write_gif`.

    Raises:
        UsageError: for the same reasons as in `write_gif`.
        SimulationError: the video cannot be encoded; the error names the file.
    """
    grid = _Grid.of(episodes, columns, width, fps)
    try:
        with atomic_file(path) as temporary:
            _encode(temporary, grid, fps, hold)
    except av.FFmpegError as error:
        size = f"{grid.size[0]}x{grid.size[1]}"
        raise SimulationError(f"{path}: cannot encode {size} video: {error}", "write a GIF instead") from error


def spaced(length: int, count: int) -> list[int]:
    """Return at most `count` different indices below `length`, evenly spaced from first to last.

    Return only the last index if `count` is 1.
    """
    if count == 1 or length == 1:
        return [length - 1]
    return sorted({round(i) for i in np.linspace(0, length - 1, min(count, length)).tolist()})


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Episodes side by side, each with a border and a caption below."""

    episodes: tuple[Episode, ...]
    columns: int
    picture: tuple[int, int]
    """Width and height of a picture."""
    captions: tuple[tuple[str, ...], ...]
    """Lines below each picture."""

    @classmethod
    def of(cls, episodes: Sequence[Episode], columns: int, width: int, fps: float) -> _Grid:
        if columns < 1 or fps <= 0:
            raise UsageError(f"no grid of {columns} columns at {fps} fps", "pass one column or more, and fps above 0")
        chosen = tuple(episodes[:MAX_EPISODES])
        picture = _picture_size(chosen, width)
        captions = tuple(wrapped(_caption(e), picture[0] + _BORDER, _MAX_LINES) for e in chosen)
        return cls(episodes=chosen, columns=min(columns, len(chosen)), picture=picture, captions=captions)

    @property
    def length(self) -> int:
        """Number of frames of the longest episode."""
        return max(len(e.frames) for e in self.episodes)

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of one episode, with border and caption."""
        lines = max(len(c) for c in self.captions)
        return self.picture[0] + 2 * _BORDER, self.picture[1] + 2 * _BORDER + lines * LINE_HEIGHT

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the grid, both even, because video encoders require it."""
        rows = math.ceil(len(self.episodes) / self.columns)
        width = self.columns * (self.cell[0] + 2 * _GAP)
        height = rows * (self.cell[1] + 2 * _GAP)
        return width + width % 2, height + height % 2

    def frames(self) -> Iterator[Image.Image]:
        """Yield the grid for every frame number, up to the end of the longest episode."""
        sheet = self._blank()
        for number in range(self.length):
            for i, episode in enumerate(self.episodes):
                if number < len(episode.frames):
                    self._show(sheet, i, number)
            yield sheet.copy()

    def palette(self) -> Image.Image:
        """Return a palette of 256 colors for a few frames of every episode, with exact border colors."""
        samples = Image.new("RGB", (self.size[0], self.size[1] * _PALETTE_SAMPLES))
        for number in range(_PALETTE_SAMPLES):
            sheet = self._blank()
            for i, episode in enumerate(self.episodes):
                indices = spaced(len(episode.frames), _PALETTE_SAMPLES)
                self._show(sheet, i, indices[min(number, len(indices) - 1)])
            samples.paste(sheet, (0, number * self.size[1]))
        fixed = [SUCCESS_RGB, FAILURE_RGB, RUNNING_RGB, PAPER_RGB, INK_RGB]
        reduced = samples.quantize(256 - len(fixed), method=Image.Quantize.MEDIANCUT)
        colors = (reduced.getpalette() or [])[: 3 * (256 - len(fixed))]
        palette = Image.new("P", (1, 1))
        palette.putpalette([value for color in fixed for value in color] + colors)
        return palette

    def _corner(self, i: int) -> tuple[int, int]:
        row, column = divmod(i, self.columns)
        return _GAP + column * (self.cell[0] + 2 * _GAP), _GAP + row * (self.cell[1] + 2 * _GAP)

    def _blank(self) -> Image.Image:
        """Draw a sheet with the captions only."""
        sheet = Image.new("RGB", self.size, PAPER_RGB)
        pen = ImageDraw.Draw(sheet)
        for i, lines in enumerate(self.captions):
            left, top = self._corner(i)
            for number, line in enumerate(lines):
                y = top + self.picture[1] + 2 * _BORDER + number * LINE_HEIGHT
                pen.text((left + _BORDER, y), line, fill=INK_RGB, font=font())
        return sheet

    def _show(self, sheet: Image.Image, i: int, frame: int) -> None:
        episode, (left, top) = self.episodes[i], self._corner(i)
        ended = frame == len(episode.frames) - 1
        border = _verdict(episode) if ended else RUNNING_RGB
        right, bottom = left + self.picture[0] + 2 * _BORDER, top + self.picture[1] + 2 * _BORDER
        sheet.paste(border, (left, top, right, bottom))
        sheet.paste(_picture(episode, frame, self.picture), (left + _BORDER, top + _BORDER))


def _encode(path: Path, grid: _Grid, fps: float, hold: float) -> None:
    """Encode the grid as H.264 with the dataset writer's settings, except for key frames every few seconds.

    Few key frames keep the file small; training needs more, but does not read this video.
    """
    settings = encoder_settings("h264")
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(local_name(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        options = {"crf": str(settings.crf), "preset": str(settings.preset), "g": "50", **settings.options}
        stream = container.add_stream(settings.encoder, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = grid.size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = _VIDEO_THREADS
        for number, image in enumerate(_held(grid, round(hold * fps))):
            frame = av.VideoFrame.from_ndarray(np.asarray(image, dtype=np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _held(grid: _Grid, more: int) -> Iterator[Image.Image]:
    """Yield the grid's frames, and repeat the last one `more` times."""
    for number, image in enumerate(grid.frames(), start=1):
        yield from itertools.repeat(image, 1 if number < grid.length else 1 + more)


def _picture_size(episodes: Sequence[Episode], width: int) -> tuple[int, int]:
    """Return the size (width, height) at which to show all frames."""
    if not episodes:
        raise UsageError("no episodes to show", "roll out at least one episode")
    if width < 1:
        raise UsageError(f"a picture cannot be {width} pixels wide", "pass a width of at least 1")
    empty = next((e for e in episodes if not e.frames), None)
    if empty is not None:
        raise UsageError(
            f"scene {empty.seed} of {empty.split!r} has no frames",
            "roll out with keep_frames set to the number of episodes to show",
        )
    shapes = {frame.shape for e in episodes for frame in e.frames}
    if len(shapes) > 1:
        raise UsageError(
            f"the frames have different shapes: {sorted(shapes)}", "show episodes of one environment and camera"
        )
    height, full_width, _ = shapes.pop()
    return width, max(1, round(width * height / full_width))


def _picture(episode: Episode, index: int, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(_contiguous(episode.frames[index]))
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _contiguous(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(frame, dtype=np.uint8)


def _verdict(episode: Episode) -> RGB:
    return SUCCESS_RGB if episode.success else FAILURE_RGB


def _caption(episode: Episode) -> str:
    """Return the episode's instruction, or both instructions if the policy was given a different one."""
    if episode.given == episode.instruction:
        return episode.instruction
    return f"given: {episode.given}; judged by: {episode.instruction}"


def _write_caption(sheet: Image.Image, at: tuple[int, int], width: int, episode: Episode) -> None:
    """Draw the success mark and one line of text."""
    left, top = at
    side = LINE_HEIGHT - 2
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, left + side, top + side), fill=_verdict(episode))
    _draw_sign(pen, left, top, side, tick=episode.success)
    text = f"{_caption(episode)} ({episode.steps} steps)"
    start = left + side + 2 * _GAP
    pen.text((start, top), wrapped(text, left + width - start, 1)[0], fill=INK_RGB, font=font())


def _draw_sign(pen: ImageDraw.ImageDraw, left: int, top: int, side: int, *, tick: bool) -> None:
    """Draw a white tick or cross, for readers who cannot distinguish the colors."""
    a, b, c = round(0.25 * side), round(0.5 * side), round(0.75 * side)
    lines = [((a, b), (round(0.42 * side), c)), ((round(0.42 * side), c), (c, a))]
    if not tick:
        lines = [((a, a), (c, c)), ((a, c), (c, a))]
    for (x1, y1), (x2, y2) in lines:
        pen.line((left + x1, top + y1, left + x2, top + y2), fill=PAPER_RGB, width=2)
