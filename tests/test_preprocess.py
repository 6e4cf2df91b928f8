"""Pixels are open_clip's within a level, whatever the picture's shape; transparency is white; bad boxes are refused."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pydantic import ValidationError
from torch import Tensor

from tinyclip.data.decode import Jpeg
from tinyclip.preprocess import Preprocess, stack


def picture(width: int, height: int, *, smooth: bool = False) -> Image.Image:
    generator = torch.Generator().manual_seed(width * 1000 + height)
    side = (5, 5) if smooth else (height, width)
    pixels = torch.randint(0, 256, (*side, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def open_clip_pixels(image: Image.Image, preprocess: Preprocess, *, normalised: bool) -> Tensor:
    from open_clip.transform import image_transform

    transform = image_transform(
        preprocess.size,
        is_train=False,
        mean=preprocess.mean,
        std=preprocess.std,
        resize_mode=preprocess.resize,
        interpolation=preprocess.interpolation,
    )
    if normalised:
        return transform(image)
    transform.transforms.pop()
    return (transform(image) * 255).round().to(torch.uint8)


def levels_apart(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.int() - theirs.int()).abs()


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("width, height", [(64, 64), (33, 33), (20, 300), (301, 77), (67, 107), (640, 479), (5, 9)])
def test_pixels_are_open_clip_s_within_a_level(resize, interpolation, width, height):
    for size, smooth in ((64, False), (31, True)):
        preprocess = Preprocess(size=size, resize=resize, interpolation=interpolation)
        image = picture(width, height, smooth=smooth)
        apart = levels_apart(preprocess(image), open_clip_pixels(image, preprocess, normalised=False))
        assert apart.max() <= 1 and apart.float().mean() < 0.02


def test_of_white_noise_that_is_enlarged_one_pixel_in_a_thousand_may_be_two_levels_apart():
    for interpolation in ("bicubic", "bilinear"):
        preprocess = Preprocess(size=224, interpolation=interpolation)
        image = picture(64, 64)
        apart = levels_apart(preprocess(image), open_clip_pixels(image, preprocess, normalised=False))
        assert apart.max() <= 2 and (apart > 1).float().mean() < 1e-3


def test_a_picture_of_the_right_size_is_not_resized():
    image = picture(24, 24)
    preprocess = Preprocess(size=24)
    assert torch.equal(preprocess(image), open_clip_pixels(image, preprocess, normalised=False))


@pytest.mark.parametrize("width, height", [(48, 48), (90, 61), (61, 90)])
def test_a_decoded_jpeg_gives_the_pixels_of_pillow_s_image(width, height):
    image = picture(width, height).filter(ImageFilter.GaussianBlur(2))
    for preprocess in (Preprocess(size=32), Preprocess(size=32, resize="squash")):
        jpeg = Jpeg(np.array(image))
        assert torch.equal(preprocess(jpeg), preprocess(image))
        assert torch.equal(preprocess.crop(jpeg, (3, 4, 40, 41.5)), preprocess.crop(image, (3, 4, 40, 41.5)))


def test_normalised_pixels_equal_open_clip():
    preprocess = Preprocess(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    image = picture(32, 32)
    expected = open_clip_pixels(image, preprocess, normalised=True)
    torch.testing.assert_close(preprocess.normalise(preprocess(image)[None])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_every_mode_gives_three_channels(mode):
    pixels = Preprocess(size=8)(Image.new(mode, (12, 10)))
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0)).convert(mode)
    if mode == "P":
        image.info["transparency"] = image.getpixel((0, 0))
    assert Preprocess(size=8)(image).min() == 255


def test_a_crop_of_everything_is_the_squashed_picture():
    image = picture(40, 25)
    squash = Preprocess(size=16, resize="squash")
    assert torch.equal(squash.crop(image, (0, 0, 40, 25)), squash(image))


def test_a_stack_is_the_views_in_their_memory_order():
    preprocess = Preprocess(size=8)
    views = [preprocess(picture(16, 12)), preprocess(picture(8, 8)), torch.zeros(3, 8, 8, dtype=torch.uint8)]
    batch = stack(views)
    assert torch.equal(batch, torch.stack(views)) and batch.is_contiguous(memory_format=torch.channels_last)
    assert preprocess.normalise(batch).is_contiguous()


@pytest.mark.parametrize("box", [(0, 0, 1e-3, 1e-3), (39.999, 19.999, 40, 20), (7.4, 3.4, 7.45, 3.45)])
def test_a_crop_has_a_whole_pixel_at_least(box):
    assert Preprocess(size=4).crop(picture(40, 20), box).shape == (3, 4, 4)


def test_a_crop_shows_its_box():
    image = Image.new("RGB", (40, 20), "red")
    image.paste((0, 0, 255), (20, 0, 40, 20))
    blue = Preprocess(size=8).crop(image, (25.5, 2.25, 37.0, 18.0))
    assert blue.float().mean((1, 2)).tolist() == [0, 0, 255]


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 41, 5), (5, 5, 5, 9), (0, 9, 5, 3)])
def test_a_box_outside_the_picture_is_refused(box):
    with pytest.raises(ValueError, match="expected a box inside the 40 x 20 picture"):
        Preprocess(size=8).crop(Image.new("RGB", (40, 20)), box)


def test_a_line_is_no_picture():
    with pytest.raises(ValueError, match="at most 100 times as long as wide, got 1 x 60000"):
        Preprocess(size=224)(Image.new("RGB", (1, 60000)))


def test_pixels_can_be_shared_where_only_mean_and_std_differ():
    preprocess = Preprocess(size=8)
    assert preprocess.same_pixels(Preprocess(size=8, mean=(0.5, 0.5, 0.5)))
    assert not preprocess.same_pixels(Preprocess(size=9))
    assert not preprocess.same_pixels(Preprocess(size=8, resize="squash"))
    assert not preprocess.same_pixels(Preprocess(size=8, interpolation="bilinear"))


@pytest.mark.parametrize("bad", [{"size": 0}, {"std": (0, 1, 1)}, {"mean": (float("nan"), 0, 0)}, {"colour": "RGB"}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        Preprocess(**{"size": 8, **bad})
