"""Fields beside image and caption that speak of consent or safety; `tinyclip data check` counts what they hold.

A field is one if its name holds opt out, noai, noimageai, robots, nsfw or unsafe: opt_out, X-Robots-Tag, punsafe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

NAME = re.compile(r"opt.?out|no.?(image)?.?ai(?![a-z])|robots|nsfw|unsafe", re.IGNORECASE)


def is_flag(field: str) -> bool:
    return NAME.search(field) is not None


def flags_of(source: object, index: int) -> Mapping[str, Any]:
    """Of an item; none where the source has no `flags`."""
    flags: Callable[[int], Mapping[str, Any]] | None = getattr(source, "flags", None)
    return {} if flags is None else flags(index)


def flags_in(row: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a row that are flags and say something."""
    return {field: value for field, value in row.items() if is_flag(field) and not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return value in (None, "") or value != value  # NaN
