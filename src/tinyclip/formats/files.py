"""What every format does with files: JSON that was expected, and directories that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError for anything but a JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file, found none")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


UNION_TAGS = ("vit", "resnet")  # of CLIPConfig.image, which pydantic puts between the field and its own fields


def write_json(path: Path, settings: Any) -> None:
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def validated(kind: type[M], settings: Any, where: str) -> M:
    """A pydantic value, or a ValueError of one line that names the first field at fault."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part not in UNION_TAGS) or "the whole"
        raise ValueError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}") from None


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`; it takes its place, synced, when the block ends, and vanishes if it fails."""
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in [*unfinished.iterdir(), unfinished]:
            _sync(path)
        _replace(directory, unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _replace(directory: Path, finished: Path) -> None:
    """Put the finished directory in its place. No rename replaces a full directory, so the old one steps aside."""
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        directory.rename(old)
    finished.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file or a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
