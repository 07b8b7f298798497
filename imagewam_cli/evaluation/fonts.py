"""Text in pictures: the font, its line height, and line wrapping."""

from __future__ import annotations

import functools

from PIL import ImageFont

RGB = tuple[int, int, int]

PAPER_RGB: RGB = (255, 255, 255)
INK_RGB: RGB = (24, 26, 32)

_FONT_SIZE = 13
LINE_HEIGHT = _FONT_SIZE + 5


@functools.cache
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's built-in font."""
    return ImageFont.load_default(_FONT_SIZE)


def wrapped(text: str, width: int, max_lines: int) -> tuple[str, ...]:
    """Wrap `text` to at most `max_lines` lines of `width` pixels; text that does not fit ends in three dots."""
    lines: list[str] = []
    rest = text.split()
    length = font().getlength
    while rest and len(lines) < max_lines:
        count = 1
        while count < len(rest) and length(" ".join(rest[: count + 1])) <= width:
            count += 1
        lines.append(" ".join(rest[:count]))
        rest = rest[count:]
    if not lines:
        return ("",)
    if rest or length(lines[-1]) > width:
        while lines[-1] and length(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "..."
    return tuple(lines)
