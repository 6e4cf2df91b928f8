"""What a spec leaves out of a set: small images, short captions, images that occur before. All is counted.

The set is read once, when it is opened; what was kept is remembered as long as the set stays the same. What cannot be
read is kept: whoever reads it then counts it as a bad item.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tinyclip.data.cache import digest, remembered
from tinyclip.data.decode import FORMATS, BadItem
from tinyclip.data.files import left_out_line
from tinyclip.data.flags import flags_of
from tinyclip.data.spec import DataSpec
from tinyclip.data.texts import WITHOUT_CAPTION, chosen

FILTERS_VERSION = 3
SHORT_CAPTIONS = "short captions of images that stay"
SMALL, SHORT, TWICE = "small images", "images with short captions only", "images that occur before"


class Readable(Protocol):
    """A source whose image files can be read, and that knows when it changed."""

    name: str

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def image(self, index: int) -> Image.Image: ...
    def encoded(self, index: int) -> bytes: ...
    def captions(self, index: int) -> Sequence[str]: ...
    def label(self, index: int) -> tuple[str, ...] | None: ...
    def version(self) -> str: ...


def asks_for_filters(spec: DataSpec) -> bool:
    return bool(spec.min_side or spec.min_caption_chars or spec.dedup)


class Filtered:
    """The items of a source that pass, in its order. Raises ValueError where none does."""

    def __init__(self, source: Readable, spec: DataSpec) -> None:
        self.source, self.name, self.min_chars = source, source.name, spec.min_caption_chars or 0
        filters = (self.min_chars, spec.min_side or 0, bool(spec.dedup))
        # captions depend on the whole spec
        name = digest("filters", FILTERS_VERSION, spec, source.version())
        found = remembered(name, lambda: _pass(source, *filters))
        self.kept = np.array(found["kept"], np.int64)
        self.left_out: dict[str, int] = {**getattr(source, "left_out", {}), **found["left_out"]}
        if not len(self.kept):
            raise ValueError(f"{self.name}: no images are left{left_out_line(found['left_out'])}")

    def __len__(self) -> int:
        return len(self.kept)

    def key(self, index: int) -> str:
        return self.source.key(int(self.kept[index]))

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.kept[index]))

    def encoded(self, index: int) -> bytes:
        return self.source.encoded(int(self.kept[index]))

    def captions(self, index: int) -> Sequence[str]:
        captions = self.source.captions(int(self.kept[index]))
        return chosen(captions, [len(text) >= self.min_chars for text in captions]) if self.min_chars else captions

    def label(self, index: int) -> tuple[str, ...] | None:
        return self.source.label(int(self.kept[index]))

    def flags(self, index: int) -> Mapping[str, Any]:
        return flags_of(self.source, int(self.kept[index]))

    @property
    def groups(self) -> np.ndarray | None:
        groups = getattr(self.source, "groups", None)
        return None if groups is None else np.searchsorted(self.kept, groups)

    @property
    def window(self) -> int:
        return getattr(self.source, "window", 1)

    def expect(self, groups: Sequence[int]) -> None:
        expect: Any = getattr(self.source, "expect", None)
        if expect is not None:
            expect(groups)


def _pass(source: Readable, min_chars: int, min_side: int, dedup: bool) -> dict[str, Any]:
    kept, left_out, seen = [], Counter(), set()
    for index in range(len(source)):
        lengths = _caption_lengths(source, index) if min_chars else None
        if lengths is not None and max(lengths, default=0) < min_chars:
            left_out[SHORT if lengths else WITHOUT_CAPTION] += 1
        elif reason := _reason(source, index, min_side, seen if dedup else None):
            left_out[reason] += 1
        else:
            kept.append(index)
            if num_short := sum(length < min_chars for length in lengths or ()):
                left_out[SHORT_CAPTIONS] += num_short
    return {"kept": kept, "left_out": dict(left_out)}


def _caption_lengths(source: Readable, index: int) -> list[int] | None:
    """Characters; None where the item cannot be read."""
    try:
        return [len(caption) for caption in source.captions(index)]
    except (BadItem, OSError):
        return None


def _reason(source: Readable, index: int, min_side: int, seen: set[bytes] | None) -> str | None:
    """Why the image is left out, or None."""
    try:
        data = source.encoded(index) if min_side or seen is not None else b""
    except (BadItem, OSError):
        return None
    if min_side and (side := _shorter_side(data)) is not None and side < min_side:
        return SMALL
    if seen is None or not data:
        return None
    sha256 = hashlib.sha256(data).digest()
    if sha256 in seen:
        return TWICE
    seen.add(sha256)
    return None


def _shorter_side(data: bytes) -> int | None:
    """Pixels, as the header says; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return min(image.size)
    except Exception:  # whatever a broken file makes Pillow raise
        return None
