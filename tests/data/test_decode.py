"""A JPEG decodes to Pillow's pixels bit for bit, whatever its form; what simplejpeg refuses is Pillow's to judge."""

import io
import pickle
import tarfile
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from tinyclip.data import decode as decoding
from tinyclip.data.decode import BadItem, Jpeg, decode
from tinyclip.data.sources import open_source
from tinyclip.preprocess import Preprocess

SUBSAMPLING = ["4:4:4", "4:2:2", "4:2:0"]


def photograph(width: int, height: int) -> Image.Image:
    """Coloured noise, blurred: it has detail and gradients in every channel."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.5))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("width, height", [(64, 48), (33, 47), (1, 1), (7, 300)])
@pytest.mark.parametrize("subsampling", SUBSAMPLING)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_plain_jpeg_is_pillow_s_bit_for_bit(width, height, subsampling, progressive):
    for quality in (30, 75, 95):
        data = jpeg(photograph(width, height), quality=quality, subsampling=subsampling, progressive=progressive)
        image = decode(lambda data=data: data)
        assert isinstance(image, Jpeg) and image.size == (width, height)
        assert np.array_equal(image.pixels, by_pillow(data))


@pytest.mark.parametrize("mode, plain", [("L", True), ("RGB", True), ("CMYK", False)])
def test_every_colour_space_is_pillow_s(mode, plain):
    data = jpeg(photograph(40, 30).convert(mode))
    image = decode(lambda: data)
    assert isinstance(image, Jpeg) == plain
    assert np.array_equal(pixels_of(image), by_pillow(data))


def test_a_jpeg_of_rgb_components_is_pillow_s():
    data = jpeg(photograph(40, 30), keep_rgb=True)
    image = decode(lambda: data)
    assert isinstance(image, Jpeg) and np.array_equal(image.pixels, by_pillow(data))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_other_formats_are_pillow_s(mode):
    buffer = io.BytesIO()
    photograph(20, 10).convert(mode).save(buffer, "PNG")
    image = decode(buffer.getvalue)
    assert not isinstance(image, Jpeg) and np.array_equal(pixels_of(image), by_pillow(buffer.getvalue()))


def test_a_damaged_jpeg_is_what_pillow_says_of_it():
    """Cut anywhere, or with bytes overwritten: the same pixels as from Pillow, or a bad item where Pillow has none."""
    random, whole, outcomes = Random(0), jpeg(photograph(64, 48), quality=80), set()
    for number in range(300):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[random.randrange(2, len(data)) :]
        for _ in range(number % 3):
            data[random.randrange(len(data))] = random.randrange(256)
        try:
            expected = by_pillow(bytes(data))
        except Exception:
            expected = None
        try:
            ours = pixels_of(decode(lambda data=data: bytes(data)))
        except BadItem:
            ours = None
        outcomes.add((ours is None, expected is None))
        assert (ours is None) == (expected is None) and (ours is None or np.array_equal(ours, expected)), number
    assert outcomes == {(True, True), (False, False)}


def test_the_size_is_checked_before_the_pixels_are_decoded(monkeypatch):
    data = jpeg(photograph(40, 30))
    at = data.index(b"\xff\xc0") + 5
    bomb = data[:at] + b"\xfe\xff\xfe\xff" + data[at + 4 :]  # claims to be 65279 x 65279
    with pytest.raises(BadItem, match="pixels|DecompressionBomb"):
        decode(lambda: bomb)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    with pytest.raises(BadItem, match="^40 x 30 pixels, the limit is 1000$"):
        decode(lambda: data)


@pytest.mark.parametrize("least, expected", [(1, (11, 7)), (21, (31, 21)), (22, (41, 27)), (500, (81, 54))])
def test_a_scaled_jpeg_has_n_eighths_of_its_size(least, expected):
    picture = photograph(81, 54).filter(ImageFilter.GaussianBlur(6))
    data = jpeg(picture, quality=95)
    image = decode(lambda: data, jpeg_side=least)
    assert image.size == expected and min(image.size) >= min(least, 54)
    far = np.abs(pixels_of(image).astype(int) - np.asarray(picture.resize(image.size, Image.Resampling.BOX)))
    assert far.mean() < 2


@pytest.mark.parametrize("kind", ["table", "shard", "parquet"])
def test_the_key_jpeg_side_reaches_the_decoder(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    data = jpeg(photograph(80, 64))
    if kind == "table":
        (tmp_path / "0.jpg").write_bytes(data)
        (path := tmp_path / "list.tsv").write_text("file\tcaption\n0.jpg\tx\n")
    elif kind == "shard":
        with tarfile.open(path := tmp_path / "0.tar", "w") as archive:
            for name, content in (("0.jpg", data), ("0.txt", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pyarrow.Table.from_pylist([{"image": {"bytes": data, "path": None}, "caption": "x"}])
        parquet.write_table(table, path := tmp_path / "list.parquet")
    assert open_source(str(path)).image(0).size == (80, 64)
    assert open_source(f"{path}?jpeg_side=32").image(0).size == (40, 32)


def test_without_simplejpeg_pillow_decodes_the_same(monkeypatch):
    data = jpeg(photograph(40, 30))
    fast = pixels_of(decode(lambda: data))
    monkeypatch.setattr(decoding, "simplejpeg", None)
    slow = decode(lambda: data)
    assert not isinstance(slow, Jpeg) and np.array_equal(pixels_of(slow), fast)


def test_a_decoded_jpeg_is_an_image_of_pillow_s():
    data = jpeg(photograph(40, 30))
    theirs = Image.open(io.BytesIO(data))
    for use in (
        lambda image: image.resize((9, 7)),
        lambda image: image.crop((1, 2, 20, 30)).convert("RGBA"),
        lambda image: image.copy(),
        lambda image: pickle.loads(pickle.dumps(image)),
        lambda image: image.rotate(90, expand=True),
        lambda image: image.getpixel((3, 4)),
        lambda image: image.tobytes(),
        lambda image: image.thumbnail((10, 10)) or image,
        lambda image: jpeg(image),
    ):
        ours, expected = use(decode(lambda: data)), use(theirs.copy())
        assert (ours.tobytes() == expected.tobytes()) if isinstance(ours, Image.Image) else ours == expected


def test_what_is_drawn_on_a_decoded_jpeg_is_seen():
    image = decode(lambda: jpeg(photograph(16, 16)))
    ImageDraw.Draw(image).rectangle((0, 0, 16, 16), fill="red")
    assert torch.equal(Preprocess(size=8)(image), Preprocess(size=8)(Image.new("RGB", (16, 16), "red")))


@pytest.mark.skipif(find_spec("sklearn") is None, reason="two photographs come with scikit-learn")
@pytest.mark.parametrize("name", ["china", "flower"])
def test_a_photograph_s_view_is_open_clip_s_within_a_level_but_for_a_pixel(name):
    from open_clip.transform import image_transform

    path = Path(str(find_spec("sklearn").origin)).parent / "datasets" / "images" / f"{name}.jpg"
    for size in (224, 336):
        preprocess = Preprocess(size=size)
        theirs = image_transform(size, is_train=False)
        theirs.transforms.pop()
        expected = (theirs(Image.open(path)) * 255).round().int()
        apart = (preprocess(decode(path.read_bytes)).int() - expected).abs()
        assert apart.max() <= 2 and (apart > 1).sum() <= 1 and apart.float().mean() < 0.01
