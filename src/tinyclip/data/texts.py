"""How a row is put into words: its captions, with the weights by which training draws them, and its label."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from random import Random
from typing import Any, Self

from tinyclip.data.spec import DataSpec

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

    Where the spec does not say, captions are a column that is `usual`, if there is one; by default all are.
    Raises ValueError for a column that is not there, and where nothing says what a caption or a label is.
    """

    def __init__(self, spec: DataSpec, columns: Sequence[str], usual: Sequence[str] = ()) -> None:
        self.sep = spec.sep
        self.templates = read_templates(spec.templates) if spec.templates is not None else None
        self.shares = self._shares(spec, columns, usual)
        self.label_template = spec.label and as_template(spec.label)
        known = f"it has {', '.join(columns) or 'none'}"
        if not self.shares and spec.label is None:
            raise ValueError(f"{spec.path}: no caption column {' or '.join(CAPTION_COLUMNS)}; {known}")
        for column in self.columns:
            if column not in columns:
                raise ValueError(f"{spec.path}: no column {column!r}; {known}")

    @staticmethod
    def _shares(spec: DataSpec, columns: Sequence[str], usual: Sequence[str]) -> tuple[tuple[str, float], ...]:
        """Templates of captions, each with its weight."""
        if spec.templates is not None:
            return ()
        if spec.captions is not None:
            return parse_shares(spec.captions)
        known = (name for names in (usual, columns) for name in CAPTION_COLUMNS if name in names)
        caption = spec.caption or next(known, None)
        return () if caption is None else ((as_template(caption), 1.0),)

    @property
    def columns(self) -> list[str]:
        """Those that the templates name, each once."""
        templates = [*(template for template, _ in self.shares), self.label_template or ""]
        return list(dict.fromkeys(FIELD.findall("".join(templates))))

    def captions(self, row: Mapping[str, Any]) -> Sequence[str]:
        if self.templates is not None:
            return _described(texts(self.label_template, row, self.sep), self.templates)
        if len(self.shares) == 1:
            return texts(self.shares[0][0], row, self.sep)
        found = [(own, weight) for template, weight in self.shares if (own := texts(template, row, self.sep))]
        weights = chain.from_iterable([weight / len(own)] * len(own) for own, weight in found)
        return Weighted(chain.from_iterable(own for own, _ in found), weights)

    def label(self, row: Mapping[str, Any]) -> tuple[str, ...] | None:
        return texts(self.label_template, row, self.sep) or None


def as_template(text: str) -> str:
    """Raises ValueError for a brace without its other."""
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
    columns = list(dict.fromkeys(FIELD.findall(template)))
    choices = [_cell(row.get(column), sep) for column in columns]
    fills = (dict(zip(columns, values, strict=True)) for values in product(*choices))
    return tuple(FIELD.sub(lambda match, fill=fill: fill[match[1]], template) for fill in fills)


def _cell(value: Any, sep: str | None) -> list[str]:
    parts = value if isinstance(value, list) else [] if value is None else str(value).split(sep) if sep else [value]
    return [text for part in parts if (text := str(part).strip())]
