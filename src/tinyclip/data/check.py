"""What is in a data set, before anything is trained on it: pairs, sizes, caption lengths, duplicates, what is broken.

Every item is read once, as training reads it. Images are duplicates where size and pixels are the same, whatever their
files. What the data's opt-out and safety fields hold (flags.py) is counted, and nothing is concluded from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field

from tinyclip.config import MAX_WORKERS, Config
from tinyclip.data.decode import BadItem
from tinyclip.data.flags import flags_of
from tinyclip.data.loader import in_order
from tinyclip.data.sources import Source, left_out
from tinyclip.preprocess import MAX_ASPECT, to_pixels
from tinyclip.redact import redacted
from tinyclip.tokenizer import Tokenizer

BLOCK = 64  # items that a worker reads at a time
NUM_NAMED = 5  # broken items, groups of duplicates, and values of a flag that are named
MAX_VALUE = 40  # characters of a flag's value


class Checking(Config):
    limit: int | None = Field(default=None, gt=0, description="the first so many items")
    workers: int = Field(default=0, ge=0, le=MAX_WORKERS, description="processes that read")


class Spread(NamedTuple):
    """How numbers are distributed; p5 and p95 are percentiles."""

    least: float
    p5: float
    median: float
    mean: float
    p95: float
    most: float


class Same(NamedTuple):
    """Images that are the same."""

    images: int
    keys: list[str]  # of the first


@dataclass(frozen=True)
class Seen:
    """What is kept of an item. Of a broken one only the key and the reason."""

    key: str
    broken: str | None = None
    format: str = ""
    mode: str = ""  # that the file has
    is_turned: bool = False  # by its EXIF
    size: tuple[int, int] = (0, 0)  # width, height
    pixels: bytes = b""  # digest
    captions: tuple[bytes, ...] = ()  # digests
    tokens: tuple[int, ...] = ()  # of each caption, with start and end, uncut
    label: tuple[str, ...] | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Counts; sizes are in pixels, lengths in tokens with start and end."""

    data: str
    items: int  # that the set holds
    seen: int  # of them
    left_out: dict[str, int]  # by the source itself, by reason
    images: int  # that can be read
    pairs: int  # their captions
    without_caption: int  # images
    classes: int  # different labels
    formats: dict[str, int]
    modes: dict[str, int]  # Pillow's names of what the files hold; RGB is made of all
    turned: int  # images that their EXIF orientation turns
    width: Spread | None
    height: Spread | None
    shortest_side: Spread | None
    lines: int  # images more than MAX_ASPECT times as long as wide, which evaluation leaves out
    captions_per_image: Spread | None
    caption_tokens: Spread | None
    context_length: int
    cut_captions: int  # longer than the context
    different_captions: int
    duplicates: int  # images that are the same as an earlier one
    duplicate_groups: list[Same]  # the largest
    broken: int
    broken_reasons: dict[str, int]  # numbers in a reason stand as N
    broken_items: list[tuple[str, str]]  # key and reason of the first
    flags: dict[str, dict[str, Any]]


def check(
    source: Source,
    tokenizer: Tokenizer,
    settings: Checking | None = None,
    *,
    progress: Callable[[int], None] = lambda items: None,
) -> Report:
    """Reads the set. `progress` is told how many items more have been read."""
    settings = settings or Checking()
    num_items = min(len(source), settings.limit or len(source))
    look = _Look(source, tokenizer, num_items)
    seen: list[Seen] = []
    for block in in_order(look, range(0, num_items, BLOCK), settings.workers):
        seen += block
        progress(len(block))
    return summary(source, seen, tokenizer.context_length)


class _Look:
    """The items start to start + BLOCK - 1."""

    def __init__(self, source: Source, tokenizer: Tokenizer, num_items: int) -> None:
        self.source, self.tokenizer, self.num_items = source, tokenizer, num_items

    def __call__(self, start: int) -> list[Seen]:
        return [self._item(index) for index in range(start, min(start + BLOCK, self.num_items))]

    def _item(self, index: int) -> Seen:
        key = self.source.key(index)
        try:
            captions = self.source.captions(index)
            image = self.source.image(index)
            return Seen(
                key=key,
                format=image.format or "drawn",
                mode=image.info.get("mode", image.mode),
                is_turned=image.info.get("turned", False),
                size=image.size,
                pixels=digest_of(image),
                captions=tuple(
                    blake2b(caption.encode(errors="replace"), digest_size=8).digest() for caption in captions
                ),
                tokens=tuple(self.tokenizer.lengths(captions)),
                label=self.source.label(index),
                flags=flags_of(self.source, index),
            )
        except BadItem as error:
            return Seen(key, broken=str(error))


def digest_of(image: Image.Image) -> bytes:
    """Of the RGB pixels and the size."""
    pixels = to_pixels(image).contiguous().numpy().data
    return blake2b(pixels, digest_size=16, person=b"%dx%d" % image.size).digest()


def digest_of_text(text: str) -> bytes:
    return blake2b(text.encode(errors="replace"), digest_size=8).digest()


def summary(source: Source, seen: Sequence[Seen], context_length: int) -> Report:
    good = [item for item in seen if item.broken is None]
    broken = [(item.key, item.broken) for item in seen if item.broken is not None]
    tokens = [length for item in good for length in item.tokens]
    same = _same_pixels(good)
    return Report(
        data=source.name,
        items=len(source),
        seen=len(seen),
        left_out=left_out(source),
        images=len(good),
        pairs=len(tokens),
        without_caption=sum(not item.captions for item in good),
        classes=len({item.label for item in good} - {None}),
        formats=_most_common(item.format for item in good),
        modes=_most_common(item.mode for item in good),
        turned=sum(item.is_turned for item in good),
        width=spread([item.size[0] for item in good]),
        height=spread([item.size[1] for item in good]),
        shortest_side=spread([min(item.size) for item in good]),
        lines=sum(max(item.size) > MAX_ASPECT * min(item.size) for item in good),
        captions_per_image=spread([len(item.captions) for item in good]),
        caption_tokens=spread(tokens),
        context_length=context_length,
        cut_captions=sum(length > context_length for length in tokens),
        different_captions=len({digest for item in good for digest in item.captions}),
        duplicates=sum(group.images - 1 for group in same),
        duplicate_groups=same[:NUM_NAMED],
        broken=len(broken),
        broken_reasons=_most_common(re.sub(r"\d+", "N", reason) for _, reason in broken),
        broken_items=broken[:NUM_NAMED],
        flags={name: flag_values(values) for name, values in _by_flag(good).items()},
    )


def spread(numbers: Sequence[float]) -> Spread | None:
    if not numbers:
        return None
    p5, median, p95 = np.percentile(numbers, (5, 50, 95)).tolist()
    return Spread(min(numbers), p5, median, sum(numbers) / len(numbers), p95, max(numbers))


def _same_pixels(good: Sequence[Seen]) -> list[Same]:
    """The largest group first."""
    by_pixels: dict[bytes, list[str]] = {}
    for item in good:
        by_pixels.setdefault(item.pixels, []).append(item.key)
    groups = [Same(len(keys), keys[:NUM_NAMED]) for keys in by_pixels.values() if len(keys) > 1]
    return sorted(groups, key=lambda group: -group.images)


def _by_flag(good: Sequence[Seen]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for item in good:
        for name, value in item.flags.items():
            found.setdefault(name, []).append(value)
    return found


def flag_values(values: Sequence[Any]) -> dict[str, Any]:
    """How many items have a flag, and what it says: the spread of many numbers, else the most frequent values."""
    counts = _most_common(str(value)[:MAX_VALUE] for value in values)
    said: dict[str, Any] = {"n": len(values), "different": len(counts)}
    if len(counts) > NUM_NAMED:
        with suppress(TypeError, ValueError):
            return said | {"spread": spread([float(value) for value in values])}
    return said | {"values": dict(list(counts.items())[:NUM_NAMED])}


def _most_common(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def to_json(report: Report) -> dict[str, Any]:
    return redacted({name: _named(value) for name, value in asdict(report).items()})


def _named(value: Any) -> Any:
    """Named tuples with their names."""
    if isinstance(value, Spread | Same):
        return value._asdict()
    if isinstance(value, dict):
        return {name: _named(part) for name, part in value.items()}
    return [_named(part) for part in value] if isinstance(value, list) else value


def rows(report: Report) -> list[tuple[str, str]]:
    """The report as a table of two columns."""
    share_cut = report.cut_captions / report.pairs if report.pairs else 0.0
    found = [
        ("items", f"{report.items:,}" + ("" if report.seen == report.items else f", the first {report.seen:,} read")),
        ("images", f"{report.images:,} ({_counts(report.formats)})" if report.images else "none"),
        ("colour modes", _counts(report.modes) or "none"),
        ("turned as their EXIF says", f"{report.turned:,}"),
        ("broken", f"{report.broken:,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in list(report.broken_reasons.items())[:NUM_NAMED]),
        *(("  for instance", f"{key}: {reason}") for key, reason in report.broken_items),
        *((f"left out: {reason}", f"{count:,}") for reason, count in report.left_out.items()),
        ("width, px", _spread(report.width)),
        ("height, px", _spread(report.height)),
        ("shortest side, px", _spread(report.shortest_side)),
        (f"over {MAX_ASPECT} times as long as wide", f"{report.lines:,}"),
        ("same pixels as an earlier image", f"{report.duplicates:,}"),
        *((f"  {group.images} alike", ", ".join(group.keys[:2])) for group in report.duplicate_groups),
        ("pairs", f"{report.pairs:,}, {report.different_captions:,} different captions"),
        ("captions an image", _spread(report.captions_per_image)),
        ("images without a caption", f"{report.without_caption:,}"),
        ("caption length, tokens", _spread(report.caption_tokens)),
        (f"cut at {report.context_length} tokens", f"{report.cut_captions:,} ({share_cut:.1%})"),
        ("classes", f"{report.classes:,}"),
        *((f"field {name}", _flag(said)) for name, said in report.flags.items()),
    ]
    return found


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _spread(found: Spread | None) -> str:
    if found is None:
        return "none"
    if found.least == found.most:
        return f"{found.least:g}"
    return f"{found.least:g} to {found.most:g}, median {found.median:g}, 90 % from {found.p5:.0f} to {found.p95:.0f}"


def _flag(said: Mapping[str, Any]) -> str:
    if "spread" in said:
        return f"{said['n']:,} items: {_spread(said['spread'])}"
    more = f" and {said['different'] - NUM_NAMED:,} more" if said["different"] > NUM_NAMED else ""
    return f"{said['n']:,} items: {_counts(said['values'])}{more}"
