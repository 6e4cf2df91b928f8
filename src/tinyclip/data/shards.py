"""Tar files in WebDataset's layout, on disk or remote: indexed once, then read by offset.

A sample is an image and, under the same base name, a .txt of captions and/or a .json object of fields. The first
opening reads the headers of every shard (a remote one is downloaded for it, into the bounded cache); the index is kept,
and is good as long as the shard's size and time (remote: what its server says of its version) stay the same.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from PIL import Image
from webdataset.tariterators import base_plus_ext

from tinyclip.data.cache import digest, is_remembered, remembered
from tinyclip.data.decode import BadItem, decode, one_line
from tinyclip.data.files import check_is_file, check_size, left_out_line, plain_name
from tinyclip.data.flags import flags_in
from tinyclip.data.patterns import paths_of
from tinyclip.data.remote import NUM_THREADS, Remote, Transfer, ahead, check_room, describe, item_names, transfer_of
from tinyclip.data.spec import DataSpec, is_remote
from tinyclip.data.texts import CAPTION_COLUMNS, Words, as_text
from tinyclip.progress import Display

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
WITHOUT_IMAGE = f"files in a tar without an image (.{', .'.join(EXTENSIONS)}) of their name"
OTHER_IMAGES = "images beside the one that stands for their sample"
WINDOW_SHARDS = 8
FEW_SHARDS = 8  # to read for their index: nothing is shown
INDEX_VERSION = 4
FIRST_SAMPLES = 100  # whose fields are the columns of a set
CAPTIONS = tuple(dict.fromkeys(("txt", *CAPTION_COLUMNS)))  # the .txt comes first, as in open_clip
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f]|^/|(^|/)\.\.(/|$)")  # control characters, or leads elsewhere
REMEMBERED_BYTES = 2**22  # a smaller shard on disk is not worth a file: its scan takes some 0.04 s


class Scanned:
    """Counts the shards that are read to be indexed, and shows it where they are many: a remote set can take hours."""

    def __init__(self) -> None:
        self.done, self.started = 0, time.monotonic()
        self.display: Display | None = None

    def expect(self, total: int) -> None:
        """So many in all, as far as is known."""
        if self.display is not None:
            self.display.expect(total)
        elif total > FEW_SHARDS and os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first shows it
            self.display = Display("indexing shards", self.done, total, unit="shards", stays=False)

    def advance(self) -> None:
        self.done += 1
        if self.display is not None:
            self.display.advance(self.done, self.done / max(time.monotonic() - self.started, 1e-9))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.display is not None:
            self.display.close()


class Index(NamedTuple):
    """What lies where in one shard."""

    keys: list[str]  # of samples with an image
    extensions: list[str]
    offsets: np.ndarray  # int64 [samples, extensions], bytes
    sizes: np.ndarray  # int64 [samples, extensions], bytes; -1 where the sample has no such file
    shard_bytes: int
    left_out: dict[str, int]


class Local(NamedTuple):
    """A shard on disk, as it was when the set was opened."""

    where: str
    size: int  # bytes
    modified_ns: int

    @property
    def name(self) -> str:
        """Of its index."""
        return digest(Path(self.where).resolve(), self.size, self.modified_ns)


class Tars:
    """Samples of several tar files, by number. Of a sample, `read` gives the file of any extension.

    `left_out` counts what is ignored. Raises ValueError for a shard that is missing, damaged or cut short.
    """

    jpeg_side: int | None = None  # set by open_source

    def __init__(
        self,
        name: str,
        shards: Iterable[str | Path],
        transfer: Transfer | None = None,
        *,
        window: int = WINDOW_SHARDS,
        limit: int | None = None,
    ) -> None:
        self.name, self.transfer, self.window = name, transfer, window
        self.shards: list[Local | Remote] = []
        self.indexes: list[Index] = []
        paths = [str(shard) for shard in shards]
        self._names = item_names(paths)
        self._open(paths, limit)
        self.left_out = dict(sum((Counter(index.left_out) for index in self.indexes), Counter()))
        self.first = np.concatenate([[0], np.cumsum([len(index.keys) for index in self.indexes])])  # sample of a shard
        self.first = self.first if limit is None else np.minimum(self.first, limit)

    def _open(self, shards: list[str], limit: int | None) -> None:
        """Several at a time; no more than `limit` samples need."""
        pool = ThreadPoolExecutor(NUM_THREADS)
        step = NUM_THREADS if limit is not None else max(len(shards), 1)
        try:
            with Scanned() as scanned:
                for start in range(0, len(shards), step):
                    self.shards += pool.map(self._described, shards[start : start + step], itertools.count(start))
                    if self.transfer is not None:
                        sizes = [shard.size or 0 for shard in self.shards if isinstance(shard, Remote)]
                        check_room(self.name, sizes, self.window, self.transfer)
                    self._index_new(pool, scanned, self._num_later(len(shards), limit))
                    if limit is not None and self._num_samples >= limit:
                        break
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _index_new(self, pool: ThreadPoolExecutor, scanned: Scanned, num_later: int) -> None:
        """The shards without an index; perhaps so many come later."""
        shards = self.shards[len(self.indexes) :]
        to_scan = [_is_small(shard) or not is_remembered(_index_name(shard)) for shard in shards]
        if any(to_scan):
            scanned.expect(scanned.done + sum(to_scan) + num_later)
        for index, is_scanned in zip(pool.map(self._index, shards), to_scan, strict=True):
            self.indexes.append(index)
            if is_scanned:
                scanned.advance()

    def _num_later(self, num_shards: int, limit: int | None) -> int:
        """How many shards `limit` will need beyond those at hand, if they are like those with an index."""
        if limit is None or not self._num_samples:
            return 0
        needed = math.ceil(limit / self._num_samples * len(self.indexes))
        return max(min(needed, num_shards) - len(self.shards), 0)

    @property
    def _num_samples(self) -> int:
        return sum(len(index.keys) for index in self.indexes)

    def _described(self, shard: str, number: int) -> Local | Remote:
        return describe(shard, self.transfer, number) if self.transfer is not None else _local(shard)

    def _index(self, shard: Local | Remote) -> Index:
        found = self._scan(shard) if _is_small(shard) else remembered(_index_name(shard), lambda: self._scan(shard))
        shape = (-1, max(len(found["extensions"]), 1))
        places = {field: np.array(found[field], np.int64).reshape(shape) for field in ("offsets", "sizes")}
        return Index(**{**found, **places})

    def _scan(self, shard: Local | Remote) -> dict[str, Any]:
        with self._opened(shard) as file:
            return scan_tar(file, shard.where)

    def _opened(self, shard: Local | Remote) -> Any:
        if isinstance(shard, Local):
            return open(shard.where, "rb")
        assert self.transfer is not None, "remote shards come with it"
        return shard.opened(self.transfer)

    def __len__(self) -> int:
        return int(self.first[-1])

    def key(self, index: int) -> str:
        shard, row = self._at(index)
        return f"{self._names[shard]}/{self.indexes[shard].keys[row]}"

    def image(self, index: int) -> Image.Image:
        data = self.encoded(index)  # a shard that cannot be fetched is no bad item
        return decode(lambda: data, self.jpeg_side)

    def encoded(self, index: int) -> bytes:
        """The image's file. Raises BadItem, and ValueError for a shard that cannot be fetched."""
        shard, row = self._at(index)
        sizes = self.indexes[shard].sizes[row]
        known = {extension for extension, size in zip(self.indexes[shard].extensions, sizes, strict=True) if size >= 0}
        return self.read(index, next(extension for extension in EXTENSIONS if extension in known))

    def read(self, index: int, extension: str) -> bytes:
        """Raises KeyError where the sample has no such file, ValueError where the shard is another than it was."""
        shard, row = self._at(index)
        own = self.indexes[shard]
        if extension not in own.extensions or own.sizes[row, column := own.extensions.index(extension)] < 0:
            raise KeyError(extension)
        check_size(int(own.sizes[row, column]))
        try:
            with self._opened(self.shards[shard]) as file:
                if not _is_as_indexed(file, self.shards[shard], own):
                    raise ValueError(f"{self.shards[shard].where}: has changed since it was indexed")
                return os.pread(file.fileno(), int(own.sizes[row, column]), int(own.offsets[row, column]))
        except OSError as error:
            raise BadItem(one_line(error)) from None

    def _at(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        return shard, index - int(self.first[shard])

    @property
    def groups(self) -> np.ndarray | None:
        return None if self.transfer is None else self.first

    def expect(self, groups: Sequence[int]) -> None:
        assert self.transfer is not None, "only remote shards are groups"
        remotes = [shard for number in groups if isinstance(shard := self.shards[number], Remote)]
        ahead().want(str(id(self)), [(shard.name, partial(shard.fetch, self.transfer)) for shard in remotes])

    def version(self) -> str:
        """Changes with the content."""
        return digest(*(shard.name for shard in self.shards), *(index.shard_bytes for index in self.indexes))

    def traces(self) -> Iterator[tuple[object, object]]:
        """Of each shard what changes with its content, and when it was written."""
        for name, shard, index in zip(self._names, self.shards, self.indexes, strict=False):
            is_local = isinstance(shard, Local)
            sizes = digest(index.sizes.tobytes())  # of members: a tar's own is rounded up
            yield (name, index.shard_bytes, sizes, is_local or shard.version), is_local and shard.modified_ns


def _local(path: str) -> Local:
    found = check_is_file(path)
    return Local(path, found.st_size, found.st_mtime_ns)


def _is_small(shard: Local | Remote) -> bool:
    return isinstance(shard, Local) and shard.size < REMEMBERED_BYTES


def _index_name(shard: Local | Remote) -> str:
    return digest("tar", INDEX_VERSION, shard.name)


def _is_as_indexed(file: BinaryIO, shard: Local | Remote, index: Index) -> bool:
    stat = os.fstat(file.fileno())
    return stat.st_size == index.shard_bytes and (isinstance(shard, Remote) or stat.st_mtime_ns == shard.modified_ns)


class Shards(Tars):
    """Tars whose samples have captions and labels in a .txt or .json."""

    def __init__(self, spec: DataSpec, paths: Sequence[str] | None = None) -> None:
        paths = paths_of(spec.path) if paths is None else paths
        remote = is_remote(spec.path) or any(map(is_remote, paths))
        transfer = transfer_of(spec) if remote else None
        super().__init__(spec.name, paths, transfer, window=spec.window or WINDOW_SHARDS, limit=spec.limit)
        if not len(self):
            raise ValueError(f"{spec.name}: no images{left_out_line(self.left_out)}")
        self._are_lines, self._sep = spec.lines is not False, spec.sep
        columns, usual = self._columns()
        self._words = Words(spec, columns, usual=usual, order=CAPTIONS)

    def _columns(self) -> tuple[list[str], list[str]]:
        """The fields of the first shard's first samples, and those that most have; some samples may be damaged."""
        counts: Counter[str] = Counter()
        damaged: list[str] = []
        first_shard, _ = self._at(0)
        num_read = min(FIRST_SAMPLES, int(self.first[first_shard + 1]))
        for index in range(num_read):
            try:
                counts.update(self._row(index).keys())
            except BadItem as error:
                damaged.append(f"{self.name}: {self.key(index)}: {error}")
        if damaged and not counts:
            raise ValueError(damaged[0])
        return list(counts), [column for column, count in counts.items() if 2 * count >= num_read - len(damaged)]

    def captions(self, index: int) -> Sequence[str]:
        return self._words.captions(self._row(index))

    def label(self, index: int) -> tuple[str, ...] | None:
        return self._words.label(self._row(index))

    def flags(self, index: int) -> dict[str, Any]:
        return flags_in(self._row(index))

    def _row(self, index: int) -> dict[str, Any]:
        """The sample's fields: those of its .json, and 'txt', its lines."""
        shard, number = self._at(index)
        own = self.indexes[shard]
        present = {name for name, size in zip(own.extensions, own.sizes[number], strict=True) if size >= 0}
        data = {name: self.read(index, name) for name in ("json", "txt") if name in present}
        row: dict[str, Any] = {}
        try:
            if "json" in data:
                row |= _object(json.loads(data["json"], object_pairs_hook=_fields))
            if "txt" in data:
                row["txt"] = self._texts(as_text(data["txt"]))
        except (ValueError, TypeError, RecursionError) as error:
            raise BadItem(f"cannot read the text of {own.keys[number]}: {one_line(error)}") from None
        return row

    def _texts(self, text: str) -> str | list[str]:
        """What is in a .txt."""
        if not self._are_lines or len(lines := text.splitlines()) < 2:
            return text
        return lines if self._sep is None else [part for line in lines for part in line.split(self._sep)]


def _object(found: Any) -> dict[str, Any]:
    """A null has no fields."""
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"expected an object, got {type(found).__name__}")
    return found or {}


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a name that comes twice, of which json would take the last."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"two fields are named {names.most_common(1)[0][0]!r}")
    return fields


def scan_tar(file: Any, name: str) -> dict[str, Any]:
    """The fields of an Index, as JSON holds them. Headers only.

    Links, devices, sparse files and unsafe names are ignored, and counted. Raises ValueError for a sample with two
    files of one kind, and unless the archive reaches its end mark: tarfile alone would accept one cut between members.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    names: dict[str, str] = {}  # of samples, as they are first written
    twice: dict[str, str] = {}  # second files of samples
    left_out: Counter[str] = Counter()
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if reason := _reason_to_ignore(member):
                    left_out[reason] += 1
                    continue
                key, extension = base_plus_ext(member.name)
                if key and extension and member.isreg():
                    plain, extension = plain_name(key), extension.lower()
                    names.setdefault(plain, key)
                    files = samples.setdefault(plain, {})
                    if extension in files:
                        twice.setdefault(plain, member.name)
                    files[extension] = (member.offset_data, member.size)
                elif member.isreg():
                    left_out[WITHOUT_IMAGE] += 1
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"{name}: not an uncompressed tar, or cut short: {error}") from None
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{name}: damaged or cut short: no end mark at byte {end}")
    num_files = sum(map(len, samples.values()))
    with_image = {key: files for key, files in samples.items() if not files.keys().isdisjoint(EXTENSIONS)}
    if both := [member for key, member in twice.items() if key in with_image]:
        raise ValueError(
            f"{name}: {len(both)} of {len(with_image)} samples have two files of one name and kind; the first is "
            f"{both[0]!r}; expected one of each, since which belong together cannot be told"
        )
    if without_image := num_files - sum(map(len, with_image.values())):
        left_out[WITHOUT_IMAGE] += without_image
    if others := sum(sum(extension in EXTENSIONS for extension in files) - 1 for files in with_image.values()):
        left_out[OTHER_IMAGES] += others
    extensions = sorted({extension for files in with_image.values() for extension in files})
    places = [[files.get(extension, (-1, -1)) for extension in extensions] for files in with_image.values()]
    return {
        "keys": [names[key] for key in with_image],
        "extensions": extensions,
        "offsets": [[offset for offset, _ in row] for row in places],
        "sizes": [[size for _, size in row] for row in places],
        "shard_bytes": os.fstat(file.fileno()).st_size,
        "left_out": dict(left_out),
    }


def _reason_to_ignore(member: tarfile.TarInfo) -> str | None:
    if member.issym() or member.islnk():
        return "links in a tar"
    if member.issparse() or not (member.isreg() or member.isdir()):
        return "devices and sparse files in a tar"
    return "unsafe names in a tar" if UNSAFE.search(member.name) else None
