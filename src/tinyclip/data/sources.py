"""Where pairs come from: tables, shards, class folders, and the built-in scenes, behind one small interface.

An item is one image with all its captions: rows of a table that name the same image are one item. A broken item
raises BadItem when it is read; a broken data set raises ValueError when it is opened. Nothing is unpacked to disk.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol
from zipfile import BadZipFile, ZipFile

from braceexpand import braceexpand
from PIL import Image, UnidentifiedImageError
from webdataset.tariterators import base_plus_ext

from tinyclip.data.scenes import Scenes
from tinyclip.data.spec import DataSpec

IMAGE_COLUMNS = ("file", "filepath", "image", "filename", "path")
CAPTION_COLUMNS = ("captions", "caption", "txt", "title", "text")
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow reads more; some of those start other programs
MAX_BYTES = 2**28  # of one file inside an archive
MAX_PIXELS = 89_478_485  # of one image: Pillow's decompression-bomb limit


class Source(Protocol):
    """Random access to items. Picklable, and safe to use in forked workers."""

    name: str

    def __len__(self) -> int: ...
    def key(self, index: int) -> str:
        """Names the item for people: a file, a member of a shard."""
        ...

    def image(self, index: int) -> Image.Image:
        """Fully decoded, any mode that converts to RGB. Raises BadItem."""
        ...

    def captions(self, index: int) -> Sequence[str]:
        """Empty where the item has none. Raises BadItem."""
        ...

    def label(self, index: int) -> tuple[str, ...] | None:
        """The class's name, then its synonyms. Raises BadItem."""
        ...


class BadItem(ValueError):
    """One item cannot be read. The message is the reason, one line; the caller knows the key."""


def open_source(spec: str | Mapping[str, Any] | DataSpec) -> Source:
    """Opens and checks a data set.

    Raises ValueError or FileNotFoundError, one line, for a missing file, column or image, a damaged archive, and a
    set without images.
    """
    spec = DataSpec.parse(spec)
    if spec.kind == "scenes":
        return Scenes(spec.split, spec.count, spec.seed)
    return {"table": open_table, "shards": Shards, "folders": open_folders}[spec.kind](spec)


# Tables and class folders: a list of images and their texts, beside a folder or zip that holds the images.


class Item(NamedTuple):
    key: str  # the image's path inside the folder or zip
    captions: tuple[str, ...]
    label: tuple[str, ...] | None


class Listed:
    """Images of a folder or zip, with the texts that a table or the class folders give them."""

    def __init__(self, name: str, files: Folder | Zip, items: list[Item]) -> None:
        self.name, self.files, self.items = name, files, items

    def __len__(self) -> int:
        return len(self.items)

    def key(self, index: int) -> str:
        return self.items[index].key

    def image(self, index: int) -> Image.Image:
        return decode(lambda: self.files.read(self.items[index].key))

    def captions(self, index: int) -> Sequence[str]:
        return self.items[index].captions

    def label(self, index: int) -> tuple[str, ...] | None:
        return self.items[index].label


def open_table(spec: DataSpec) -> Listed:
    """A .tsv or .csv with a header. The delimiter is a tab if the header holds one; cells may be quoted as in CSV."""
    path = Path(spec.path)
    columns, rows = _read_table(path)
    image = spec.image or next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image not in columns:
        raise ValueError(f"{path}: no image column {image or ' or '.join(IMAGE_COLUMNS)}; it has {', '.join(columns)}")
    files = _open_files(path.parent / (spec.images or ""))
    return _listed(spec, files, columns, rows, image)


def open_folders(spec: DataSpec) -> Listed:
    """A folder or .zip whose images lie in folders named after their class: a table with the columns file and label."""
    files = _open_files(Path(spec.path))
    rows = [
        {"file": name, "label": path.parent.name}
        for name in sorted(files.names())
        if (path := PurePosixPath(name)).suffix[1:].lower() in EXTENSIONS
        and path.parent.name
        and not path.name.startswith(".")
    ]
    return _listed(spec.model_copy(update={"label": "label"}), files, ["file", "label"], rows, "file")


def _listed(
    spec: DataSpec, files: Folder | Zip, columns: Sequence[str], rows: Iterable[Mapping[str, str]], image: str
) -> Listed:
    caption, label = _templates(spec, columns)
    keep = _row_filter(spec.where, columns, spec.path)
    by_image: dict[str, list[Mapping[str, str]]] = {}
    for row in filter(keep, rows):
        by_image.setdefault(row[image], []).append(row)
    items = [
        Item(
            key=key,
            captions=tuple(text for row in same for text in _texts(caption, row, spec.sep)),
            label=_texts(label, same[0], spec.sep) or None,
        )
        for key, same in list(by_image.items())[: spec.limit]
    ]
    _require_images(items, spec)
    if missing := [item.key for item in items if item.key not in files]:
        raise FileNotFoundError(
            f"{spec.path}: {len(missing)} of {len(items)} images are not in {files.path}; the first is {missing[0]!r}"
        )
    return Listed(spec.path, files, items)


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        line = 1
        try:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            columns, rows = next(reader, []), []
            for cells in reader:
                line = reader.line_num
                if cells and len(cells) != len(columns):
                    raise ValueError(f"expected {len(columns)} cells, as in the header, got {len(cells)}")
                if cells:
                    rows.append(dict(zip(columns, cells, strict=True)))
        except (csv.Error, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{path}: near line {line}: {error}") from None
    if not columns:
        raise ValueError(f"{path}: empty, expected a header line")
    return columns, rows


def _row_filter(where: str | None, columns: Sequence[str], table: str) -> Callable[[Mapping[str, str]], bool]:
    """'split=train;style!=noto' as a function of a row."""
    conditions = []
    for text in where.split(";") if where else ():
        column, equals, value = text.partition("=")
        name = column.removesuffix("!")
        if not equals or name not in columns:
            raise ValueError(f"{table}: where {text!r}: expected column=value, columns are {', '.join(columns)}")
        conditions.append((name, value, not column.endswith("!")))
    return lambda row: all((row[name] == value) is wanted for name, value, wanted in conditions)


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __contains__(self, name: str) -> bool:
        return (self.path / name).is_file()

    def names(self) -> list[str]:
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


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
        if (size := archive.getinfo(name).file_size) > MAX_BYTES:
            raise BadItem(f"{size} bytes unpacked, the limit is {MAX_BYTES}")
        return archive.read(name)


@lru_cache(maxsize=16)
def _open_zip(path: Path, process: int) -> ZipFile:
    """A handle of this process's own: forked workers that shared one would move each other's file position."""
    return ZipFile(path)


def _open_files(path: Path) -> Folder | Zip:
    if path.suffix == ".zip":
        return Zip(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder (or .zip, table .tsv/.csv, shard .tar)")
    return Folder(path)


# Shards: tar files in WebDataset's layout, indexed once and then read by offset.


class Sample(NamedTuple):
    shard: Path
    key: str
    files: dict[str, tuple[int, int]]  # extension -> (offset, bytes)


class Shards:
    """A sample is an image and, under the same name, a .txt caption and/or a .json object of fields."""

    def __init__(self, spec: DataSpec) -> None:
        self.name, self._sep = spec.path, spec.sep
        self._samples: list[Sample] = []
        for shard in braceexpand(spec.path):
            self._samples += index_tar(Path(shard))
        self._samples = self._samples[: spec.limit]
        _require_images(self._samples, spec)
        self._caption, self._label = _templates(spec, list(self._row(0)))

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return f"{self._samples[index].shard}/{self._samples[index].key}"

    def image(self, index: int) -> Image.Image:
        extension = next(extension for extension in EXTENSIONS if extension in self._samples[index].files)
        return decode(lambda: self._read(index, extension))

    def captions(self, index: int) -> Sequence[str]:
        return _texts(self._caption, self._row(index), self._sep)

    def label(self, index: int) -> tuple[str, ...] | None:
        return _texts(self._label, self._row(index), self._sep) or None

    def _read(self, index: int, extension: str) -> bytes:
        shard, _, files = self._samples[index]
        offset, size = files[extension]
        if size > MAX_BYTES:
            raise BadItem(f"{size} bytes, the limit is {MAX_BYTES}")
        with open(shard, "rb") as file:
            return os.pread(file.fileno(), size, offset)

    def _row(self, index: int) -> dict[str, Any]:
        """The sample's fields: those of its .json, and 'txt'."""
        _, key, files = self._samples[index]
        row: dict[str, Any] = {}
        try:
            if "json" in files:
                row |= json.loads(self._read(index, "json"))
            if "txt" in files:
                row["txt"] = self._read(index, "txt").decode()
        except (ValueError, TypeError, RecursionError) as error:
            raise BadItem(f"cannot read the text of {key}: {one_line(error)}") from None
        return row


def index_tar(shard: Path) -> list[Sample]:
    """Headers only. Links, devices, sparse files and names that are not plain are ignored.

    Raises ValueError unless the archive reaches its end mark: tarfile alone would accept one cut between members.
    """
    samples: dict[str, Sample] = {}
    with open(shard, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    key, extension = base_plus_ext(member.name)
                    if key and extension and member.isreg() and _is_plain(member.name):
                        sample = samples.setdefault(key, Sample(shard, key, {}))
                        sample.files[extension.lower()] = (member.offset_data, member.size)
                end = archive.offset
        except tarfile.TarError as error:
            raise ValueError(f"{shard}: not an uncompressed tar, or cut short: {error}") from None
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{shard}: damaged or cut short: no end mark at byte {end}")
    return [sample for sample in samples.values() if not sample.files.keys().isdisjoint(EXTENSIONS)]


def _is_plain(name: str) -> bool:
    return name.isprintable() and not name.startswith("/") and ".." not in name.split("/")


# What all of them share.


def _require_images(items: Sequence[object], spec: DataSpec) -> None:
    if not items:
        raise ValueError(f"{spec.path}: no images" + (f" where {spec.where}" if spec.where else ""))


def _templates(spec: DataSpec, columns: Sequence[str]) -> tuple[str | None, str | None]:
    """The templates of captions and label, checked against the columns. A column's name is a template too."""
    caption = spec.caption or next((name for name in CAPTION_COLUMNS if name in columns), None)
    known = f"it has {', '.join(columns) or 'none'}"
    if caption is None and spec.label is None:
        raise ValueError(f"{spec.path}: no caption column {' or '.join(CAPTION_COLUMNS)}; {known}")
    templates = [name if name is None or "{" in name else f"{{{name}}}" for name in (caption, spec.label)]
    for column in _FIELD.findall("".join(filter(None, templates))):
        if column not in columns:
            raise ValueError(f"{spec.path}: no column {column!r}; {known}")
    return templates[0], templates[1]


_FIELD = re.compile(r"\{([^{}]+)\}")


def _texts(template: str | None, row: Mapping[str, Any], sep: str | None) -> tuple[str, ...]:
    """The template filled with every combination of its columns' texts: a list cell, or one split at sep, has several.

    Empty texts are dropped, so an empty cell gives no text at all.
    """
    if template is None:
        return ()
    columns = list(dict.fromkeys(_FIELD.findall(template)))
    choices = [_cell(row.get(column), sep) for column in columns]
    fills = (dict(zip(columns, values, strict=True)) for values in product(*choices))
    return tuple(_FIELD.sub(lambda match, fill=fill: fill[match[1]], template) for fill in fills)


def _cell(value: Any, sep: str | None) -> list[str]:
    parts = value if isinstance(value, list) else [] if value is None else str(value).split(sep) if sep else [value]
    return [text for part in parts if (text := str(part).strip())]


def decode(read: Callable[[], bytes]) -> Image.Image:
    try:
        data = read()
        if not data:
            raise BadItem("empty file")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadItem(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
        image.load()
        return image
    except UnidentifiedImageError:
        raise BadItem(f"not an image ({', '.join(FORMATS)})") from None
    except BadItem:
        raise
    except Exception as error:  # whatever a broken file makes Pillow, zlib or zipfile raise
        raise BadItem(one_line(error)) from error


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
