"""The checkpoints of one training phase: written whole, checked before they are read, the last few kept.

    checkpoint-000200-5f1c0a9be2d47736.pt      what `torch.save` wrote after step 200, the steps counted from 1
    checkpoint.tmp                             one that is being written; what is left of it is no checkpoint

The name ends with the first 16 digits of the file's own sha256, as names of torch.hub's files do. So a file and its
checksum cannot part: one rename puts both in their place.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, NamedTuple, cast

import torch

from tinyclip.formats.files import sync, writing
from tinyclip.formats.weights import first_line
from tinyclip.terminal import say

DIGITS = 16  # of a sha256's 64: what rots by chance is found, what was forged would not be
NAME = re.compile(rf"checkpoint-(\d{{6,}})-([0-9a-f]{{{DIGITS}}})\.pt")


class Found(NamedTuple):
    step: int
    digits: str
    path: Path


class Checkpoints:
    """Those in `directory`, of which `keep` stay; `say` gets a line for each that is passed over as damaged."""

    def __init__(self, directory: Path, *, keep: int = 2, say: Callable[[str], None] = say):
        self.directory, self.keep, self.say = directory, keep, say
        self._unfinished = directory / "checkpoint.tmp"

    def save(self, content: dict[str, Any], step: int) -> Path:
        """Write what was reached after `step` steps; older ones are dropped only then.

        Raises OSError that names the file where the disk is full; what was there before is still there.
        """
        path = self.directory / f"checkpoint-{step:06d}.pt"
        try:
            with writing(path), self._unfinished.open("wb") as file:
                target = _Hashed(file)
                torch.save(content, cast(IO[bytes], target))
                digits = target.digits()
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self._unfinished.unlink(missing_ok=True)
            raise
        path = path.with_stem(f"{path.stem}-{digits}")
        os.replace(self._unfinished, path)
        sync(self.directory)
        self._prune(step, path)
        return path

    def latest(self) -> Path | None:
        """The newest that is as it was written. Newer ones that are not are told of, and left where they are."""
        self._unfinished.unlink(missing_ok=True)
        damaged = []
        for _, digits, path in self._found():
            if not path.is_file() or _digits(path) != digits:
                damaged.append(path)
                continue
            for newer in damaged:
                self.say(f"{newer}: damaged (its sha256 is not the one in its name); continuing from {path.name}")
            return path
        for path in damaged:
            self.say(f"{path}: damaged (its sha256 is not the one in its name), and none is whole; starting again")
        return None

    def remove(self) -> None:
        """All of them, and what is left of an unfinished one."""
        for path in (self._unfinished, *(found.path for found in self._found())):
            _away(path)

    def _found(self) -> list[Found]:
        """The newest first."""
        names = ((NAME.fullmatch(path.name), path) for path in self.directory.glob("checkpoint-*.pt"))
        return sorted((Found(int(name[1]), name[2], path) for name, path in names if name), reverse=True)

    def _prune(self, step: int, written: Path) -> None:
        """Keep the one just written and the newest before it: another of this step or a later one was passed over."""
        others = [found for found in self._found() if found.path != written]
        before = [found for found in others if found.step < step]
        for found in others:
            if found not in before[: self.keep - 1]:
                _away(found.path)


def _away(path: Path) -> None:
    if path.is_dir():  # what damage can make of a file
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on `device`. Nothing is unpickled.

    Raises ValueError for a file that is none, whatever its checksum.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path}: expected tensors and numbers only; the file holds code, and is not read") from None
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, IndexError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a checkpoint, got {type(content).__name__}")
    return content


def check_like(content: Any, expected: Any, where: str) -> None:
    """Raises ValueError unless `content` has the structure of `expected`: types, keys, shapes of tensors and dtypes."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(content, torch.Tensor):
            raise ValueError(f"{where}: expected a tensor, got {type(content).__name__}")
        got, asked = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (content, expected))
        if got != asked:
            raise ValueError(f"{where}: expected {asked}, got {got}")
    elif isinstance(expected, dict):
        if not isinstance(content, dict):
            raise ValueError(f"{where}: expected a mapping, got {type(content).__name__}")
        for what, names in (("lacks", expected.keys() - content), ("has an unknown", content.keys() - expected)):
            if names:
                raise ValueError(f"{where}: {what} {min(map(str, names)):.80}")
        for key, value in expected.items():
            check_like(content[key], value, f"{where}: {key}")
    elif isinstance(expected, list | tuple):
        if not isinstance(content, list | tuple) or len(content) != len(expected):
            raise ValueError(f"{where}: expected {len(expected)} entries, got others")
        for number, (own, value) in enumerate(zip(content, expected, strict=True)):
            check_like(own, value, f"{where}: {number}")
    elif type(content) is not type(expected):
        raise ValueError(f"{where}: expected {type(expected).__name__}, got {type(content).__name__}")


class _Hashed:
    """What `torch.save` writes to: `file`, with the sha256 of its bytes.

    torch calls `write` from C++, which an exception must not cross: the first is kept for `digits`, the rest of the
    bytes dropped.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._sha256 = file, hashlib.sha256()
        self._error: OSError | None = None

    def write(self, content: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(content)
            except OSError as error:
                self._error = error
            self._sha256.update(content)
        return len(content)

    def flush(self) -> None:
        """Done by the owner of the file."""

    def digits(self) -> str:
        """The first of the sha256's. Raises the OSError of a write that failed."""
        if self._error is not None:
            raise self._error
        return self._sha256.hexdigest()[:DIGITS]


def _digits(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
