"""A folder or a .zip of images, read in place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from tinyclip.data.decode import BadItem

MAX_BYTES = 2**28  # of one file inside an archive


def check_size(size: int, what: str = "bytes") -> None:
    """Raises BadItem for a file that is too large to be read."""
    if size > MAX_BYTES:
        raise BadItem(f"{size} {what}, the limit is {MAX_BYTES}")


def without_folder(paths: Sequence[str]) -> list[str]:
    """Without the folders that all share, so that a set has the same names wherever it lies."""
    parts = [path.split("/") for path in paths]
    folders = zip(*(own[:-1] for own in parts), strict=False)
    shared = len(list(takewhile(lambda same: len(set(same)) == 1, folders)))
    return ["/".join(own[shared:]) for own in parts]


def plain_name(name: str) -> str:
    """./0.jpg and 0.jpg are one file."""
    if "./" not in name and "//" not in name:
        return name
    return "/" * name.startswith("/") + "/".join(part for part in name.split("/") if part not in ("", "."))


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, name: str) -> bool:
        try:
            return (self.path / name).is_file()
        except OSError:  # longer than a name can be
            return False

    def names(self) -> list[str]:
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def version(self, names: Iterable[str]) -> Iterator[object]:
        """What changes with the content of these files."""
        yield self.path.resolve()
        for name in names:
            stat = (self.path / name).stat()
            yield stat.st_size, stat.st_mtime_ns


class Zip:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.names()
        except BadZipFile as error:
            raise ValueError(f"{path}: not a zip file, or damaged: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in _open_zip(self.path, os.getpid()).NameToInfo

    def names(self) -> list[str]:
        return _open_zip(self.path, os.getpid()).namelist()

    def read(self, name: str) -> bytes:
        archive = _open_zip(self.path, os.getpid())
        check_size(archive.getinfo(name).file_size, "bytes unpacked")
        return archive.read(name)

    def version(self, names: Iterable[str]) -> Iterator[object]:
        """What changes with the content of these files."""
        stat = self.path.stat()
        yield from (self.path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _open_zip(path: Path, process: int) -> ZipFile:
    """A handle of this process's own: forked workers that shared one would move each other's file position."""
    return ZipFile(path)


def open_files(path: Path) -> Folder | Zip:
    if path.suffix.lower() == ".zip":
        return Zip(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder (or .zip, table .tsv/.csv/.parquet, shard .tar)")
    return Folder(path)
