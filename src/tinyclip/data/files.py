"""A folder or a .zip of images, read in place."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from tinyclip.data.decode import BadItem
from tinyclip.formats.files import read_member

MAX_BYTES = 2**28  # of one file inside an archive
MAX_TRACED = 10_000  # files of a folder that are asked for their size
NOT_SHOWN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # folders of systems, with files named like images


def check_size(size: int, what: str = "bytes") -> None:
    """Raises BadItem for a file that is too large to be read."""
    if size > MAX_BYTES:
        raise BadItem(f"{size} {what}, the limit is {MAX_BYTES}")


def check_is_file(path: Path | str) -> os.stat_result:
    """Raises ValueError for a pipe or a device, which may never end, and OSError for what is not there."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise ValueError(f"{path}: expected a file, got {kind}")
    return found


def left_out_line(left_out: Mapping[str, int]) -> str:
    """`; left out: 3 links in a tar, ...` behind an error; nothing where there is nothing."""
    return "; left out: " * bool(left_out) + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())


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


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is not shown to people: .ipynb_checkpoints, ._1.jpg, __MACOSX."""
    return name.startswith(".") or name in NOT_SHOWN


def class_folders(path: Path) -> list[str]:
    """The folders of a folder that are not hidden, and links to folders; sorted, as torchvision numbers classes."""
    return sorted(part.name for part in path.iterdir() if part.is_dir() and not is_hidden(part.name))


class Folder:
    """Links are followed, but for those that lead back to a folder above them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, name: str) -> bool:
        try:
            return (self.path / name).is_file()
        except OSError:  # longer than a name can be
            return False

    def names(self, left_out: Counter[str]) -> list[str]:
        """The paths of files, and of folders with a / behind; what is neither is counted."""
        return list(_walk(self.path, "", (), left_out))

    def parts(self, name: str) -> tuple[str, ...]:
        """A path's folders, and the file."""
        return tuple(name.rstrip("/").split("/"))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def version(self, names: Iterable[str]) -> Iterator[object]:
        """What changes with the content of these files."""
        yield self.path.resolve()
        for name in names:
            found = (self.path / name).stat()
            yield found.st_size, found.st_mtime_ns

    def traces(self, names: Sequence[str]) -> Iterator[tuple[object, object]]:
        """Of each file its size, and when it was written; of very many files of so many, evenly spread."""
        for name in names[:: 1 + len(names) // MAX_TRACED]:
            found = (self.path / name).stat()
            yield (name, found.st_size), found.st_mtime_ns


def _walk(root: Path, folder: str, above: tuple[tuple[int, int], ...], left_out: Counter[str]) -> Iterator[str]:
    stat = os.stat(root / folder)
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        left_out["links to a folder above them"] += 1
        return
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = folder + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if is_folder:
                yield f"{name}/"
                yield from _walk(root, f"{name}/", (*above, here), left_out)
            elif is_file:
                yield name
            else:
                left_out["links that lead nowhere" if entry.is_symlink() else "devices, pipes and sockets"] += 1


class Zip:
    """Raises ValueError for what is no zip, is damaged, or holds two files of one name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            names = self.names(Counter())
        except BadZipFile as error:
            raise ValueError(f"{path}: not a zip file, or damaged: {error}") from None
        counts = Counter(plain_name(name) for name in names if not name.endswith("/"))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"{path}: expected one file of each name, it holds {twice[0]!r} twice")

    def __contains__(self, name: str) -> bool:
        return name in _open_zip(self.path, os.getpid()).NameToInfo

    def names(self, left_out: Counter[str]) -> list[str]:
        """The paths of files, and of folders with a / behind."""
        return _open_zip(self.path, os.getpid()).namelist()

    def parts(self, name: str) -> tuple[str, ...]:
        """A path's folders, and the file, without what leads outside; some programs of Windows write a backslash."""
        return tuple(part for part in re.split(r"[/\\]", name) if part not in ("", ".", ".."))

    def read(self, name: str) -> bytes:
        archive = _open_zip(self.path, os.getpid())
        check_size(archive.getinfo(name).file_size, "bytes unpacked")
        try:
            return read_member(archive, name, MAX_BYTES)
        except ValueError as error:
            raise BadItem(str(error)) from None

    def version(self, names: Iterable[str]) -> Iterator[object]:
        """What changes with the content of these files."""
        found = self.path.stat()
        yield from (self.path.resolve(), found.st_size, found.st_mtime_ns)

    def traces(self, names: Sequence[str]) -> Iterator[tuple[object, object]]:
        """Of each file its checksum; of the archive, when it was written."""
        archive = _open_zip(self.path, os.getpid())
        yield [archive.getinfo(name).CRC for name in names], self.path.stat().st_mtime_ns


@lru_cache(maxsize=16)
def _open_zip(path: Path, process: int) -> ZipFile:
    """A handle of this process's own: forked workers that shared one would move each other's file position."""
    return ZipFile(path)


def open_files(path: Path) -> Folder | Zip:
    if path.suffix.lower() == ".zip":
        check_is_file(path)
        return Zip(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder (or .zip, table .tsv/.csv/.parquet, shard .tar)")
    return Folder(path)
