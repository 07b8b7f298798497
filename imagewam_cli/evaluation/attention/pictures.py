"""Draw attention maps over pictures: one page per row, and one sheet of several rows.

A map is drawn over a grey picture, one square per token, from dark (no attention) to yellow (the map's maximum). White
lines outline the tokens that change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from imagewam_cli.data.types import UInt8Image
from imagewam_cli.errors import UsageError
from imagewam_cli.evaluation.attention.maps import BoolArray, Float64Array
from imagewam_cli.evaluation.attention.measurement import AttentionSample
from imagewam_cli.evaluation.fonts import INK_RGB, LINE_HEIGHT, PAPER_RGB, font, wrapped

_GAP = 6
_COLORS = np.array([(0, 0, 0), (84, 15, 109), (187, 55, 84), (249, 142, 9), (252, 255, 120)], dtype=np.float64)
"""Colors of equally spaced values, dark to bright."""
_STRENGTH = 0.8
"""Opacity of the brightest color."""

Panel = tuple[str, Image.Image]
"""A caption, and the picture below it."""


def page(sample: AttentionSample, width: int = 160, columns: int = 4) -> Image.Image:
    """Draw a row's picture, its change and its average map, and below them the map of each layer with pictures.

    width: width of a panel in pixels; columns: number of panels side by side.
    """
    shown = _summary(sample, width)
    shown += [("", Image.new("RGB", shown[0][1].size, PAPER_RGB))] * (-len(shown) % columns)
    shown += [(f"map {i}: lift {sample.lift(m):.1f}", overlay(sample, m, width)) for i, m in enumerate(sample.maps)]
    return _pasted([(_title(sample), shown)], columns)


def sheet(samples: Sequence[AttentionSample], width: int = 128, per_line: int = 2) -> Image.Image:
    """Draw the picture, the change and the average map of each row, `per_line` rows side by side.

    Raises:
        UsageError: there are no samples.
    """
    if not samples:
        raise UsageError("no rows to show", "measure at least two rows")
    strips = [_pasted([(_title(s), _summary(s, width))], 3) for s in samples]
    lines = math.ceil(len(strips) / per_line)
    strip_width, strip_height = (max(s.size[axis] for s in strips) for axis in (0, 1))
    whole = Image.new("RGB", (per_line * strip_width, lines * strip_height), PAPER_RGB)
    for i, strip in enumerate(strips):
        whole.paste(strip, (i % per_line * strip_width, i // per_line * strip_height))
    return whole


def overlay(sample: AttentionSample, values: Float64Array, width: int) -> Image.Image:
    """Draw a map (R, C) over the row's picture."""
    picture = np.asarray(_scaled(sample.now, width), dtype=np.float64)
    grey = 0.6 * picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    cells = values / values.max()
    rows, columns = (np.arange(picture.shape[axis]) * cells.shape[axis] // picture.shape[axis] for axis in (0, 1))
    heat = cells[rows][:, columns]
    share = _STRENGTH * heat[:, :, None]
    mixed = Image.fromarray(((1 - share) * grey + share * _colored(heat)).astype(np.uint8))
    return _outlined(mixed, sample.region(values))


def _summary(sample: AttentionSample, width: int) -> list[Panel]:
    average = sample.average
    return [
        (f"frame {sample.row.frame}", _scaled(sample.now, width)),
        (f"frame {sample.target_frame}", _outlined(_scaled(sample.target, width), sample.region(average))),
        (f"attention: lift {sample.lift(average):.1f}", overlay(sample, average, width)),
    ]


def _title(sample: AttentionSample) -> str:
    return f"episode {sample.row.episode}: {sample.row.instruction}"


def _pasted(sections: Sequence[tuple[str, Sequence[Panel]]], columns: int) -> Image.Image:
    """Paste sections, each a title and panels in rows of `columns`, one below the other."""
    width, height = sections[0][1][0][1].size
    cell = (width + _GAP, height + LINE_HEIGHT + _GAP)
    total = sum(LINE_HEIGHT + math.ceil(len(panels) / columns) * cell[1] for _, panels in sections)
    whole = Image.new("RGB", (columns * cell[0] + _GAP, total + _GAP), PAPER_RGB)
    top = _GAP
    for title, panels in sections:
        _write(whole, (_GAP, top), title, columns * cell[0] - _GAP)
        top += LINE_HEIGHT
        for i, (caption, picture) in enumerate(panels):
            left, y = _GAP + i % columns * cell[0], top + i // columns * cell[1]
            _write(whole, (left, y), caption, width)
            whole.paste(picture, (left, y + LINE_HEIGHT))
        top += math.ceil(len(panels) / columns) * cell[1]
    return whole


def _write(onto: Image.Image, at: tuple[int, int], text: str, width: int) -> None:
    ImageDraw.Draw(onto).text(at, wrapped(text, width, 1)[0], fill=INK_RGB, font=font())


def _scaled(picture: UInt8Image, width: int) -> Image.Image:
    height = max(1, round(width * picture.shape[0] / picture.shape[1]))
    return Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)


def _colored(heat: Float64Array) -> Float64Array:
    """Map values (H, W) in [0, 1] to colors (H, W, 3), 0 to 255."""
    stops = np.linspace(0, 1, len(_COLORS))
    return np.stack([np.interp(heat, stops, _COLORS[:, channel]) for channel in range(3)], axis=-1)


def _outlined(picture: Image.Image, region: BoolArray) -> Image.Image:
    """Outline the region's tokens on the picture."""
    pen, (rows, columns) = ImageDraw.Draw(picture), region.shape
    padded = np.pad(region, 1)  # so that the edges of the picture count as borders
    xs = [round(i * (picture.width - 1) / columns) for i in range(columns + 1)]
    ys = [round(i * (picture.height - 1) / rows) for i in range(rows + 1)]
    for row, column in np.argwhere(padded[1:, :] != padded[:-1, :]).tolist():
        pen.line((xs[column - 1], ys[row], xs[column], ys[row]), fill=PAPER_RGB)
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]).tolist():
        pen.line((xs[column], ys[row - 1], xs[column], ys[row]), fill=PAPER_RGB)
    return picture
