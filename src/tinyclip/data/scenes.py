"""The built-in generator: small captioned pictures of coloured shapes, for trying everything without a download.

A scene shows one or two *groups* of one to three equal objects: "a big red ring", "three small blue stars". One group
stands somewhere in the picture; two groups stand side by side or one above the other. Every picture has three
captions, all true of it. Picture i is a function of (seed, split, i) alone.

Of the 64 names (colour and shape), eight are *held out*: split "train" never shows them, and in split "heldout" one
group of every picture is of that kind. Split "classes" shows single objects, labelled with the 64 names in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from random import Random
from typing import Literal, NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, int, int]  # RGB
COLOURS: dict[str, Colour] = {
    "red": (224, 40, 44),
    "orange": (247, 134, 24),
    "yellow": (252, 214, 30),
    "green": (48, 160, 72),
    "blue": (38, 98, 224),
    "purple": (132, 62, 178),
    "pink": (252, 146, 192),
    "black": (42, 42, 48),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
Name = tuple[str, str]
NAMES: tuple[Name, ...] = tuple(product(COLOURS, SHAPES))
HELD_OUT = tuple(zip(COLOURS, SHAPES[3:] + SHAPES[:3], strict=True))  # every colour and every shape once
SEEN = tuple(name for name in NAMES if name not in HELD_OUT)
Split = Literal["train", "heldout", "classes"]

DIAMETERS = {"small": 0.22, "big": 0.39}  # of the picture's side
BANDS = (0.26, 0.5, 0.74)  # top, middle, bottom, and left, middle, right
TILTS = (-12, -6, 0, 6, 12)  # degrees; too little to take a square for a diamond
BACKGROUNDS: tuple[Colour, ...] = ((247, 241, 230), (228, 238, 247), (234, 244, 232), (245, 233, 240), (238, 238, 240))
SUPERSAMPLING = 4


class Group(NamedTuple):
    count: int
    size: Literal["small", "big"]
    colour: str
    shape: str

    def __str__(self) -> str:
        number = ("a", "two", "three")[self.count - 1]
        plural = "" if self.count == 1 else "es" if self.shape == "cross" else "s"
        return f"{number} {self.size} {self.colour} {self.shape}{plural}"


class Scene(NamedTuple):
    """Objects of a group lie along a line; `bands` says where each group's line is, from the left or the top.

    Two groups always take the bands 0 and 2. `along` is the place of a single object on its line.
    """

    groups: tuple[Group, ...]
    line: Literal["row", "column"]
    bands: tuple[int, ...]
    along: int = 1

    def captions(self) -> tuple[str, str, str]:
        first, last = self.groups[0], self.groups[-1]
        if len(self.groups) == 2 and self.line == "row":
            return f"{first} above {last}", f"{last} below {first}", f"{first} at the top and {last} at the bottom"
        if len(self.groups) == 2:
            return (
                f"{first} to the left of {last}",
                f"{last} to the right of {first}",
                f"{first} on the left and {last} on the right",
            )
        place = _place(self.along, self.bands[0]) if self.line == "row" else _place(self.bands[0], self.along)
        if first.count == 1:
            return f"{first} {place}", f"{place}, {first}", f"a picture of {first} {place}"
        return (
            f"{first} in a {self.line} {place}",
            f"a {self.line} of {first} {place}",
            f"{place}, a {self.line} of {first}",
        )

    def objects(self) -> list[tuple[Group, float, float]]:
        """Every object's group, and its centre as fractions of the picture's side, from the left and the top."""
        placed = []
        for group, band in zip(self.groups, self.bands, strict=True):
            for along in ((BANDS[self.along],), (0.26, 0.74), (0.2, 0.5, 0.8))[group.count - 1]:
                across = BANDS[band]
                placed.append((group, along, across) if self.line == "row" else (group, across, along))
        return placed


def _place(column: int, row: int) -> str:
    horizontal, vertical = ("left", "", "right")[column], ("top", "", "bottom")[row]
    if horizontal and vertical:
        return f"in the {vertical} {horizontal} corner"
    if horizontal:
        return f"on the {horizontal}"
    return f"at the {vertical}" if vertical else "in the middle"


class Scenes:
    """The generator as a data source."""

    def __init__(self, split: Split, count: int, seed: int = 0, size: int = 64) -> None:
        self.name = f"scenes {split}"
        self._split, self._count, self._seed, self._size = split, count, seed, size

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        return f"{self._split}-{index:06d}"

    def image(self, index: int) -> Image.Image:
        """RGB, size x size."""
        return paint(self.scene(index), self._size, self._random(index, "paint"))

    def captions(self, index: int) -> tuple[str, str, str]:
        return self.scene(index).captions()

    def label(self, index: int) -> tuple[str, ...] | None:
        return (" ".join(NAMES[index % len(NAMES)]),) if self._split == "classes" else None

    def scene(self, index: int) -> Scene:
        random = self._random(index, "scene")
        if self._split == "train":
            return _draw(random, random.choice(SEEN), SEEN)
        if self._split == "heldout":
            return _draw(random, random.choice(HELD_OUT), NAMES)
        return _one_object(random, NAMES[index % len(NAMES)])

    def _random(self, index: int, purpose: str) -> Random:
        return Random(f"{self._seed}/{self._split}/{index}/{purpose}")


def _draw(random: Random, name: Name, others: Sequence[Name]) -> Scene:
    """A scene with `name` in it, and perhaps one of the others. One in four has a single group."""
    kind = random.random()
    if kind < 0.15:
        return _one_object(random, name)
    line = random.choice(("row", "column"))
    if kind < 0.25:
        return Scene((_group(random, name, random.choice((2, 3))),), line, (random.randrange(3),))
    other = random.choice([other for other in others if other != name])
    groups = [_group(random, name, random.choice((1, 1, 2, 3))) for name in (name, other)]
    random.shuffle(groups)
    return Scene(tuple(groups), line, (0, 2))


def _one_object(random: Random, name: Name) -> Scene:
    return Scene((_group(random, name, 1),), "row", (random.randrange(3),), along=random.randrange(3))


def _group(random: Random, name: Name, count: int) -> Group:
    return Group(count, "small" if count == 3 else random.choice(("small", "big")), *name)


# Painting: a shaded background, then per object three stamps: a shadow, the body, a highlight.


def paint(scene: Scene, size: int, random: Random) -> Image.Image:
    """RGB, size x size, anti-aliased. Place, tilt and shade of each object vary a little."""
    light = random.choice(BACKGROUNDS)
    picture = Image.new("RGB", (size, size), _shade(light, 0.86))
    picture.paste(light, (0, 0), random.choice(_gradients(size)))
    for group, x, y in scene.objects():
        diameter = round(size * DIAMETERS[group.size] * random.uniform(0.95, 1.05))
        stamp = _stamp(group.shape, diameter, random.choice(TILTS))
        half = stamp.body.width // 2
        left, top = (round(size * (centre + random.uniform(-0.025, 0.025))) - half for centre in (x, y))
        colour = _shade(COLOURS[group.colour], random.uniform(0.94, 1.06))
        picture.paste((0, 0, 0), (left, top), stamp.shadow)
        picture.paste(colour, (left, top), stamp.body)
        picture.paste((255, 255, 255), (left, top), stamp.highlight)
    return picture


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(factor * value)) for value in colour)
    return red, green, blue


@lru_cache(maxsize=8)
def _gradients(size: int) -> list[Image.Image]:
    """Four linear ones and a radial one, light in the middle."""
    linear = Image.linear_gradient("L").resize((size, size))
    radial = ImageChops.invert(Image.radial_gradient("L").resize((size, size)))
    return [linear.rotate(angle) for angle in (0, 90, 180, 270)] + [radial]


class Stamp(NamedTuple):
    """Three square masks (mode L) of the same size, centred on the object."""

    shadow: Image.Image
    body: Image.Image
    highlight: Image.Image


@lru_cache(maxsize=4096)
def _stamp(shape: str, diameter: int, tilt: int) -> Stamp:
    side = 2 * math.ceil(0.7 * diameter)  # room for tilted corners and the shadow
    fine = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    pen = ImageDraw.Draw(fine)
    for points, fill in _OUTLINES[shape]:
        pen.polygon(_to_pixels(points, fine.width / 2, diameter / 2 * SUPERSAMPLING, tilt), fill=fill)
    body = fine.reduce(SUPERSAMPLING)
    blurred = body.filter(ImageFilter.GaussianBlur(diameter / 16))
    shadow = ImageChops.offset(blurred, 0, max(1, diameter // 14)).point(lambda value: 0.35 * value)
    light = ImageChops.invert(Image.linear_gradient("L").resize((side, side)))
    highlight = ImageChops.multiply(body, light).point(lambda value: 0.3 * value)
    return Stamp(shadow, body, highlight)


Points = list[tuple[float, float]]


def _to_pixels(points: Points, centre: float, radius: float, tilt: int) -> Points:
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    return [(centre + radius * (x * cos - y * sin), centre + radius * (x * sin + y * cos)) for x, y in points]


def _curve(point: Callable[[float], tuple[float, float]], steps: int) -> Points:
    """The closed curve of point(angle), angles in radians from 0 to 2 pi."""
    return [point(2 * math.pi * step / steps) for step in range(steps)]


def _disc(radius: float, x: float = 0, y: float = 0) -> Points:
    return _curve(lambda a: (x + radius * math.cos(a), y + radius * math.sin(a)), 64)


def _heart(a: float) -> tuple[float, float]:
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return math.sin(a) ** 3, -(y + 2) / 15.5


def _cross(arm: float, half: float) -> Points:
    corner = [(half, -arm), (half, -half), (arm, -half), (arm, half), (half, half), (half, arm)]
    return corner + [(-x, -y) for x, y in corner]


def _star(points: int, inner: float) -> Points:
    tips = _curve(lambda a: (math.sin(a), -math.cos(a)), 2 * points)
    return [(x, y) if step % 2 == 0 else (inner * x, inner * y) for step, (x, y) in enumerate(tips)]


# Polygons in the square from (-1, -1), top left, to (1, 1); 255 adds, 0 cuts out. Areas are alike.
_OUTLINES: dict[str, list[tuple[Points, int]]] = {
    "circle": [(_disc(0.92), 255)],
    "square": [([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)], 255)],
    "triangle": [([(0, -0.98), (1.04, 0.82), (-1.04, 0.82)], 255)],
    "star": [([(1.12 * x, 1.12 * y + 0.06) for x, y in _star(5, 0.46)], 255)],
    "heart": [(_curve(_heart, 64), 255)],
    "ring": [(_disc(0.98), 255), (_disc(0.52), 0)],
    "cross": [(_cross(1.0, 0.36), 255)],
    "moon": [(_disc(1.0), 255), (_disc(0.86, 0.5, -0.16), 0)],
}
