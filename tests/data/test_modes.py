"""Every reader shows a picture as a viewer does, whatever its mode and format, or refuses it and says why."""

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from tinyclip.data.decode import BadItem, Jpeg, decode, to_rgb
from tinyclip.data.sources import Source, open_source
from tinyclip.data.thumbnail import thumbnail
from tinyclip.preprocess import Preprocess

WIDTH, HEIGHT = 16, 8  # of every picture here: the left half in one colour, the right half in another
RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (255, 255, 255), (0, 0, 0)
PINK, GREY = (255, 127, 127), (128, 128, 128)
LEVELS = 2  # that a colour may be off: JPEG
SINCE_PILLOW_13 = ("tiff grey, premultiplied", "tiff ycbcr")  # Pillow 11 and 12 refuse one or both
IS_OLD_PILLOW = int(PIL.__version__.partition(".")[0]) < 13
Colour = tuple[int, ...] | int


def halves(mode: str, left: Colour, right: Colour) -> Image.Image:
    picture = Image.new(mode, (WIDTH, HEIGHT), left)
    picture.paste(right, (WIDTH // 2, 0, WIDTH, HEIGHT))
    return picture


def saved(picture: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def samples(kind: str, left: Colour, right: Colour) -> bytes:
    """The pixels, row after row, in numbers of the struct's kind."""
    row = []
    for colour in (left, right):
        row += [*(colour if isinstance(colour, tuple) else (colour,))] * (WIDTH // 2)
    return struct.pack(f"{kind[0]}{len(row)}{kind[1]}", *row) * HEIGHT


def png(bits: int, colours: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """What Pillow does not write. `colours`: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = len(rows) // HEIGHT
    filtered = b"".join(b"\0" + rows[start : start + size] for start in range(0, len(rows), size))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colours, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + (chunk(b"tRNS", transparent) if transparent else b"") + tail


def tiff(photometric: int, bits: tuple[int, ...], pixels: bytes, extra: int | None = None) -> bytes:
    """Uncompressed, one strip. `photometric`: 0 white is zero, 1 black is zero, 2 RGB. `extra`: 1 premultiplied."""
    entries = [(256, 3, [WIDTH]), (257, 3, [HEIGHT]), (258, 3, bits), (259, 3, [1]), (262, 3, [photometric])]
    entries += [(273, 4, [8]), (277, 3, [len(bits)]), (278, 3, [HEIGHT])]
    entries += [(279, 4, [len(pixels)])] + ([(338, 3, [extra])] if extra is not None else [])
    at = 8 + len(pixels)
    beyond, body = at + 2 + 12 * len(entries) + 4, b""
    directory = struct.pack("<H", len(entries))
    for tag, kind, values in entries:
        data = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        directory += struct.pack("<HHI", tag, kind, len(values))
        directory += data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", beyond + len(body))
        body += data if len(data) > 4 else b""
    return b"II*\0" + struct.pack("<I", at) + pixels + directory + bytes(4) + body


def twelve_bits(left: int, right: int) -> bytes:
    row = "".join(f"{value:012b}" for value in [left] * (WIDTH // 2) + [right] * (WIDTH // 2))
    return int(row, 2).to_bytes(len(row) // 8, "big") * HEIGHT


def bmp_with_alpha(left: Colour, right: Colour) -> bytes:
    """32 bits with a mask of alpha; colours are (blue, green, red, alpha)."""
    pixels = samples("<B", left, right)
    header = struct.pack("<IiiHHIIiiII", 56, WIDTH, HEIGHT, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    return struct.pack("<2sIHHI", b"BM", 70 + len(pixels), 0, 0, 70) + header + masks + pixels


def ycck() -> bytes:
    """What Adobe's programs write: inverted CMYK, its first three as YCbCr. Of a CMYK file the mark has to change."""
    ycc = halves("RGB", (0, 255, 255), (255, 127, 255)).convert("YCbCr")
    planes = [Image.eval(plane, lambda value: 255 - value) for plane in ycc.split()]
    black = Image.new("L", ycc.size, 0)
    data = saved(Image.merge("CMYK", [*planes, black]), "JPEG", quality=100, subsampling=0)  # which inverts all four
    at = data.index(b"Adobe") + 11
    assert data[at] == 0, "the transform of the Adobe mark"
    return data[:at] + b"\2" + data[at + 1 :]


def animation(file_format: str, *frames: Image.Image, **options) -> bytes:
    return saved(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100, **options)


def gif_that_begins_with_its_right_half() -> bytes:
    """The first frame covers half of the screen; where nothing is drawn, a page shows through."""
    data = bytearray(saved(Image.new("P", (WIDTH // 2, HEIGHT), 0), "GIF"))
    palette = bytes([*GREEN, *RED]) + bytes(6)
    whole = b"GIF89a" + struct.pack("<HHBBB", WIDTH, HEIGHT, 0x81, 0, 0) + palette
    at = data.index(b"\x2c\0\0\0\0")
    if data[at + 9] & 0x80:  # a palette of the frame's own
        raise AssertionError("expected the palette in front")
    return whole + b"\x2c" + struct.pack("<HHHH", WIDTH // 2, 0, WIDTH // 2, HEIGHT) + bytes(data[at + 9 :])


def palette(*colours: Colour) -> Image.Image:
    picture = halves("P", 0, 1)
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def pgm(largest: int, left: int, right: int) -> bytes:
    return b"P5 %d %d %d\n" % (WIDTH, HEIGHT, largest) + samples(">B" if largest < 256 else ">H", left, right)


RGB = halves("RGB", RED, GREEN)
HALF_RED = (*RED, 128)
SHOWN: dict[str, tuple[Callable[[], bytes], Colour, Colour]] = {
    "png 1": (lambda: saved(halves("1", 0, 1), "PNG"), BLACK, WHITE),
    "png grey": (lambda: saved(halves("L", 128, 255), "PNG"), GREY, WHITE),
    "png grey of 2 bits, 3 transparent": (
        lambda: png(2, 0, (b"\xff\xff" + b"\0\0") * HEIGHT, b"\0\3"),
        WHITE,
        BLACK,
    ),
    "png grey of 4 bits, 0 transparent": (
        lambda: png(4, 0, (b"\0" * 4 + b"\x88" * 4) * HEIGHT, b"\0\0"),
        WHITE,
        (136,) * 3,
    ),
    "png grey of 4 bits, 8 transparent": (
        lambda: png(4, 0, (b"\0" * 4 + b"\x88" * 4) * HEIGHT, b"\0\x08"),
        BLACK,
        WHITE,
    ),
    "png grey of 16 bits": (lambda: png(16, 0, samples(">H", 0x8000, 0x1234)), GREY, (0x12,) * 3),
    "png grey of 16 bits, one transparent": (
        lambda: png(16, 0, samples(">H", 0x8000, 0x80FF), b"\x80\xff"),
        GREY,
        WHITE,
    ),
    "png grey and alpha": (lambda: saved(halves("LA", (0, 255), (0, 0)), "PNG"), BLACK, WHITE),
    "png grey and alpha of 16 bits": (lambda: png(16, 4, samples(">H", (0, 0x8000), (0, 0xFFFF))), (127,) * 3, BLACK),
    "png palette": (lambda: saved(palette(RED, GREEN), "PNG"), RED, GREEN),
    "png palette, half transparent": (
        lambda: saved(palette(RED, GREEN), "PNG", transparency=bytes([128, 255])),
        PINK,
        GREEN,
    ),
    "png palette, one transparent": (lambda: saved(palette(RED, GREEN), "PNG", transparency=1), RED, WHITE),
    "png rgb": (lambda: saved(RGB, "PNG"), RED, GREEN),
    "png rgb, one transparent": (lambda: saved(RGB, "PNG", transparency=GREEN), RED, WHITE),
    "png rgb of 16 bits": (lambda: png(16, 2, samples(">H", (0xFFFF, 0, 0), (0, 0x8000, 0))), RED, GREEN),
    "png rgb of 16 bits, one transparent": (
        lambda: png(16, 2, samples(">H", (0x8000, 0, 0), (0, 0, 0)), struct.pack(">HHH", 0x8000, 0, 0)),
        WHITE,
        BLACK,
    ),
    "png rgba": (lambda: saved(halves("RGBA", HALF_RED, (0, 128, 0, 255)), "PNG"), PINK, GREEN),
    "png rgba of 16 bits": (lambda: png(16, 6, samples(">H", (65535, 0, 0, 0x8000), (0,) * 4)), PINK, WHITE),
    "png animated": (lambda: animation("PNG", RGB, Image.new("RGB", RGB.size, "blue")), RED, GREEN),
    "jpeg grey": (lambda: saved(halves("L", 128, 255), "JPEG", quality=100), GREY, WHITE),
    "jpeg ycbcr": (lambda: saved(RGB, "JPEG", quality=100, subsampling=0), RED, GREEN),
    "jpeg rgb": (lambda: saved(RGB, "JPEG", quality=100, keep_rgb=True), RED, GREEN),
    "jpeg progressive": (lambda: saved(RGB, "JPEG", quality=100, subsampling=0, progressive=True), RED, GREEN),
    "jpeg cmyk": (lambda: saved(halves("CMYK", (0, 255, 255, 0), (255, 0, 255, 127)), "JPEG", quality=100), RED, GREEN),
    "jpeg ycck": (ycck, RED, GREEN),
    "jpeg with a profile": (lambda: saved(RGB, "JPEG", quality=100, subsampling=0, icc_profile=b"?" * 200), RED, GREEN),
    "gif": (lambda: saved(palette(RED, GREEN), "GIF"), RED, GREEN),
    "gif of greys": (lambda: saved(halves("L", 128, 255), "GIF"), GREY, WHITE),
    "gif, one transparent": (lambda: saved(palette(RED, GREEN), "GIF", transparency=0), WHITE, GREEN),
    "gif animated": (lambda: animation("GIF", palette(RED, GREEN), palette(GREEN, RED)), RED, GREEN),
    "gif whose first frame is a part": (gif_that_begins_with_its_right_half, WHITE, GREEN),
    "webp": (lambda: saved(RGB, "WEBP", lossless=True), RED, GREEN),
    "webp with alpha": (
        lambda: saved(halves("RGBA", HALF_RED, (0, 0, 0, 0)), "WEBP", lossless=True, exact=True),
        PINK,
        WHITE,
    ),
    "webp animated": (
        lambda: animation("WEBP", RGB, Image.new("RGB", RGB.size, "blue"), lossless=True),
        RED,
        GREEN,
    ),
    "bmp 1": (lambda: saved(halves("1", 0, 1), "BMP"), BLACK, WHITE),
    "bmp palette": (lambda: saved(palette(RED, GREEN), "BMP"), RED, GREEN),
    "bmp rgb": (lambda: saved(RGB, "BMP"), RED, GREEN),
    "bmp with alpha": (lambda: bmp_with_alpha((0, 0, 255, 128), (0, 128, 0, 255)), PINK, GREEN),
    "bmp with an empty alpha": (lambda: bmp_with_alpha((0, 0, 255, 0), (0, 128, 0, 0)), RED, GREEN),
    "tiff 1": (lambda: saved(halves("1", 0, 1), "TIFF"), BLACK, WHITE),
    "tiff grey": (lambda: saved(halves("L", 128, 255), "TIFF"), GREY, WHITE),
    "tiff grey of 12 bits": (lambda: tiff(1, (12,), twelve_bits(0x800, 0xFFF)), GREY, WHITE),
    "tiff grey of 16 bits": (lambda: tiff(1, (16,), samples("<H", 0x8000, 0xFFFF)), GREY, WHITE),
    "tiff grey of 16 bits, white is zero": (lambda: tiff(0, (16,), samples("<H", 0x7FFF, 0)), GREY, WHITE),
    "tiff grey of 16 bits, big-endian": (lambda: saved(halves("I;16B", 0x8000, 0xFFFF), "TIFF"), GREY, WHITE),
    "tiff grey, premultiplied": (lambda: tiff(1, (8, 8), samples("<B", (0, 128), (128, 255)), 1), (127,) * 3, GREY),
    "tiff palette": (lambda: saved(palette(RED, GREEN), "TIFF"), RED, GREEN),
    "tiff rgb": (lambda: saved(RGB, "TIFF", compression="tiff_lzw"), RED, GREEN),
    "tiff rgba": (lambda: saved(halves("RGBA", HALF_RED, (0, 0, 0, 0)), "TIFF"), PINK, WHITE),
    "tiff rgba, premultiplied": (lambda: tiff(2, (8,) * 4, samples("<B", (128, 0, 0, 128), (0,) * 4), 1), PINK, WHITE),
    "tiff cmyk": (lambda: saved(halves("CMYK", (0, 255, 255, 0), (255, 0, 255, 127)), "TIFF"), RED, GREEN),
    "tiff ycbcr": (lambda: saved(RGB.convert("YCbCr"), "TIFF"), RED, GREEN),
    "tiff of several pages": (lambda: animation("TIFF", RGB, Image.new("RGB", RGB.size, "blue")), RED, GREEN),
    "pbm": (lambda: saved(halves("1", 0, 1), "PPM"), BLACK, WHITE),
    "pgm": (lambda: pgm(255, 128, 255), GREY, WHITE),
    "pgm up to 100": (lambda: pgm(100, 50, 100), GREY, WHITE),
    "pgm of 16 bits": (lambda: pgm(65535, 0x8000, 0xFFFF), GREY, WHITE),
    "pgm up to 1000": (lambda: pgm(1000, 502, 1000), GREY, WHITE),
    "ppm": (lambda: saved(RGB, "PPM"), RED, GREEN),
}
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "tiff of floats": (lambda: saved(halves("F", 0, 1), "TIFF"), "mode F: viewers do not agree on what is white"),
    "tiff of 32 bits": (lambda: saved(halves("I", 0, 70000), "TIFF"), "a TIFF of signed integers, or of 32 bits"),
    "tiff lab": (lambda: saved(halves("LAB", 0, 255), "TIFF"), "mode LAB: viewers do not agree"),
    "pfm": (lambda: saved(halves("F", 0, 1), "PPM"), "mode F: viewers do not agree"),
    "a page": (lambda: b"<html></html>", r"not an image \(JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM\)"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "half a jpeg": (lambda: saved(RGB, "JPEG")[:200], "OSError|SyntaxError"),
    "nothing": (lambda: b"", "empty file"),
}
PICTURES = {name: make for name, (make, *_) in {**SHOWN, **REFUSED}.items()}


def table(path: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (path / name).write_bytes(data)
    (path / "list.tsv").write_text("\n".join(["file\tcaption", *(f"{name}\tx" for name in files)]))
    return str(path / "list.tsv")


def shard(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path / "0.tar", "w") as archive:
        for name, data in files.items():
            for member, content in ((name, data), (f"{Path(name).stem}.txt", b"x")):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return str(path / "0.tar")


def parquet(path: Path, files: dict[str, bytes]) -> str:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": data, "path": name}, "caption": "x"} for name, data in files.items()]
    writer.write_table(pyarrow.Table.from_pylist(rows), path / "list.parquet")
    return str(path / "list.parquet")


def folder(path: Path, files: dict[str, bytes]) -> str:
    (path / "set/cat").mkdir(parents=True)
    for name, data in files.items():
        (path / "set/cat" / name).write_bytes(data)
    return str(path / "set?caption=label")


def zipped(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path / "set.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(f"cat/{name}", data)
    return str(path / "set.zip?caption=label")


def hub(path: Path, files: dict[str, bytes]) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": data, "path": None} for data in files.values()], "caption": ["x"] * len(files)}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(path / "saved")
    return f"huggingface:{path / 'saved'}"


READERS = {own.__name__: own for own in (table, shard, parquet, folder, zipped, hub)}


@pytest.fixture(scope="module", params=READERS)
def source(request, tmp_path_factory) -> Source:
    """All pictures in one set, whatever they are under the name of a JPEG."""
    path = tmp_path_factory.mktemp(request.param)
    files = {f"{number:03}.jpg": make() for number, make in enumerate(PICTURES.values())}
    return open_source(READERS[request.param](path, files))


def test_every_picture_is_what_a_viewer_shows(source):
    wrong = {}
    for number, (name, (_, *expected)) in enumerate(SHOWN.items()):
        if IS_OLD_PILLOW and name in SINCE_PILLOW_13:
            continue
        picture = source.image(number)
        colours = [picture.getpixel((x, HEIGHT // 2)) for x in (WIDTH // 4, 3 * WIDTH // 4)]
        is_near = np.abs(np.subtract(colours, expected)).max() <= LEVELS
        if picture.mode != "RGB" or picture.size != (WIDTH, HEIGHT) or not is_near:
            wrong[name] = picture.mode, picture.size, colours, expected
    assert not wrong


def test_what_has_no_one_look_is_refused_with_the_reason(source):
    for number, (_, reason) in enumerate(REFUSED.values(), len(SHOWN)):
        with pytest.raises(BadItem, match=reason) as caught:
            source.image(number)
        assert "\n" not in str(caught.value)


def test_what_is_opaque_keeps_its_pixels_bit_for_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    opaque = Image.fromarray(np.dstack([pixels, np.full((9, 7), 255, np.uint8)]))
    for file_format in ("PNG", "WEBP", "TIFF"):
        data = saved(opaque, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
        assert np.array_equal(np.asarray(decode(lambda data=data: data)), pixels)


@pytest.mark.parametrize("width, height", [(1, 1), (1, 50), (50, 1), (1, 100), (3, 299)])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF"])
def test_one_pixel_wide_is_a_picture_as_in_open_clip(width, height, file_format):
    from open_clip.transform import image_transform

    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = saved(Image.fromarray(pixels), file_format)
    theirs = image_transform(32, is_train=False)
    theirs.transforms.pop()
    expected = (theirs(Image.open(io.BytesIO(data)).convert("RGB")) * 255).round().int()
    picture = decode(lambda: data)
    assert (Preprocess(size=32)(picture).int() - expected).abs().max() <= 1
    assert Preprocess(size=32).crop(picture, (0, 0, *picture.size)).shape == (3, 32, 32)


# EXIF


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def corners() -> Image.Image:
    """Flat squares in four colours, so that JPEG is exact enough to tell them apart."""
    picture = Image.new("RGB", (32, 16), RED)
    for colour, left, top in ((GREEN, 16, 0), (WHITE, 0, 8), (BLACK, 16, 8)):
        picture.paste(colour, (left, top, left + 16, top + 8))
    return picture


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(file_format, orientation):
    from PIL import ImageOps

    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    data = saved(corners(), file_format, exif=exif(orientation), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture = decode(lambda: data)
    assert picture.size == ((16, 32) if orientation > 4 else (32, 16))
    assert np.array_equal(picture, upright.convert("RGB"))
    assert picture.info == {"mode": "RGB", "turned": orientation > 1} and picture.format == file_format
    if file_format == "JPEG":
        assert isinstance(picture, Jpeg)
        assert decode(lambda: data, jpeg_side=8).size == ((8, 16) if orientation > 4 else (16, 8))


def test_without_simplejpeg_pictures_are_turned_alike(monkeypatch):
    from tinyclip.data import decode as decoding

    data = saved(corners(), "JPEG", exif=exif(6), comment="before it", icc_profile=b"?" * 70_000)
    fast = decode(lambda: data)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    slow = decode(lambda: data)
    assert not isinstance(slow, Jpeg) and np.array_equal(slow, fast) and slow.info == fast.info


@pytest.mark.parametrize("damaged", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", exif(9)])
def test_an_exif_that_cannot_be_read_says_nothing(damaged):
    data = saved(corners(), "JPEG", exif=damaged)
    assert decode(lambda: data).size == (32, 16)


def test_a_picture_that_is_given_is_seen_as_open_clip_sees_it():
    """Readers turn pictures; what is given to a model's preprocessing is not turned a second time."""
    given = Image.open(io.BytesIO(saved(corners(), "JPEG", exif=exif(6))))
    assert torch.equal(Preprocess(size=8)(given), Preprocess(size=8)(given.convert("RGB")))


# Pictures that do not come from a file


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_a_picture_without_a_known_white_is_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode}: viewers do not agree"):
        Preprocess(size=8)(Image.new(mode, (12, 10)))


def test_numbers_of_more_than_16_bits_are_refused():
    with pytest.raises(ValueError, match="expected 16 bits, got values from 0 to 65536"):
        to_rgb(halves("I", 0, 65536))
    assert to_rgb(halves("I", 0, 65535)).getpixel((WIDTH - 1, 0)) == WHITE


def test_a_thumbnail_shows_what_the_model_sees(tmp_path):
    class Given:
        def image(self, _index: int) -> Image.Image:
            return halves("I;16", 0x8000, 0xFFFF)

    assert thumbnail(Given(), 0).startswith("data:image/webp;base64,")
