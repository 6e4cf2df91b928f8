"""The bytes of an image file -> RGB as a viewer shows it. What is broken, too large or no image raises BadItem.

Plain JPEGs (8 bits; YCbCr, RGB or grey) are decoded by simplejpeg (libjpeg-turbo) into the array that `preprocess`
resizes: bit for bit what Pillow decodes (tests/data/test_decode.py), without Pillow's copies. Pillow decodes the rest:
other formats, CMYK, what simplejpeg refuses.

Transparency is laid on white, of 16 bits the upper 8 are taken, an animation is its first frame, and a picture is
turned as its EXIF says. Colour profiles are ignored. Floats, integers of 32 bits and LAB have no white that all viewers
agree on, and are refused. open_clip drops transparency, clips 16 bits to white and turns nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes the same pixels, slower
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow reads more; some of those start other programs
MAX_PIXELS = 89_478_485  # of one image: Pillow's decompression-bomb limit
START_OF_JPEG = b"\xff\xd8"
APP1, SCAN = 0xE1, 0xDA  # markers
EXIF = b"Exif\x00\x00"
PLAIN = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "L"}  # simplejpeg's name of the colours, and Pillow's mode
NO_WHITE = ("F", "LAB")  # modes whose numbers viewers show in different ways
GREY_STEP = {"L;2": 85, "L;4": 17}  # of pixels; Pillow leaves the transparent grey of such a PNG in steps of 1
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    """A fully decoded RGB picture. Its size is checked before its pixels are decoded.

    Its `format` is the file's; info["mode"] the mode that the file has, info["turned"] whether its EXIF turned it.
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
        pixels = simplejpeg.decode_jpeg(data, min_height=least_side, min_width=least_side)
    except ValueError:  # broken, if only a little: libjpeg's warnings are errors here
        return None
    turn = _turn(_exif_of_jpeg(data))
    image = Jpeg(pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn)))
    image.info = {"mode": PLAIN[colours], "turned": turn is not None}
    return image


def _exif_of_jpeg(data: bytes) -> bytes:
    """What a JPEG that can be decoded says before its first scan."""
    at, exif = 2, b""
    while len(data) > at + 3 and data[at] == 0xFF and data[at + 1] != SCAN:
        if data[at + 1] == 0xFF:  # a filler
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == APP1 and data.startswith(EXIF, at + 4):
            exif = exif or data[at + 4 : end]
        at = end
    return exif


def _turn(exif: bytes | None) -> Image.Transpose | None:
    """What makes the picture upright. An EXIF that cannot be read says nothing."""
    if not exif:
        return None
    try:
        found = Image.Exif()
        found.load(exif)
        return TURNS.get(found.get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever a broken EXIF makes Pillow raise
        return None


def _by_pillow(data: bytes) -> Image.Image:
    image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadItem(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
    file_format, mode, tile = image.format, image.mode, image.tile[0] if image.tile else None
    turned = file_format == "TIFF" and image.tag_v2.get(ExifTags.Base.Orientation) in TURNS  # by Pillow, in load
    image.load()
    exif = None if file_format == "TIFF" else image.info.get("exif")
    if file_format == "TIFF":
        image = _from_tiff(image)
    elif file_format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image = image.convert("RGB")  # its writer left the fourth byte empty
    elif file_format == "PNG" and tile is not None and "transparency" in image.info:
        image.info["transparency"] = _in_pixels(image.info["transparency"], tile[3])
    picture = to_rgb(image)
    if file_format == "GIF" and tile is not None and tile[1] != (0, 0, *image.size):
        frame, picture = picture.crop(tile[1]), Image.new("RGB", picture.size, "white")  # around it nothing is drawn
        picture.paste(frame, tile[1])
    if (turn := _turn(exif)) is not None:
        picture, turned = picture.transpose(turn), True
    picture.format, picture.info = file_format, {"mode": mode, "turned": turned}
    return picture


def _in_pixels(transparent: Any, stored: str) -> Any:
    """The colour of a PNG that is transparent, in 8 bits, as the pixels are: Pillow leaves it as it is stored."""
    if stored == "RGB;16B":
        return tuple(value >> 8 for value in transparent)
    return transparent * GREY_STEP[stored] if stored in GREY_STEP else transparent


def _from_tiff(image: Any) -> Image.Image:
    """Greys of 12 and 16 bits in 16 bits, 0 being black. Raises BadItem for integers of another size."""
    if image.mode == "I":
        raise BadItem("a TIFF of signed integers, or of 32 bits: viewers do not agree on what is white")
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image) << (16 - image.tag_v2[ExifTags.Base.BitsPerSample][0])
    is_white_zero = image.tag_v2[ExifTags.Base.PhotometricInterpretation] == 0
    return Image.fromarray((65535 - values if is_white_zero else values).astype(np.uint16))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with whatever is transparent laid on white. Of 16 bits the upper 8 are taken, as Pillow does for colours.

    Raises BadItem for a mode without a white that is known.
    """
    if image.mode in NO_WHITE:
        raise BadItem(f"a picture of mode {image.mode}: viewers do not agree on what is white")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _upper_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """Of grey in 16 bits, L or LA. Mode I is what Pillow makes of such a PGM."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise BadItem(f"expected 16 bits, got values from {values.min()} to {values.max()}: what is white?")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
