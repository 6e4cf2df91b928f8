"""How a row is put into words: its captions, with the weights by which training draws them, and its label."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from random import Random
from typing import Any, Self

from tinyclip.data.decode import BadItem
from tinyclip.data.spec import DataSpec

NO_CAPTION = "no caption"  # why an item is bad
WITHOUT_CAPTION = "images without a caption"  # what is left out
NOTHING: Mapping[str, str] = {}
CAPTION_COLUMNS = ("captions", "caption", "txt", "title", "text")
FIELD = re.compile(r"\{([^{}]+)\}")


class Weighted(tuple[str, ...]):
    """Texts that are drawn by `weights`, one for each."""

    weights: tuple[float, ...]

    def __new__(cls, texts: Iterable[str], weights: Iterable[float]) -> Self:
        self = super().__new__(cls, texts)
        self.weights = tuple(weights)
        assert len(self.weights) == len(self), f"{len(self.weights)} weights of {len(self)} texts"
        return self

    def __getnewargs__(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        return tuple(self), self.weights


def draw(captions: Sequence[str], random: Random) -> int:
    """Which caption a visit shows: by weight, or each as likely."""
    if isinstance(captions, Weighted):
        return random.choices(range(len(captions)), captions.weights)[0]
    return random.randrange(len(captions))


def chosen(captions: Sequence[str], keep: Sequence[bool]) -> Sequence[str]:
    """Those to keep, with their weights."""
    kept = [text for text, stays in zip(captions, keep, strict=True) if stays]
    if isinstance(captions, Weighted):
        return Weighted(kept, (weight for weight, stays in zip(captions.weights, keep, strict=True) if stays))
    return tuple(kept)


def joined(captions: Iterable[Sequence[str]]) -> Sequence[str]:
    """The captions of several rows of one image."""
    parts = list(captions)
    texts = tuple(chain.from_iterable(parts))
    weights = [part.weights for part in parts if isinstance(part, Weighted)]
    return Weighted(texts, chain.from_iterable(weights)) if weights else texts


class Words:
    """What a spec says about captions and labels, checked against a set's columns. A column is a template too.

    Where the spec does not say, a row's captions are the first column of `order` that gives it any. Where columns were
    only seen in some rows, those that are `usual` come first, and those that were not seen last. `objects` are columns
    of neither texts nor lists of them, with their type.
    Raises ValueError for a column that is not there or gives no text, and where nothing says what a caption or a label
    is.
    """

    def __init__(
        self,
        spec: DataSpec,
        columns: Sequence[str],
        *,
        usual: Sequence[str] | None = None,
        order: Sequence[str] = CAPTION_COLUMNS,
        objects: Mapping[str, str] = NOTHING,
    ) -> None:
        self.sep = spec.sep
        self.templates = read_templates(spec.templates) if spec.templates is not None else None
        self.label_template = spec.label and as_template(spec.label)
        self.shares = parse_shares(spec.captions) if spec.captions is not None else ()
        self.sources = [] if spec.caption is None else [as_template(spec.caption)]  # templates that are asked in turn
        self._check(spec.name, columns, objects)
        if not self.sources and not self.shares and self.templates is None:
            found = [name for names in (usual or (), columns) for name in order if name in {*names} - objects.keys()]
            found += order if found and usual is not None else ()
            self.sources = [as_template(name) for name in dict.fromkeys(found)]
            if not found and spec.label is None:
                known = ", ".join(f"{name} ({objects[name]})" if name in objects else name for name in columns)
                raise ValueError(f"{spec.name}: no caption column {' or '.join(order)}; it has {known or 'none'}")
        self.columns = self._named()

    def _named(self) -> list[str]:
        """The columns of all templates."""
        templates = [*(template for template, _ in self.shares), *self.sources, self.label_template or ""]
        return list(dict.fromkeys(FIELD.findall("".join(templates))))

    def _check(self, path: str, columns: Sequence[str], objects: Mapping[str, str]) -> None:
        for column in self._named():
            if column not in columns:
                raise ValueError(f"{path}: no column {column!r}; it has {', '.join(columns) or 'none'}")
            if column in objects:
                raise ValueError(f"{path}: column {column!r}: expected texts or lists of them, got {objects[column]}")

    def captions(self, row: Mapping[str, Any]) -> Sequence[str]:
        if self.templates is not None:
            return _described(self.label(row) or (), self.templates)
        if self.sources:
            return next(filter(None, (texts(template, row, self.sep) for template in self.sources)), ())
        if len(self.shares) == 1:
            return texts(self.shares[0][0], row, self.sep)
        found = [(own, weight) for template, weight in self.shares if (own := texts(template, row, self.sep))]
        weights = chain.from_iterable([weight / len(own)] * len(own) for own, weight in found)
        return Weighted(chain.from_iterable(own for own, _ in found), weights)

    def label(self, row: Mapping[str, Any]) -> tuple[str, ...] | None:
        """A yes or no is a class too."""
        row = {name: str(value) if isinstance(value, bool) else value for name, value in row.items()}
        return texts(self.label_template, row, self.sep) or None


def as_template(text: str) -> str:
    """Raises ValueError for a brace without its other, and for no text."""
    if not text:
        raise ValueError("expected a column, or a template such as 'a photo of {name}', got nothing")
    if "{" not in text:
        return f"{{{text}}}"
    if "{" in (rest := FIELD.sub("", text)) or "}" in rest:
        raise ValueError(f"template {text!r}: expected columns as {{COLUMN}}, got a single brace")
    return text


def parse_shares(captions: str) -> tuple[tuple[str, float], ...]:
    """'original:0.3|synthetic:0.7' as templates with weights; without a number the weight is 1."""
    shares = []
    for part in captions.split("|"):
        name, _, number = part.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            name, weight = part, 1.0
        if not name or not (0 < weight < math.inf):
            raise ValueError(f"captions {captions!r}: expected COLUMN:WEIGHT|COLUMN:WEIGHT, got {part!r}")
        shares.append((as_template(name), weight))
    return tuple(shares)


def read_templates(templates: str) -> tuple[str, ...]:
    """Those of the list, or of the file. {} is the class name; {c} too, as CLIP_benchmark writes it."""
    if "{" in templates:
        lines = templates.split("|")
    else:
        try:
            lines = [line for line in Path(templates).read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"templates {templates}: not UTF-8: {error}") from None
    found = tuple(line.strip().replace("{c}", "{}") for line in lines)
    if wrong := [line for line in found if "{}" not in line]:
        raise ValueError(f"templates {templates}: expected {{}}, the class name, in each, got {wrong[0]!r}")
    if not found:
        raise ValueError(f"templates {templates}: expected at least one, the file is empty")
    return found


@lru_cache(maxsize=4096)
def _described(label: tuple[str, ...], templates: tuple[str, ...]) -> tuple[str, ...]:
    """Every template with every name of the class, one tuple for all its images."""
    return tuple(template.replace("{}", name) for name in label for template in templates)


def texts(template: str | None, row: Mapping[str, Any], sep: str | None) -> tuple[str, ...]:
    """The template filled with every combination of its columns' texts: a list cell, or one split at sep, has several.

    Empty texts are dropped, so an empty cell gives no text at all.
    """
    if template is None:
        return ()
    columns = _columns(template)
    if len(template) == len(columns[0]) + 2:  # a column and nothing else
        return tuple(_cell(row.get(columns[0]), sep))
    choices = [_cell(row.get(column), sep) for column in columns]
    fills = (dict(zip(columns, values, strict=True)) for values in product(*choices))
    return tuple(FIELD.sub(lambda match, fill=fill: fill[match[1]], template) for fill in fills)


@lru_cache(maxsize=4096)
def _columns(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(FIELD.findall(template)))


def _cell(value: Any, sep: str | None) -> list[str]:
    """The texts of a cell, or of a list and the lists inside it."""
    if value is None:
        return []
    if isinstance(value, str):
        parts = value.split(sep) if sep else (value,)
    elif isinstance(value, list | tuple):
        parts = map(_said, _flat(value))
    else:
        text = _said(value)
        parts = text.split(sep) if sep else (text,)
    return [text for part in parts if (text := part.strip())]


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    """What is in a list, and in the lists inside it, however deep."""
    waiting = [iter(values)]
    while waiting:
        for value in waiting[-1]:
            if isinstance(value, list | tuple):
                waiting.append(iter(value))
                break
            yield value
        else:
            waiting.pop()


def _said(value: Any) -> str:
    """A text, number, time or UTF-8 bytes as text; null, NaN, a yes or no, and objects say nothing.

    Raises BadItem for other bytes.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return as_text(value)
        except UnicodeDecodeError as error:
            raise BadItem(f"expected a text in UTF-8: {error}") from None
    if isinstance(value, bool) or (isinstance(value, float | Decimal) and not math.isfinite(value)):
        return ""
    return str(value) if isinstance(value, int | float | Decimal | date | time) else ""


def as_text(data: bytes) -> str:
    """UTF-8, with or without a byte order mark."""
    return data.decode().removeprefix("\ufeff")
