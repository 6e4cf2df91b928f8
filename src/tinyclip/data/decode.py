"""The bytes of an image file -> a picture. What is broken, too large or no image raises BadItem, one line.

Plain JPEGs (8 bits; YCbCr, RGB or grey) are decoded by simplejpeg (libjpeg-turbo) into the array that `preprocess`
resizes: bit for bit what Pillow decodes (tests/data/test_decode.py), without Pillow's copies. Pillow decodes the rest:
other formats, CMYK, what simplejpeg refuses. EXIF orientation is not applied, as in open_clip.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes the same pixels, slower
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow reads more; some of those start other programs
MAX_PIXELS = 89_478_485  # of one image: Pillow's decompression-bomb limit
START_OF_JPEG = b"\xff\xd8"
PLAIN = ("YCbCr", "RGB", "Gray")


class BadItem(ValueError):
    """One item cannot be read. The message is the reason, one line; the caller knows the key."""


class Jpeg(Image.Image):
    """A decoded JPEG as an array, and Pillow's image of it: it becomes that when one of Pillow's methods is called."""

    format = "JPEG"
    pixels: np.ndarray | None = None  # uint8 [height, width, 3], RGB; None once Pillow holds (and may change) them

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__()
        self.pixels = pixels
        self._mode, self._size = "RGB", (pixels.shape[1], pixels.shape[0])

    def load(self) -> Image.core.PixelAccess | None:
        if self.pixels is not None:
            self.im, self.pixels = Image.fromarray(self.pixels).im, None
        return super().load()


def decode(read: Callable[[], bytes], jpeg_side: int | None = None) -> Image.Image:
    """A fully decoded picture of any mode that converts to RGB. Its size is checked before its pixels are decoded.

    With `jpeg_side`, a plain JPEG is decoded to the least n/8 of its size (8 x 8 coefficients -> n x n pixels) whose
    shorter side has so many pixels: faster, and no longer what Pillow decodes. Without simplejpeg it changes nothing.
    """
    try:
        data = read()
        if not data:
            raise BadItem("empty file")
        return _plain_jpeg(data, jpeg_side or 0) or _by_pillow(data)
    except UnidentifiedImageError:
        raise BadItem(f"not an image ({', '.join(FORMATS)})") from None
    except BadItem:
        raise
    except Exception as error:  # whatever a broken file makes Pillow, zlib or zipfile raise
        raise BadItem(one_line(error)) from error


def _plain_jpeg(data: bytes, least_side: int) -> Jpeg | None:
    """None for what Pillow is to decode, or to refuse with a reason."""
    if simplejpeg is None or not data.startswith(START_OF_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in PLAIN or int(width) * int(height) > MAX_PIXELS:
            return None
        return Jpeg(simplejpeg.decode_jpeg(data, min_height=least_side, min_width=least_side))
    except ValueError:  # broken, if only a little: libjpeg's warnings are errors here
        return None


def _by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadItem(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
    image.load()
    return image


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
