"""Scenes: captions are true of the picture, held-out names stay held out, and a picture depends on its number alone."""

from collections import Counter

import pytest
from PIL import ImageChops

from tinyclip.data.scenes import COLOURS, HELD_OUT, NAMES, SHAPES, Group, Scene, Scenes


def names_of(scene):
    return [(group.colour, group.shape) for group in scene.groups]


def test_captions_read_like_this():
    ring, hearts = Group(1, "big", "blue", "ring"), Group(3, "small", "green", "heart")
    assert Scene((ring, hearts), "row", (0, 2)).captions() == (
        "a big blue ring above three small green hearts",
        "three small green hearts below a big blue ring",
        "a big blue ring at the top and three small green hearts at the bottom",
    )
    assert Scene((ring, hearts), "column", (0, 2)).captions()[1] == (
        "three small green hearts to the right of a big blue ring"
    )
    assert Scene((ring,), "row", (2,), along=0).captions()[0] == "a big blue ring in the bottom left corner"
    assert Scene((ring,), "row", (1,)).captions()[0] == "a big blue ring in the middle"
    assert Scene((hearts,), "column", (2,)).captions()[1] == "a column of three small green hearts on the right"
    assert str(Group(2, "big", "red", "cross")) == "two big red crosses"


def test_objects_stand_where_the_caption_says():
    """The pixel at the centre of every object that has no hole there is nearest to the object's colour."""
    scenes = Scenes("train", 60)
    for index in range(len(scenes)):
        picture = scenes.image(index)
        for group, x, y in scenes.scene(index).objects():
            if group.shape in ("ring", "moon"):
                continue
            pixel = picture.getpixel((round(64 * x), round(64 * y)))
            distance = {
                name: sum((a - b) ** 2 for a, b in zip(pixel, rgb, strict=True)) for name, rgb in COLOURS.items()
            }
            assert min(distance, key=distance.get) == group.colour, (index, group, pixel)


def test_first_group_is_left_or_above():
    for index in range(100):
        scene = Scenes("train", 100).scene(index)
        if len(scene.groups) == 2:
            across = 2 if scene.line == "row" else 1
            first, last = ([o[across] for o in scene.objects() if o[0] == group] for group in scene.groups)
            assert max(first) < min(last)


def test_held_out_names_never_occur_in_train_and_always_in_heldout():
    assert len(HELD_OUT) == len({c for c, _ in HELD_OUT}) == len({s for _, s in HELD_OUT}) == len(SHAPES)
    train, heldout = Scenes("train", 2000), Scenes("heldout", 500)
    seen = {name for index in range(len(train)) for name in names_of(train.scene(index))}
    assert seen == set(NAMES) - set(HELD_OUT)
    assert all(set(names_of(heldout.scene(index))) & set(HELD_OUT) for index in range(len(heldout)))


def test_captions_tell_heldout_pictures_apart():
    """Retrieval among 500 pictures: at least nine in ten have a scene that no other picture has."""
    scenes = Scenes("heldout", 500)
    times = Counter(scenes.captions(index)[0] for index in range(500))
    assert sum(number == 1 for number in times.values()) >= 450


def test_classes_are_labelled_in_turn():
    scenes = Scenes("classes", 130)
    labels = [scenes.label(index) for index in range(130)]
    assert labels[:2] == [("red circle",), ("red square",)] and labels[64] == labels[0]
    assert len(set(labels)) == 64
    assert all(labels[index][0] in scenes.captions(index)[0] for index in range(130))
    assert Scenes("train", 3).label(0) is None


def test_a_picture_depends_on_seed_split_and_number_alone():
    many, few = Scenes("train", 50), Scenes("train", 4)
    assert many.image(3).tobytes() == few.image(3).tobytes() and many.captions(3) == few.captions(3)
    others = [Scenes("train", 4, seed=1), Scenes("heldout", 4)]
    assert all(other.image(3).tobytes() != few.image(3).tobytes() for other in others)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_any_size_shows_the_same_scene(size):
    picture = Scenes("train", 1, size=size).image(0)
    assert picture.mode == "RGB" and picture.size == (size, size)
    difference = ImageChops.difference(picture.resize((16, 16)), Scenes("train", 1).image(0).resize((16, 16)))
    assert sum(value * number for value, number in enumerate(difference.convert("L").histogram())) / 256 < 12
