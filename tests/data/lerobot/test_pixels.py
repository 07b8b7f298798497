"""Test which pictures are read as 8-bit colors, and which are refused instead of being cut at 255."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imagewam_cli.data.lerobot.pixels import PictureKindError, decode_picture, is_wide_gray

COLORS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
GRAY = COLORS[..., 0]


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_16(pixels: np.ndarray, color_type: int) -> bytes:
    """Write a PNG of 16 bits per channel by hand, (H, W, C) uint16; Pillow writes none of colors."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_colors_are_read_as_they_are(kind: str) -> None:
    decoded = decode_picture(encode(COLORS, kind))
    np.testing.assert_array_equal(decoded.pixels, COLORS)
    assert decoded.remark is None


def test_gray_gets_three_equal_channels() -> None:
    decoded = decode_picture(encode(GRAY))
    np.testing.assert_array_equal(decoded.pixels, np.stack([GRAY] * 3, axis=-1))
    assert decoded.remark is None


def test_a_palette_is_looked_up() -> None:
    few = np.zeros((4, 6, 3), np.uint8)
    few[:2] = (200, 10, 30)
    decoded = decode_picture(encode(Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE)))
    np.testing.assert_array_equal(decoded.pixels, few)


def test_black_and_white_is_read() -> None:
    decoded = decode_picture(encode(Image.fromarray(GRAY > 30)))
    np.testing.assert_array_equal(decoded.pixels[..., 1], np.where(GRAY > 30, 255, 0))


@pytest.mark.parametrize(("alpha", "remark"), [(255, None), (7, "have transparent parts")])
def test_alpha_is_dropped_and_said_if_it_matters(alpha: int, remark: str | None) -> None:
    decoded = decode_picture(encode(np.dstack([COLORS, np.full((4, 6), alpha, np.uint8)])))
    np.testing.assert_array_equal(decoded.pixels, COLORS)
    assert (decoded.remark is None) if remark is None else str(decoded.remark).startswith(remark)


def test_colors_of_16_bits_are_read_from_their_whole_range_and_said() -> None:
    wide = COLORS.astype(np.uint16) * 257
    decoded = decode_picture(png_16(wide, 2))
    np.testing.assert_array_equal(decoded.pixels, COLORS)
    assert decoded.remark == "have 16 bits per color; 0 .. 65535 is read as 0 .. 255"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_are_turned_as_their_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]  # counterclockwise quarter turns from stored to shown
    decoded = decode_picture(encode(COLORS, "PNG", exif=exif))
    np.testing.assert_array_equal(decoded.pixels, np.rot90(COLORS, turns))


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (encode(np.full((4, 6), 1500, np.uint16)), "holds one channel of 16 bits, not colors"),
        (encode(np.full((4, 6), 1500, np.uint16), "TIFF"), "holds one channel of 16 bits, not colors"),
        (encode(np.full((4, 6), 70000, np.int32), "TIFF"), "holds one channel of 32 bits, not colors"),
        (encode(np.full((4, 6), 1.5, np.float32), "TIFF"), "holds one channel of floats, not colors"),
        (png_16(np.full((4, 6, 2), 1500, np.uint16), 4), "holds one channel of 16 bits, not colors"),
        (encode(Image.fromarray(COLORS).convert("CMYK"), "TIFF"), "holds CMYK colors, which are not read as RGB"),
        (encode(Image.fromarray(COLORS).convert("LAB"), "TIFF"), "holds LAB colors, which are not read as RGB"),
        (
            encode(COLORS, "PNG", save_all=True, append_images=[Image.fromarray(255 - COLORS)]),
            "is a film of several pictures",
        ),
    ],
)
def test_what_is_no_8_bit_color_is_refused(encoded: bytes, message: str) -> None:
    with pytest.raises(PictureKindError, match=message):
        decode_picture(encoded)


@pytest.mark.parametrize(
    ("pix_fmt", "wide"),
    [
        ("gray", False),
        ("yuv420p", False),
        ("yuv420p10le", False),
        (None, False),
        ("gray10le", True),
        ("gray12le", True),
        ("gray16be", True),
        ("grayf32le", True),
    ],
)
def test_gray_video_formats_wider_than_8_bits_are_told(pix_fmt: str | None, wide: bool) -> None:
    assert is_wide_gray(pix_fmt) is wide
