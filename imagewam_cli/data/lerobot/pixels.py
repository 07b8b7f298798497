"""Decode PNG, JPEG and TIFF pictures to 8-bit RGB, and refuse what is not color: depth, raw sensor values, print inks.

Pillow converts any of these without a word: 16-bit and float values are cut at 255.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from imagewam_cli.data.types import UInt8Image

_COLOR_MODES = ("RGB", "RGBX", "RGBA", "P", "PA", "L", "LA", "1", "YCbCr")
"""Pillow's modes of 8-bit pictures that have one meaning as RGB; gray ones get three equal channels."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_BIT_DEPTH, _PNG_COLOR_TYPE = 24, 25
_PNG_RGB, _PNG_GRAY_ALPHA, _PNG_RGB_ALPHA = 2, 4, 6
_WIDE_GRAY = re.compile(r"gray(9|1\d|f?32|f16)")
"""FFmpeg's pixel formats of one channel with more than 8 bits."""


class PictureKindError(ValueError):
    """A picture is not one of 8-bit colors. The text continues a sentence that begins with the picture."""


@dataclass(frozen=True, kw_only=True)
class DecodedPicture:
    """Pixels, and what was dropped to get them."""

    pixels: UInt8Image
    """(H, W, 3)"""
    remark: str | None
    """Continues a sentence that begins with the pictures, such as "have transparent parts, ..."."""


def decode_picture(encoded: bytes) -> DecodedPicture:
    """Decode an encoded picture, turned as its EXIF orientation says.

    Raises:
        OSError: the picture is damaged, or its format is unknown.
        PictureKindError: it holds no 8-bit colors.
    """
    with Image.open(io.BytesIO(encoded)) as picture:
        kind = depth_kind(picture, encoded)
        if kind is not None:
            raise PictureKindError(f"holds {kind}, not colors")
        if picture.mode not in _COLOR_MODES:
            raise PictureKindError(f"holds {picture.mode} colors, which are not read as RGB")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            raise PictureKindError("is a film of several pictures")
        remark = None
        if _is_16_bit_png(encoded):
            remark = "have 16 bits per color; 0 .. 65535 is read as 0 .. 255"
        elif picture.mode in ("RGBA", "LA", "PA") and picture.getextrema()[-1][0] < 255:  # type: ignore[index]
            remark = "have transparent parts; their colors are read as if they were opaque"
        if "exif" in picture.info or picture.format == "TIFF":
            ImageOps.exif_transpose(picture, in_place=True)  # as the `datasets` library, and so LeRobot, does
        return DecodedPicture(pixels=np.array(picture.convert("RGB"), dtype=np.uint8), remark=remark)


def depth_kind(picture: Image.Image, encoded: bytes) -> str | None:
    """Return what one-channel values wider than 8 bits a picture holds, such as depth in millimeters; None if none."""
    if picture.mode.startswith("I;16") or (_is_16_bit_png(encoded) and encoded[_PNG_COLOR_TYPE] == _PNG_GRAY_ALPHA):
        return "one channel of 16 bits"
    return {"I": "one channel of 32 bits", "F": "one channel of floats"}.get(picture.mode)


def is_wide_gray(pix_fmt: str | None) -> bool:
    """Return whether its frames hold one channel with more than 8 bits. pix_fmt: FFmpeg's name of their format."""
    return pix_fmt is not None and _WIDE_GRAY.match(pix_fmt) is not None


def _is_16_bit_png(encoded: bytes) -> bool:
    return (
        encoded.startswith(_PNG)
        and encoded[_PNG_BIT_DEPTH] == 16
        and encoded[_PNG_COLOR_TYPE] in (_PNG_RGB, _PNG_GRAY_ALPHA, _PNG_RGB_ALPHA)
    )
