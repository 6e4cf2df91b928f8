"""What every format does with files: JSON and YAML that were expected, and files and directories that are whole or not
there.

What is read may come from strangers, so nothing of it can ask for more memory than its file is long, times a constant:
files have a limit, an archive's members are no longer than they say, aliases of YAML are counted as what they stand
for, and nesting and numbers end where no settings of ours or of another library go.

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
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import yaml
from pydantic import BaseModel, StringConstraints, ValidationError

from tinyclip.config import Config

M = TypeVar("M", bound=BaseModel)
DIGESTS = "digests.json"  # of a directory: the sha256 of each of its other files

MAX_BYTES = 2**24  # of a file of settings
MAX_YAML_BYTES, MAX_YAML_NODES = 2**20, 2**17  # aliases count as what they stand for
MAX_DEPTH = 64  # of lists and mappings in each other
MAX_DIGITS = 400  # of a number; the largest fp64 has 309


def is_there(path: Path) -> bool:
    """Whether anything has this name, a directory or a broken link too: it is read, or refused, not passed over."""
    return os.path.lexists(path)


def read_text(path: Path, kind: str = "text", limit: int = MAX_BYTES) -> str:
    """UTF-8. Raises FileNotFoundError for what is no file, ValueError for one above `limit` bytes or of other bytes."""
    if not path.is_file():
        found = "a directory" if path.is_dir() else "something else" if path.exists() else "none"
        raise FileNotFoundError(f"{path}: expected a {kind} file, found {found}")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes of {kind}, got {path.stat().st_size}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not {kind}: {error}") from None


def read_json(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError for anything but a JSON object, and for one above `limit` bytes."""
    settings = parse_json(read_text(path, "JSON", limit), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def parse_json(text: str, where: str) -> Any:
    """A JSON value of any type. Raises ValueError, with `where`, for what is none, a key given twice, ..."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_int=_int, parse_float=_float)
        _check_values(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} is given twice")
        found[key] = value
    return found


def _int(digits: str) -> int:
    return int(_short(digits))


def _float(digits: str) -> float:
    return float(_short(digits))


def _short(digits: str) -> str:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return digits


def _check_values(value: Any) -> None:
    """Raises ValueError for half a character, which nothing can print, and for what is nested too deeply."""
    level = [value]
    for _ in range(MAX_DEPTH):
        texts = [text for text in level if isinstance(text, str)]
        texts += [key for inner in level if isinstance(inner, dict) for key in inner if isinstance(key, str)]
        "".join(texts).encode("utf-8")  # UnicodeEncodeError is a ValueError
        inner = (own.values() if isinstance(own, dict) else own for own in level if isinstance(own, dict | list))
        level = [own for values in inner for own in values]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} lists or mappings in each other")


def read_yaml(path: Path) -> Any:
    """Raises FileNotFoundError, or ValueError that names the file and the line for anything but plain YAML."""
    return parse_yaml(read_text(path, "YAML", MAX_YAML_BYTES), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """A value of plain YAML. Raises ValueError, with `where`, for anything else, twofold keys and endless aliases."""
    try:
        value = yaml.load(text, _Yaml)  # a SafeLoader
        _check_values(value)
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{where}: not YAML: {line}{what}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


class _Yaml(yaml.SafeLoader):
    """Refuses a key given twice, numbers without end, and aliases that stand for too much."""

    def __init__(self, text: str):
        super().__init__(text)
        self.count, self.counts = 0, {}  # of nodes so far, and of those below each

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self.count
        is_alias = isinstance(event, yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self.counts:
            raise yaml.MarkedYAMLError(problem="an alias inside of what it stands for", problem_mark=event.start_mark)
        self.count += self.counts[id(node)] if is_alias else 1
        self.counts[id(node)] = self.counts[id(node)] if is_alias else self.count - before
        if self.count > MAX_YAML_NODES:
            problem = f"more than {MAX_YAML_NODES} values, with aliases as what they stand for"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value)} digits"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value!r:.80} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_member(archive: ZipFile, name: str, limit: int) -> bytes:
    """A file of a zip archive. Raises ValueError where it has more than `limit` bytes, before it is inflated, or is
    damaged, and KeyError where there is none."""
    info = archive.getinfo(name)
    if info.file_size > limit:
        raise ValueError(f"{name}: expected at most {limit} bytes, got {info.file_size}")
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):  # zipfile inflates those of others without a bound
        raise ValueError(f"{name}: expected a file stored or deflated, got method {info.compress_type}")
    try:
        with archive.open(info) as member:
            content = member.read(info.file_size)  # read() would inflate all at once, whatever the size says
            if len(content) < info.file_size or member.read(1):
                raise BadZipFile(f"{len(content)} of {info.file_size} bytes")
    except (BadZipFile, EOFError, RuntimeError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{name}: damaged: {error}") from None
    return content


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
