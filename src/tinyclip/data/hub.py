"""Sets of the Hugging Face hub, or in a directory, as its `datasets` library reads them: huggingface:ID or :DIRECTORY.

`datasets` downloads the whole set to its own cache. With `streaming` it only says which files the set has; Parquet and
tar files are then read as remote shards are, through the bounded cache. Files of another kind cannot be sought
without reading what lies before, so they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tinyclip.data.cache import digest
from tinyclip.data.decode import BadItem, decode, one_line
from tinyclip.data.files import check_size
from tinyclip.data.flags import flags_in, is_flag
from tinyclip.data.parquet import EncodedRows, named, objects_in, open_parquet
from tinyclip.data.shards import Shards
from tinyclip.data.spec import HUGGINGFACE, DataSpec
from tinyclip.data.tables import Listed, image_column, require_images, row_filter
from tinyclip.data.texts import Words

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes


def is_on_disk(path: str) -> bool:
    """Whether huggingface:... is a directory that `datasets` saved; anything else it may look for on the hub."""
    return any((Path(path.removeprefix(HUGGINGFACE)) / file).is_file() for file in SAVED)


def open_hub(spec: DataSpec) -> HubRows | EncodedRows | Shards | Listed:
    """Raises ValueError for a set, split or column that is not there, and for files that cannot be streamed."""
    where = spec.path.removeprefix(HUGGINGFACE)
    if spec.streaming:
        return _open_streaming(spec, where)
    return HubRows(spec, _rows(spec, where))


class HubRows:
    """Rows of `datasets`; each is an item."""

    jpeg_side: int | None = None  # set by open_source

    def __init__(self, spec: DataSpec, rows: Any) -> None:
        self.name = spec.path
        image = self._image_column(spec, rows)
        names = [column for column in rows.features if column != image]
        words = Words(spec, names, objects=objects_in(rows.features.arrow_schema))
        self._class_names = {name: kind.names for name, kind in rows.features.items() if hasattr(kind, "names")}
        keep = row_filter(spec.where, names, spec.path)
        if spec.where:
            texts = rows.select_columns(names)
            rows = rows.select([i for i, row in enumerate(texts) if keep(named(row, self._class_names))])
        rows = rows if spec.limit is None else rows.select(range(min(spec.limit, len(rows))))
        require_images(len(rows), spec)
        self._words, self._image = words, image
        self._texts = rows.select_columns(words.columns)
        self._flags = rows.select_columns([name for name in names if is_flag(name)])
        self._images = self._encoded_images(rows, image)

    @staticmethod
    def _image_column(spec: DataSpec, rows: Any) -> str:
        import datasets

        images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        return images[0] if spec.image is None and len(images) == 1 else image_column(spec, list(rows.features))

    @staticmethod
    def _encoded_images(rows: Any, image: str) -> Any:
        import datasets

        images = rows.select_columns([image])
        is_image = isinstance(rows.features[image], datasets.Image)
        return images.cast_column(image, datasets.Image(decode=False)) if is_image else images

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def image(self, index: int) -> Image.Image:
        return decode(lambda: self.encoded(index), self.jpeg_side)

    def encoded(self, index: int) -> bytes:
        """The image's file. Raises BadItem."""
        cell = self._images[index][self._image]
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None and path and Path(path).is_file():
            check_size(Path(path).stat().st_size)
            data = Path(path).read_bytes()
        if not isinstance(data, bytes):
            raise BadItem("no image bytes and no file")
        check_size(len(data))
        return data

    def captions(self, index: int) -> Sequence[str]:
        return self._words.captions(self._row(index))

    def label(self, index: int) -> tuple[str, ...] | None:
        return self._words.label(self._row(index))

    def flags(self, index: int) -> dict[str, Any]:
        return flags_in(named(self._flags[index], self._class_names)) if self._flags.column_names else {}

    def _row(self, index: int) -> dict[str, Any]:
        return named(self._texts[index], self._class_names)

    def version(self) -> str:
        """Changes with the content."""
        return digest(self._images._fingerprint, self._texts._fingerprint, len(self))

    def traces(self) -> Iterator[tuple[object, object]]:
        """Its fingerprint, which changes with the content, and with how and where it was made."""
        yield len(self), (self._images._fingerprint, self._texts._fingerprint)


def _datasets(where: str) -> Any:
    try:
        import datasets

        return datasets
    except ImportError:
        raise ValueError(f"{where}: needs the datasets library: pip install 'tinyclip[data]'") from None


def _rows(spec: DataSpec, where: str) -> Any:
    datasets = _datasets(spec.path)
    saved = any((Path(where) / file).is_file() for file in SAVED)
    try:
        found = datasets.load_from_disk(where) if saved else datasets.load_dataset(where, spec.config)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{spec.path}: {one_line(error)}") from None
    if isinstance(found, datasets.Dataset):
        return found.with_format(None)  # tensors are no texts, and a saved set can say which columns are shown
    if spec.split not in found:
        raise ValueError(f"{spec.path}: no split {spec.split!r}; it has {', '.join(map(str, found))}")
    return found[spec.split].with_format(None)


def _open_streaming(spec: DataSpec, where: str) -> EncodedRows | Shards | Listed:
    datasets = _datasets(spec.path)
    if any((Path(where) / file).is_file() for file in SAVED):
        raise ValueError(f"{spec.path}: saved sets are on disk already: leave streaming out")
    try:
        builder = datasets.load_dataset_builder(where, spec.config)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{spec.path}: {one_line(error)}") from None
    files = {str(split): [str(file) for file in found] for split, found in (builder.config.data_files or {}).items()}
    if spec.split not in files:
        raise ValueError(f"{spec.path}: no split {spec.split!r}; it has {', '.join(files) or 'none'}")
    paths = files[spec.split]
    if all(path.endswith(".parquet") for path in paths):
        return open_parquet(spec, paths)
    if all(path.endswith(".tar") for path in paths):
        return Shards(spec, paths)
    raise ValueError(
        f"{spec.path}: only Parquet and tar files can be sought, {paths[0]} is neither: leave streaming out"
    )
