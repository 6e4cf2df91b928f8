"""Several files in one path: braces as in a shell, and lists joined by `::`, as webdataset has them.

A name that exists is no pattern, nor are leading folders that do. Backslashes mean nothing: paths of Windows have them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from string import ascii_lowercase, ascii_uppercase

from tinyclip.data.spec import is_remote, joined_paths

MAX_FILES = 1_000_000
MAX_NESTED = 20
ALPHABET = ascii_uppercase + ascii_lowercase
NUMBERS = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d{1,18}))?")


def paths_of(path: str) -> list[str]:
    """The paths that a spec's path stands for, in order.

    Raises ValueError, one line, for braces that do not match, more than MAX_FILES paths, a path that comes twice, and
    braces that hold the scheme of a URL.
    """
    try:
        found = [own for part in joined_paths(path) for own in _expanded_part(part)]
        _check_number(len(found))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if len(found) != len(set(found)):
        twice = next(own for own, count in Counter(found).items() if count > 1)
        raise ValueError(f"{path}: {twice} is named twice; to see it more often, give it a weight in a mixture")
    return found


def _expanded_part(part: str) -> list[str]:
    if is_remote(part):
        return expanded(part)
    start = _start_of_pattern(part)
    found = [part[:start] + own for own in expanded(part[start:])]
    if any(map(is_remote, found)):
        raise ValueError("expected pipe: or the scheme of a URL before the braces, not in them")
    return found


def _start_of_pattern(path: str) -> int:
    """Behind what exists by name: the whole path, or its leading folders."""
    if "{" not in path or os.path.exists(path):
        return len(path)
    start = path.rfind("/", 0, path.index("{")) + 1
    while (end := path.find("/", start)) >= 0 and os.path.isdir(path[:end]):
        start = end + 1
    return start


def expanded(pattern: str, depth: int = 0) -> list[str]:
    """As a shell expands braces: {a,b}, {08..11}, {0..9..3}, {a..e}, nested; other braces stay.

    Raises ValueError for a brace without its other, more than MAX_FILES results, and braces nested beyond MAX_NESTED.
    """
    if depth > MAX_NESTED:
        raise ValueError(f"expected at most {MAX_NESTED} braces inside each other")
    found = [""]
    for text, is_inside in _pieces(pattern):
        options = _options(text, depth) if is_inside else [text]
        _check_number(len(found) * len(options))
        found = [before + own for before in found for own in options]
    return found


def _check_number(number: int) -> None:
    if number > MAX_FILES:
        raise ValueError(f"expected at most {MAX_FILES:,} files, the pattern stands for more")


def _pieces(pattern: str) -> Iterator[tuple[str, bool]]:
    """Texts between outer braces, and inside them."""
    depth = start = 0
    for match in re.finditer(r"[{}]", pattern):
        outside = depth == 0
        depth += 1 if match[0] == "{" else -1
        if depth < 0:
            break
        if outside or depth == 0:
            yield pattern[start : match.start()], not outside
            start = match.end()
    if depth:
        raise ValueError("expected a } for each {")
    yield pattern[start:], False


def _options(inside: str, depth: int) -> list[str]:
    """What a pair of braces stands for."""
    if numbers := NUMBERS.fullmatch(inside):
        return _range(*numbers.groups())
    if letters := LETTERS.fullmatch(inside):
        first, last = map(ALPHABET.index, letters.groups()[:2])
        return [ALPHABET[own] for own in _steps(first, last, letters[3])]
    alternatives = _alternatives(inside)
    if len(alternatives) == 1:
        return [f"{{{own}}}" for own in expanded(inside, depth + 1)]
    found: list[str] = []
    for alternative in alternatives:
        found += expanded(alternative, depth + 1)
        _check_number(len(found))
    return found


def _range(first: str, last: str, step: str | None) -> list[str]:
    """Padded to one width where one of the ends starts with a zero."""
    is_padded = any(re.match(r"-?0\d", end) for end in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    return [f"{number:0{width}}" for number in _steps(int(first), int(last), step)]


def _steps(first: int, last: int, step: str | None) -> range:
    by = max(int(step or 1), 1)
    _check_number(abs(last - first) // by + 1)
    return range(first, last + 1, by) if first <= last else range(first, last - 1, -by)


def _alternatives(inside: str) -> list[str]:
    """Split at the commas that stand in no inner braces."""
    depth, start, found = 0, 0, []
    for match in re.finditer(r"[{},]", inside):
        if match[0] == "," and depth == 0:
            found.append(inside[start : match.start()])
            start = match.end()
        depth += {"{": 1, "}": -1, ",": 0}[match[0]]
    return [*found, inside[start:]]
