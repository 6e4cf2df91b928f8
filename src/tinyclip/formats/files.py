"""What every format does with files: JSON that was expected, and files and directories that are whole or not there.

A process may be killed at any call here: what it wrote under another name is cleared away by the next one that writes
in the same place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

from tinyclip.config import Config

M = TypeVar("M", bound=BaseModel)
DIGESTS = "digests.json"  # of a directory: the sha256 of each of its other files


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
    make_directory(path.parent)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        if private:
            unfinished.unlink(missing_ok=True)  # a killed process may have left it, with other permissions
            unfinished.touch(mode=0o600, exist_ok=False)
        with writing(path), unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_directory(directory: Path) -> None:
    """With its parents, synced, where it is not there."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`; it takes its place, synced, when the block ends, and vanishes if it fails."""
    _clear(directory)
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.unfinished")
    make_directory(unfinished)
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


def write_record(path: Path, text: str) -> None:
    """A JSON object that ends with the sha256 of all that stands before it: `read_record` tells when it is damaged.

    It is written as `write_text` does, so that a record and its checksum cannot part.
    """
    write_text(path, sealed(text))


def sealed(text: str) -> str:
    """A JSON object that ends with the sha256 of the rest."""
    body = text.removesuffix("}").rstrip()
    return f'{body},\n  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


SEAL = re.compile(rb'(.*),\n  "sha256": "([0-9a-f]{64})"\n}\n', re.DOTALL)


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_record` wrote. A JSON object that ends without a sha256, as all once did, is taken as it is.

    Raises FileNotFoundError, or ValueError for what is no JSON object and for what is not as it was written.
    """
    settings = read_json(path)
    if "sha256" in settings:
        parts = SEAL.fullmatch(path.read_bytes())
        if parts is None or hashlib.sha256(parts[1]).hexdigest().encode() != parts[2]:
            raise ValueError(f"{path}: damaged, it does not end with the sha256 of what it holds")
        del settings["sha256"]
    return settings


def read_record(kind: type[M], path: Path) -> M:
    """The value that `write_record` wrote. Raises as `read_sealed` does, and ValueError for another kind of record."""
    return validated(kind, read_sealed(path), str(path))


class Digests(Config):
    """What a directory's files were when it was written."""

    files: dict[
        Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")],
        Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")],
    ]


def write_digests(directory: Path, names: Iterable[str]) -> None:
    """Note the sha256 of these files of a directory, in its digests.json."""
    found = Digests(files={name: sha256_of(directory / name) for name in names})
    write_record(directory / DIGESTS, found.model_dump_json(indent=2))


def check_digests(directory: Path) -> None:
    """Raises ValueError that names a file which is not as digests.json says; without that one all is taken as it is."""
    noted = directory / DIGESTS
    if not os.path.lexists(noted):
        return
    for name, sha256 in read_record(Digests, noted).files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path}: gone, expected the file that {DIGESTS} tells of")
        if sha256_of(path) != sha256:
            raise ValueError(f"{path}: damaged, its sha256 is not the one in {DIGESTS}")


def sha256_of(path: Path) -> str:
    """Of a file's content, read once as long as the file stays as it is."""
    stat = path.stat()
    return _sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: Path, *_version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
