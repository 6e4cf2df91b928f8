"""A sheet of pictures with their captions, to look at a data set with one's own eyes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from tinyclip.data.decode import BadItem, to_rgb
from tinyclip.data.sources import Source

NUM_PICTURES = 48
COLUMNS = 8
SIDE, GAP = 208, 16  # px: of a picture's frame, and between frames
TEXT_PX, LINE_PX, NUM_LINES = 14, 18, 3
TITLE_PX = 20
PAPER, FRAME, INK = "white", (238, 238, 240), (32, 32, 36)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Card(NamedTuple):
    picture: Image.Image  # RGB, at most SIDE on a side
    text: str


def contact_sheet(source: Source, path: Path, *, num_items: int | None = None, seed: int = 0) -> None:
    """Write up to NUM_PICTURES readable pictures, drawn at random from the first `num_items`, as WebP or PNG."""
    num_items = num_items or len(source)
    cards = draw_cards(source, num_items, Random(seed))
    sheet(cards, f"{source.name}: {len(cards)} of {num_items:,} images, drawn at random").save(path, quality=85)


def draw_cards(source: Source, num_items: int, random: Random) -> list[Card]:
    """In the set's order. Items that cannot be read are passed over, at most as many as are shown."""
    indices = random.sample(range(num_items), min(num_items, 2 * NUM_PICTURES))
    found: dict[int, Card] = {}
    for index in indices:
        try:
            captions = source.captions(index) or source.label(index) or ("no caption",)
            picture = to_rgb(source.image(index))
        except BadItem:
            continue
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        found[index] = Card(picture, random.choice(captions))
        if len(found) == NUM_PICTURES:
            break
    return [found[index] for index in sorted(found)]


def sheet(cards: Sequence[Card], title: str) -> Image.Image:
    """COLUMNS pictures a row, each in a frame of the same size with its caption below."""
    cell_height = SIDE + GAP // 2 + NUM_LINES * LINE_PX + GAP
    top = GAP + TITLE_PX + GAP
    num_rows = -(-len(cards) // COLUMNS)
    paper = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), top + num_rows * cell_height), PAPER)
    pen, title_font, font = ImageDraw.Draw(paper), _font(TITLE_PX), _font(TEXT_PX)
    pen.text((GAP, GAP), fitted(title, title_font, paper.width - 2 * GAP, 1)[0], INK, title_font)
    for number, card in enumerate(cards):
        row, column = divmod(number, COLUMNS)
        left, upper = GAP + column * (SIDE + GAP), top + row * cell_height
        paper.paste(ImageOps.pad(card.picture, (SIDE, SIDE), color=FRAME), (left, upper))
        for line, text in enumerate(fitted(card.text, font, SIDE, NUM_LINES)):
            pen.text((left, upper + SIDE + GAP // 2 + line * LINE_PX), text, INK, font)
    return paper


def fitted(text: str, font: Font, width: int, num_lines: int) -> list[str]:
    """The text in lines of at most `width` px, broken between words where possible; an ellipsis where it is cut."""
    lines, words = [""], [part for word in text.split() for part in _parts(word, font, width)]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > num_lines:
        last = lines[num_lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1].rstrip()
        lines = [*lines[: num_lines - 1], last + "..."]
    return lines


def _parts(word: str, font: Font, width: int) -> Iterator[str]:
    """A word wider than a line in pieces that are not."""
    while font.getlength(word) > width:
        end = next(end for end in range(len(word), 0, -1) if end == 1 or font.getlength(word[:end]) <= width)
        yield word[:end]
        word = word[end:]
    yield word


def _font(px: int) -> Font:
    return ImageFont.load_default(px)
