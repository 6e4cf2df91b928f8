"""A disk that forgets what was not synced: what a machine that goes down may leave of a directory.

`Journal`, in the process that is to be killed, notes in a file what `os.fsync` was asked for. `forget`, afterwards,
takes back what was not: content that was written after a file's last sync, and names that a directory got after its
own. Of each such thing a coin decides, as a disk may have written any of it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from random import Random
from typing import Any, NamedTuple


class Known(NamedTuple):
    """What is on the disk for certain: sizes of inodes, and names of each directory with their inodes."""

    sizes: dict[int, int]
    names: dict[int, dict[str, int]]

    @classmethod
    def of(cls, root: Path) -> Known:
        known = cls({}, {})
        for directory in (root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())):
            if directory.exists():
                known.names[directory.stat().st_ino] = _names(directory)
        known.sizes.update({path.stat().st_ino: path.stat().st_size for path in root.rglob("*") if path.is_file()})
        return known


def _names(directory: Path) -> dict[str, int]:
    return {entry.name: entry.inode() for entry in os.scandir(directory)}


class Journal:
    """Wraps os.fsync, os.replace and os.rename of this process. What is replaced is kept beside the note."""

    def __init__(self, note: Path):
        self.note, self.kept = note, note.with_suffix(".kept")
        self.kept.mkdir(exist_ok=True)
        self.process, self.fsync, self.replace, self.rename = os.getpid(), os.fsync, os.replace, os.rename
        os.fsync, os.replace, os.rename = self._fsync, self._moved(self.replace), self._moved(self.rename)

    def _write(self, **line: Any) -> None:
        with open(self.note, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _fsync(self, descriptor: Any) -> None:
        self.fsync(descriptor)
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        found = os.fstat(number)
        if stat.S_ISDIR(found.st_mode):
            names = {entry.name: entry.inode() for entry in os.scandir(number)}
            self._write(directory=found.st_ino, names=names)
        else:
            self._write(inode=found.st_ino, size=found.st_size)

    def _moved(self, move: Any) -> Any:
        def moved(source: Any, target: Any, **how: Any) -> None:
            if os.path.isfile(target):  # so that it can come back
                inode = os.stat(target).st_ino
                if not (self.kept / str(inode)).exists():
                    os.link(target, self.kept / str(inode))
            move(source, target, **how)

        return moved


def forget(root: Path, known: Known, note: Path, random: Random) -> list[str]:
    """Take back what the journal does not know to be on the disk; returns what was."""
    for line in note.read_text().splitlines() if note.exists() else ():
        entry = json.loads(line)
        if "directory" in entry:
            known.names[entry["directory"]] = entry["names"]
        else:
            known.sizes[entry["inode"]] = entry["size"]
    lost: list[str] = []
    if root.exists():
        _forget_in(root, known, note.with_suffix(".kept"), random, lost)
    return lost


def _forget_in(directory: Path, known: Known, kept: Path, random: Random, lost: list[str]) -> None:
    durable = known.names.get(directory.stat().st_ino, {})
    for name, inode in _names(directory).items():
        path = directory / name
        if durable.get(name) != inode and random.random() < 0.5:
            lost.append(_vanished(path))
            before = kept / str(durable.get(name))
            if before.exists():
                os.link(before, path)
            continue
        if path.is_dir():
            _forget_in(path, known, kept, random, lost)
        elif path.stat().st_size > (size := known.sizes.get(path.stat().st_ino, 0)) and random.random() < 0.5:
            os.truncate(path, size)
            lost.append(f"{path.name} after byte {size}")


def _vanished(path: Path) -> str:
    if path.is_dir():
        for inside in path.iterdir():
            _vanished(inside)
        path.rmdir()
    else:
        path.unlink()
    return path.name
