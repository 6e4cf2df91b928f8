"""A bounded directory of files that can be made again: shards that were downloaded, tables that were rewritten.

    $TINYCLIP_CACHE (or ~/.cache/tinyclip)/shards/   at most `limit_bytes`, the least recently used go first
    $TINYCLIP_CACHE/index/                           what lies where in a shard; small, and never removed

Several processes use one directory at the same time. A file is written under another name and renamed when complete,
by one process while others that want it wait. It can go again at any time, so `opened` makes it again if it must.
Names are digests: nothing that a server or an archive says becomes the name of a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock

from tinyclip.formats.files import read_sealed, sealed

STALE_S = 3600  # a part that was not written to for so long belongs to a process that is gone
WAIT_S = 60  # for other files to be complete
ATTEMPTS = 5
STEP_BYTES = 2**26  # room that a file of unknown size is given at a time


def cache_directory() -> Path:
    return Path(os.environ.get("TINYCLIP_CACHE") or "~/.cache/tinyclip").expanduser()


def digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode(errors="surrogatepass")).hexdigest()[:40]


class Cache(NamedTuple):
    directory: Path
    limit_bytes: int

    def path(self, name: str, make: Callable[[Part], None]) -> Path:
        """The file `name`; `make` writes it where it is not there."""
        path = self.directory / name
        if not _touched(path):
            with self._locked(name):
                if not path.exists():
                    self._create(path, make)
        return path

    @contextmanager
    def opened(self, name: str, make: Callable[[Part], None]) -> Iterator[BinaryIO]:
        with self._open(name, make) as file:
            yield file

    def _open(self, name: str, make: Callable[[Part], None]) -> BinaryIO:
        for _ in range(ATTEMPTS):
            try:
                return open(self.path(name, make), "rb")
            except FileNotFoundError:  # another process needed its room
                continue
        raise ValueError(f"{self}: files go before they can be read; allow it more with cache_gb")

    def _create(self, path: Path, make: Callable[[Part], None]) -> None:
        temporary = path.with_name(f"{path.name}.part")
        try:
            with open(temporary, "wb") as file:
                part = Part(self, file)
                make(part)
                file.truncate(part.size)
            os.replace(temporary, path)
        except OSError as error:
            raise ValueError(f"{self}: cannot write: {error}") from None
        finally:
            temporary.unlink(missing_ok=True)

    def extend(self, file: BinaryIO, size: int) -> None:
        """Make a file that is being written `size` bytes long; others go where there is no room.

        Files that others are writing are waited for. Raises ValueError where there is no room without them either.
        """
        deadline = time.monotonic() + WAIT_S
        while not self._extended(file, size):
            if size > self.limit_bytes or time.monotonic() > deadline:
                raise ValueError(f"{self}: no room for a file of {size} bytes; allow it more with cache_gb")
            time.sleep(0.05)

    def _extended(self, file: BinaryIO, size: int) -> bool:
        with self._locked("room"):
            files = sorted((stat.st_mtime, stat.st_size, path) for path, stat in self._files())
            excess = sum(own for _, own, _ in files) + size - os.fstat(file.fileno()).st_size - self.limit_bytes
            for changed, own, path in files:
                if excess <= 0:
                    break
                if path.suffix != ".part" or time.time() - changed > STALE_S:
                    path.unlink(missing_ok=True)
                    excess -= own
            if excess <= 0:
                file.truncate(size)
            return excess <= 0

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for entry in os.scandir(self.directory):
            try:
                if entry.is_file():
                    yield Path(entry.path), entry.stat()
            except FileNotFoundError:
                continue

    def _locked(self, name: str) -> FileLock:
        locks = self.directory / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self}: cannot write: {error}") from None
        return FileLock(locks / name)

    def __str__(self) -> str:
        return f"cache {self.directory} of {self.limit_bytes / 1e9:g} GB"


class Part:
    """A file of the cache while it is written. It is a sink of pyarrow's too."""

    def __init__(self, cache: Cache, file: BinaryIO) -> None:
        self.cache, self.file, self.closed = cache, file, False
        self.size = self.reserved = 0

    def reserve(self, size: int) -> None:
        """Make room for a file of `size` bytes before they come."""
        if size > self.reserved:
            self.cache.extend(self.file, size)
            self.reserved = size

    def write(self, data: bytes) -> int:
        if self.size + len(data) > self.reserved:
            spare = STEP_BYTES if self.cache.limit_bytes > 100 * STEP_BYTES else 0
            self.reserve(self.size + len(data) + spare)
        self.file.seek(self.size)
        self.file.write(data)
        self.size += len(data)
        return len(data)

    def restart(self) -> None:
        self.size = 0


def _touched(path: Path) -> bool:
    """Whether it is there; it then counts as used now."""
    try:
        os.utime(path)
        return True
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's cache
        return path.exists()


def remembered(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A JSON object of the index directory. Where that cannot be written, it is made anew every time."""
    path = _index_file(name)
    try:
        return read_sealed(path)
    except (OSError, ValueError):  # not there, or damaged
        pass
    made = make()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(sealed(json.dumps(made)), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
    return made


def is_remembered(name: str) -> bool:
    return _index_file(name).exists()


def _index_file(name: str) -> Path:
    return cache_directory() / "index" / f"{name}.json"
