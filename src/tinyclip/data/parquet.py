"""Parquet tables: images as paths, or inside as bytes or a struct of bytes and path, as Hugging Face stores them.

A table of paths is like any other table. Images inside are compressed together with their neighbours, so one cannot be
read alone: each file is rewritten as Arrow record batches when its first row is asked for, into the bounded cache, and
mapped into memory from there. Such files are visited in windows, as remote tars are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from tinyclip.data.cache import Part, digest
from tinyclip.data.decode import BadItem, decode, one_line
from tinyclip.data.files import Folder, Zip, check_is_file, check_size, open_files
from tinyclip.data.flags import flags_in, is_flag
from tinyclip.data.patterns import paths_of
from tinyclip.data.remote import (
    NUM_THREADS,
    Remote,
    Transfer,
    ahead,
    check_room,
    describe,
    filesystem,
    item_names,
    transfer_of,
    tried,
    within,
)
from tinyclip.data.shards import WINDOW_SHARDS
from tinyclip.data.spec import DataSpec, is_remote
from tinyclip.data.tables import (
    Listed,
    conditions,
    image_column,
    listed,
    require_different,
    require_images,
    row_filter,
)
from tinyclip.data.texts import Words

ROWS_PER_BATCH = 256
ARROW_VERSION = 1
OPEN_FILES = 2 * WINDOW_SHARDS
T = TypeVar("T")


class Table(NamedTuple):
    """One file, as its footer describes it."""

    file: Path | Remote
    columns: tuple[str, ...]
    num_rows: int
    kinds: dict[str, str]  # path, encoded or other
    objects: dict[str, str]  # columns of neither texts nor lists of them, and their types
    class_names: dict[str, list[str]]  # of columns that Hugging Face calls ClassLabel
    cache_bytes: int  # about what it takes of the cache
    version: str

    @property
    def path(self) -> str:
        return self.file.url if isinstance(self.file, Remote) else str(self.file)

    @property
    def name(self) -> str:
        """For people."""
        return self.file.where if isinstance(self.file, Remote) else str(self.file)


def open_parquet(spec: DataSpec, paths: Sequence[str] | None = None) -> Listed | EncodedRows:
    """Raises ValueError for a file that is missing or damaged, and for files that have different columns."""
    _require_pyarrow(spec.name)
    transfer = transfer_of(spec)
    paths = paths_of(spec.path) if paths is None else paths
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        tables = list(pool.map(lambda path: _table(path, transfer), paths))
    first = tables[0]
    if different := [table for table in tables if table.columns != first.columns]:
        raise ValueError(f"{different[0].name}: its columns are not those of {first.name}: {', '.join(first.columns)}")
    image = image_column(spec, first.columns)
    if first.kinds[image] == "encoded":
        return EncodedRows(spec, tables, image, transfer)
    if first.kinds[image] == "other":
        raise ValueError(f"{spec.name}: column {image}: expected paths, bytes or a struct of bytes and path")
    files = open_files(_folder(spec, first))
    words = Words(spec, first.columns, objects=first.objects)
    wanted = [name for name, _, _ in conditions(spec.where, first.columns, spec.path)]
    names = list(dict.fromkeys([image, *words.columns, *wanted, *filter(is_flag, first.columns)]))
    rows = (row for table in tables for row in _rows(table, names, transfer))
    return listed(spec, files, first.columns, rows, image, words=words)


class EncodedRows:
    """Rows of Parquet files that hold encoded images; each row is an item."""

    jpeg_side: int | None = None  # set by open_source

    def __init__(self, spec: DataSpec, tables: Sequence[Table], image: str, transfer: Transfer) -> None:
        self.name, self.tables, self.image_column, self.transfer = spec.name, list(tables), image, transfer
        self.window, self._names = spec.window or WINDOW_SHARDS, item_names([table.path for table in tables])
        check_room(self.name, [table.cache_bytes for table in tables], self.window, transfer)
        names = [column for column in tables[0].columns if column != image]
        self._words = Words(spec, names, objects=tables[0].objects)
        self._flags = [name for name in names if is_flag(name)]
        self._files: Folder | Zip | None = open_files(_folder(spec, tables[0])) if spec.images else None
        kept = [_kept(spec, table, names, transfer) for table in tables]
        self.first = np.concatenate([[0], np.cumsum([len(rows) for rows in kept])])[: len(kept) + 1]
        self.rows = np.concatenate(kept)[: spec.limit]  # row in its file, of each item
        self.first = np.minimum(self.first, len(self.rows))
        require_images(len(self.rows), spec)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return f"{self._names[self._table_of(index)]}/{self.rows[index]}"

    def image(self, index: int) -> Image.Image:
        data = self.encoded(index)
        return decode(lambda: data, self.jpeg_side)

    def encoded(self, index: int) -> bytes:
        """The image's file. Raises BadItem, and ValueError for a table that cannot be fetched."""
        cell = self._row(index, [self.image_column])[self.image_column]
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None and path and self._files is not None and path in self._files:
            data = self._files.read(path)
        if data is None:
            raise BadItem(f"no image bytes{f', and no file {path} (images=FOLDER)' if path else ''}")
        check_size(len(data))
        return data

    def captions(self, index: int) -> Sequence[str]:
        return self._words.captions(self._text_row(index))

    def label(self, index: int) -> tuple[str, ...] | None:
        return self._words.label(self._text_row(index))

    def flags(self, index: int) -> dict[str, Any]:
        return flags_in(self._row(index, self._flags))

    def _text_row(self, index: int) -> dict[str, Any]:
        row = self._row(index, self._words.columns)
        return named(row, self.tables[self._table_of(index)].class_names)

    def _row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        return self._arrow(self.tables[self._table_of(index)]).row(int(self.rows[index]), columns)

    def _table_of(self, index: int) -> int:
        return int(np.searchsorted(self.first, index, side="right")) - 1

    def _arrow(self, table: Table) -> Arrow:
        name, columns = self._cached(table)
        path = self.transfer.cache.path(name, lambda part: _rewrite(table, columns, part, self.transfer))
        return Arrow.opened(str(path), os.getpid())

    def _cached(self, table: Table) -> tuple[str, list[str]]:
        columns = list(dict.fromkeys([self.image_column, *self._words.columns, *self._flags]))
        return digest("arrow", ARROW_VERSION, table.version, *columns), columns

    @property
    def groups(self) -> np.ndarray:
        return self.first

    def expect(self, groups: Sequence[int]) -> None:
        tables = [self.tables[number] for number in groups]
        ahead().want(str(id(self)), [(self._cached(table)[0], partial(self._arrow, table)) for table in tables])

    def version(self) -> str:
        """Changes with the content."""
        return digest(*(table.version for table in self.tables), *self.rows.tolist())

    def traces(self) -> Iterator[tuple[object, object]]:
        """Of each file what changes with its content, and when it was written."""
        for name, table in zip(self._names, self.tables, strict=True):
            if isinstance(table.file, Remote):
                yield (name, table.num_rows, table.file.size, table.file.version), None
            else:
                stat = os.stat(table.file)
                yield (name, table.num_rows, stat.st_size), stat.st_mtime_ns


class Arrow:
    """Record batches in a file, mapped into memory."""

    def __init__(self, path: str) -> None:
        import pyarrow

        self.reader = pyarrow.ipc.open_file(pyarrow.memory_map(path))
        sizes = [self.reader.get_batch(number).num_rows for number in range(self.reader.num_record_batches)]
        self.first = np.concatenate([[0], np.cumsum(sizes)])

    @staticmethod
    @lru_cache(maxsize=OPEN_FILES)
    def opened(path: str, process: int) -> Arrow:
        return Arrow(path)

    def row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        batch = int(np.searchsorted(self.first, number, side="right")) - 1
        found, within = self.reader.get_batch(batch), number - int(self.first[batch])
        return {column: found.column(column)[within].as_py() for column in columns}


def named(row: Mapping[str, Any], class_names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Class numbers as words; -1 is no class."""
    words = {
        column: names[number].replace("_", " ")
        for column, names in class_names.items()
        if isinstance(number := row.get(column), int) and 0 <= number < len(names)
    }
    missing = {column: None for column in class_names if column in row and column not in words}
    return {**row, **missing, **words}


def _require_pyarrow(where: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError(f"{where}: Parquet needs pyarrow: pip install 'tinyclip[data]'") from None


def _folder(spec: DataSpec, table: Table) -> Path:
    return (table.file.parent if isinstance(table.file, Path) else Path()) / (spec.images or "")


def _table(path: str, transfer: Transfer) -> Table:
    file = describe(path, transfer) if is_remote(path) else Path(path)
    if isinstance(file, Path):
        check_is_file(file)

    def of(parquet: Any) -> Table:
        schema, footer = parquet.schema_arrow, parquet.metadata
        require_different(schema.names, path)
        unpacked = sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))
        return Table(
            file=file,
            columns=tuple(schema.names),
            num_rows=footer.num_rows,
            kinds={field.name: _kind(field.type) for field in schema},
            objects=objects_in(schema),
            class_names=_class_names(schema),
            cache_bytes=unpacked + (file.size or 0 if isinstance(file, Remote) else 0),
            version=_version(file),
        )

    return _read(file, transfer, of)


def _version(file: Path | Remote) -> str:
    """Changes with the content."""
    if isinstance(file, Remote):
        return file.name
    stat = os.stat(file)
    return digest(file.resolve(), stat.st_size, stat.st_mtime_ns)


def _kind(column: Any) -> str:
    from pyarrow import types

    if types.is_dictionary(column):
        column = column.value_type
    if types.is_string(column) or types.is_large_string(column):
        return "path"
    if types.is_struct(column):
        return "encoded" if column.get_field_index("bytes") >= 0 else "other"
    return "encoded" if types.is_binary(column) or types.is_large_binary(column) else "other"


def objects_in(schema: Any) -> dict[str, str]:
    """Columns of structs or maps, or of lists of them, with their types: no text."""
    from pyarrow import types

    found = {}
    for field in schema:
        kind = field.type
        while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
        if types.is_nested(kind):
            found[field.name] = str(field.type)
    return found


def _class_names(schema: Any) -> dict[str, list[str]]:
    """As `datasets` writes them: {"info": {"features": {COLUMN: {"_type": "ClassLabel", "names": ...}}}}."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: list(kind["names"]) for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _kept(spec: DataSpec, table: Table, columns: Sequence[str], transfer: Transfer) -> np.ndarray:
    """The rows of a file that `where` keeps, int64."""
    wanted = [name for name, _, _ in conditions(spec.where, columns, spec.name)]
    if not wanted:
        return np.arange(table.num_rows)
    keep = row_filter(spec.where, columns, spec.name)
    return np.flatnonzero([keep(row) for row in _rows(table, wanted, transfer)])


def _rows(table: Table, columns: Sequence[str], transfer: Transfer) -> list[dict[str, Any]]:
    rows = _read(table.file, transfer, lambda parquet: parquet.read(columns=list(columns)).to_pylist())
    return [named(row, table.class_names) for row in rows]


def _rewrite(table: Table, columns: Sequence[str], part: Part, transfer: Transfer) -> None:
    import pyarrow

    def write(parquet: Any) -> None:
        part.restart()
        schema = pyarrow.schema([_without_dictionary(parquet.schema_arrow.field(column)) for column in columns])
        with pyarrow.ipc.new_file(pyarrow.PythonFile(part, "w"), schema) as sink:
            for batch in parquet.iter_batches(ROWS_PER_BATCH, columns=list(columns)):
                sink.write_batch(batch.select(list(columns)).cast(schema))

    if _version(table.file) != table.version:
        raise ValueError(f"{table.name}: has changed since it was opened")
    if isinstance(table.file, Path):
        _read(table.file, transfer, write)
        return
    with table.file.opened(transfer) as file:
        _parsed(table.name, lambda: write(_parquet_file(file)))


def _without_dictionary(field: Any) -> Any:
    """Of each value itself: a file of record batches can have one dictionary only."""
    from pyarrow import types

    return field.with_type(field.type.value_type) if types.is_dictionary(field.type) else field


def _read(file: Path | Remote, transfer: Transfer, action: Callable[[Any], T]) -> T:
    """action(pyarrow's ParquetFile); of a remote file only the parts that are asked for are read, where it can seek."""
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return _parsed(str(file), lambda: action(_parquet_file(opened)))
    with _seekable(file, transfer) as opened:
        return _parsed(file.where, lambda: tried(file.url, transfer, lambda: action(_parquet_file(opened))))


@contextmanager
def _seekable(file: Remote, transfer: Transfer) -> Iterator[Any]:
    system, path = filesystem(file.url, transfer)
    info = tried(file.url, transfer, lambda: within(transfer.timeout_s, lambda: system.info(path)))
    if file.url.startswith(("http://", "https://")) and not info.get("partial"):
        with file.opened(transfer) as whole:
            yield whole
        return
    with tried(file.url, transfer, lambda: system.open(path, "rb")) as opened:
        yield opened


def _parquet_file(opened: Any) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(opened)


def _parsed(name: str, action: Callable[[], T]) -> T:
    from pyarrow import ArrowException

    try:
        return action()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{name}: not Parquet, or damaged: {one_line(error)}") from None
