"""Rewrite the generated parts of the pages beside this file, so that they say what the code says.

    python docs/generate.py

A generated part stands between `<!-- generated: KIND ARGUMENTS -->` and `<!-- end -->`; KIND is a name in `PARTS`.
tests/test_docs.py checks that all are current.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tinyclip.data.spec import KEYS
from tinyclip.recipes import PRESETS
from tinyclip.shrink.inherit import layer_map

PART = re.compile(r"(<!-- generated: (\w+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def fields(where: str) -> Iterator[str]:
    """A table of a settings class, named as module.Class."""
    module, _, name = where.rpartition(".")
    yield from _table("field", "type", "default", "what")
    for field, info in getattr(import_module(module), name).model_fields.items():
        yield _row(f"`{field}`", _type(info.annotation) + _bounds(info), _default(info), info.description or "")


def presets() -> Iterator[str]:
    yield from _table("preset", "what")
    for name, preset in PRESETS.items():
        yield _row(f"`{name}`", (inspect.getdoc(preset) or "").splitlines()[0])


def keys() -> Iterator[str]:
    """Which keys of a data spec go with which kind of data."""
    yield from _table("kind", "keys beside the path")
    for kind, names in KEYS.items():
        yield _row(kind, ", ".join(f"`{name}`" for name in names))


def maps() -> Iterator[str]:
    yield from _table("layers", "`even`", "`leading`", "`official`")
    for before, after in ((12, 9), (12, 6), (9, 6), (6, 3)):
        choices = (layer_map(choice, after, before) for choice in ("even", "leading", "official"))
        yield _row(f"{before} to {after}", *(" ".join(map(str, layers)) for layers in choices))


PARTS = {part.__name__: part for part in (fields, presets, keys, maps)}


def rewrite(page: str) -> str:
    """The page with its generated parts made anew."""

    def part(match: re.Match[str]) -> str:
        return match[1] + "\n".join(PARTS[match[2]](*match[3].split())) + "\n" + match[4]

    return PART.sub(part, page)


def _table(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*("---" for _ in names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_type, arguments))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    return "null" if annotation is type(None) else annotation.__name__


def _bounds(info: FieldInfo) -> str:
    """` > 0`, from the constraints of a field."""
    found = (
        text.format(getattr(constraint, name))
        for constraint in info.metadata
        for name, text in BOUNDS.items()
        if getattr(constraint, name, None) is not None
    )
    return "".join(f", {bound}" for bound in found)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if isinstance(info.default, BaseModel):
        return "its defaults"
    if isinstance(info.default, tuple) and len(info.default) > 3:
        return f"{len(info.default)} of them"
    if isinstance(info.default, tuple):
        return ", ".join(map(str, info.default)) or "none"
    return "null" if info.default is None else f"{info.default}"


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.md")):
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
