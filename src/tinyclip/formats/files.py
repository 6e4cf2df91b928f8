"""What every format does with files: JSON that was expected, and files and directories that are whole or not there.

A process may be killed at any call here: what it wrote under another name is cleared away by the next one that writes
in the same place.
"""

from __future__ import annotations

import errno
import json
import os
import re
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


NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the system allows",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where the disk has no room for what the block writes, the OSError names `path`, whoever raised it."""
    try:
        yield
    except Exception as error:
        reason = NO_ROOM.get(_errno(error))
        if reason is None:
            raise
        raise OSError(_errno(error), f"not written, {reason}; what was there before is intact", str(path)) from error


def _errno(error: Exception) -> int:
    """Of an OSError, or of what libraries in Rust (safetensors, tokenizers) raise in its place; 0 of any other."""
    if isinstance(error, OSError):
        return error.errno or 0
    said = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))
    return int(said[1] or said[2]) if said else 0


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Atomic: written beside its place, synced, then renamed. A private file only its owner may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        if private:
            unfinished.unlink(missing_ok=True)  # a killed process may have left it, with other permissions
            unfinished.touch(mode=0o600, exist_ok=False)
        with writing(path), unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)
    sync(path.parent)


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`; it takes its place, synced, when the block ends, and vanishes if it fails."""
    _clear(directory)
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        with writing(directory):
            yield unfinished
            for path in [*unfinished.iterdir(), unfinished]:
                sync(path)
        _replace(directory, unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _clear(directory: Path) -> None:
    """Away with what killed processes left of `directory`, or back in its place where that is now empty."""
    if not directory.parent.is_dir():
        return
    for path in sorted(directory.parent.iterdir()):
        left = re.fullmatch(rf"\.{re.escape(directory.name)}\.(\d+)\.(old|unfinished)", path.name)
        if left is None or _is_another_process(int(left[1])):
            continue
        if left[2] == "old" and not directory.exists():
            path.rename(directory)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_another_process(number: int) -> bool:
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _replace(directory: Path, finished: Path) -> None:
    """Put the finished directory in its place. No rename replaces a full directory, so the old one steps aside."""
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        directory.rename(old)
    finished.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
