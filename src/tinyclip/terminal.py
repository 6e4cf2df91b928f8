"""What is printed: without secrets, and no name or text of others can act on the terminal or be read as markup.

Text of others is what models, data, runs, libraries and servers say: every str here. Only a rich Text is ours.
"""

from __future__ import annotations

import sys
from typing import Any

from rich import table
from rich.console import Console
from rich.text import Text

from tinyclip.redact import redacted, visible


def line(text: object) -> str:
    """One line of text for a terminal or a log."""
    return visible(redacted(str(text)))


def say(text: object) -> None:
    """A line on stderr."""
    print(line(text), file=sys.stderr, flush=True)


def console(**settings: Any) -> Console:
    """A rich console that reads no markup."""
    return Console(markup=False, emoji=False, highlight=False, **settings)


def show(*parts: Table | str, least_width: int = 0) -> None:
    """Tables and sentences on stdout; `least_width` columns, where fewer would lose digits."""
    target = console()
    if target.width < least_width:
        target = console(width=least_width)
    for part in parts:
        target.print(line(part) if isinstance(part, str) else part)


class Table(table.Table):
    """rich's, whose str cells, names and titles are shown as they are, in one line."""

    def __init__(self, *headers: str, title: str | None = None, **settings: Any):
        super().__init__(*headers, title=None if title is None else _shown(title), **settings)

    def add_row(self, *cells: str | Text | None, **settings: Any) -> None:  # type: ignore[override]
        super().add_row(*map(_shown, cells), **settings)


def _shown(cell: str | Text | None) -> Text | None:
    return Text(line(cell)) if isinstance(cell, str) else cell
