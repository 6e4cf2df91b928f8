"""Tables and class folders: a list of images and their texts, beside a folder or .zip that holds the images."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from tinyclip.data.cache import digest
from tinyclip.data.decode import BadItem, decode
from tinyclip.data.files import Folder, Zip, check_is_file, is_hidden, left_out_line, open_files, plain_name
from tinyclip.data.flags import flags_in
from tinyclip.data.spec import DataSpec
from tinyclip.data.texts import WITHOUT_CAPTION, Words, joined

DELIMITERS = ",;|"  # beside the tab
IMAGE_FOLDER = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's endings
IMAGE_COLUMNS = ("file", "filepath", "image", "filename", "path")
Row = Mapping[str, Any]


class Item(NamedTuple):
    key: str  # the image's path inside the folder or zip
    captions: Sequence[str]
    label: tuple[str, ...] | None
    flags: Mapping[str, Any]  # of the first row


class Listed:
    """Images of a folder or zip, with the texts that a table or the class folders give them."""

    jpeg_side: int | None = None  # set by open_source

    def __init__(self, name: str, files: Folder | Zip, items: list[Item], left_out: dict[str, int]) -> None:
        self.name, self.files, self.items, self.left_out = name, files, items, left_out

    def __len__(self) -> int:
        return len(self.items)

    def key(self, index: int) -> str:
        return self.items[index].key

    def image(self, index: int) -> Image.Image:
        return decode(lambda: self.encoded(index), self.jpeg_side)

    def encoded(self, index: int) -> bytes:
        """The image's file."""
        return self.files.read(self.items[index].key)

    def captions(self, index: int) -> Sequence[str]:
        return self.items[index].captions

    def label(self, index: int) -> tuple[str, ...] | None:
        return self.items[index].label

    def flags(self, index: int) -> Mapping[str, Any]:
        return self.items[index].flags

    def version(self) -> str:
        """Changes with the content."""
        return digest(*self.items, *self.files.version(item.key for item in self.items))

    def traces(self) -> Iterator[tuple[object, object]]:
        """Of the texts and of each file what changes with its content, and when it was written."""
        yield from (((*item.captions, item.label), None) for item in self.items)
        yield from self.files.traces([item.key for item in self.items])


def open_table(spec: DataSpec) -> Listed:
    """A .tsv or .csv with a header; cells may be quoted as in CSV."""
    path = Path(spec.path)
    columns, rows = _read_table(path, spec)
    files = open_files(path.parent / (spec.images or ""))
    return listed(spec, files, columns, rows, image_column(spec, columns))


def open_folders(spec: DataSpec) -> Listed:
    """A folder or .zip of class folders: a table with the columns file and label.

    Images, classes and their order are those of torchvision's ImageFolder, without what is hidden. In a .zip a folder
    around all class folders changes nothing. Raises ValueError where all classes seem to lie in one folder.
    """
    files = open_files(Path(spec.path))
    left_out, images, folders = Counter(), [], set()
    for name in files.names(left_out):
        parts, is_image = files.parts(name), PurePosixPath(name).suffix.lower() in IMAGE_FOLDER
        is_folder, is_shown = name.endswith("/"), not any(map(is_hidden, parts))
        if is_shown:
            folders.add(parts if is_folder else parts[:-1])
        if is_folder or not (is_shown or is_image):
            continue
        if not is_shown:
            left_out["images that are hidden, or in a hidden folder"] += 1
        elif not is_image:
            left_out[f"files that are no {', '.join(IMAGE_FOLDER)}"] += 1
        elif len(parts) == 1:
            left_out["images in no class folder"] += 1
        else:
            images.append((parts, name))
    depth = _num_around([parts[:-1] for parts, _ in images]) if isinstance(files, Zip) else 0
    classes = {parts[depth] for parts, _ in images}
    if len(classes) == 1 and any(len(parts) > depth + 2 for parts, _ in images):
        one = classes.pop()
        raise ValueError(f"{spec.path}: expected a folder for each class, its one folder {one!r} holds folders")
    left_out["class folders without an image"] = len({own[depth] for own in folders if len(own) > depth} - classes)
    images.sort(key=lambda image: (image[0][depth], "/".join(image[0][:-1]), image[0][-1]))  # as ImageFolder walks
    rows = [{"file": name, "label": parts[depth]} for parts, name in images]
    return listed(spec.model_copy(update={"label": "label"}), files, ["file", "label"], rows, "file", +left_out)


def _num_around(folders: Sequence[tuple[str, ...]]) -> int:
    """How many folders stand around the class folders: those that all images share, unless they are a class."""
    shared = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*folders, strict=False)))
    return max(min([shared, *(len(own) - 1 for own in folders)]), 0)


def image_column(spec: DataSpec, columns: Sequence[str]) -> str:
    image = spec.image or next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image is None or image not in columns:
        known = ", ".join(columns)
        raise ValueError(f"{spec.name}: no image column {image or ' or '.join(IMAGE_COLUMNS)}; it has {known}")
    return image


def listed(
    spec: DataSpec,
    files: Folder | Zip,
    columns: Sequence[str],
    rows: Iterable[Row],
    image: str,
    left_out: Mapping[str, int] | None = None,
    words: Words | None = None,
) -> Listed:
    """Rows that name the same image are one item; rows that name none are counted, and images without any text.

    Raises ValueError where nothing is left, FileNotFoundError where images are missing.
    """
    words = words or Words(spec, columns)
    keep = row_filter(spec.where, columns, spec.name)
    by_image: dict[str, list[Row]] = {}
    ignored = Counter(left_out or {})
    for row in filter(keep, rows):
        if row[image]:
            by_image.setdefault(plain_name(row[image]), []).append(row)
        else:
            ignored["rows that name no image"] += 1
    items = list(islice(_items(spec.path, by_image.values(), image, words, ignored), spec.limit))
    require_images(len(items), spec, ignored)
    if missing := [item.key for item in items if item.key not in files]:
        raise FileNotFoundError(
            f"{spec.name}: {len(missing)} of {len(items)} images are not in {files.path}; the first is {missing[0]!r}"
        )
    return Listed(spec.name, files, items, dict(ignored))


def _items(
    name: str, by_image: Iterable[Sequence[Row]], image: str, words: Words, ignored: Counter[str]
) -> Iterator[Item]:
    """Those with a caption or a label; the others are counted."""
    for same in by_image:
        try:
            captions, label = joined([words.captions(row) for row in same]), words.label(same[0])
        except BadItem as error:
            raise ValueError(f"{name}: {same[0][image]}: {error}") from None
        if captions or label:
            yield Item(same[0][image], captions, label, flags_in(same[0]))
        else:
            ignored[WITHOUT_CAPTION] += 1


def require_images(num_images: int, spec: DataSpec, ignored: Mapping[str, int] | None = None) -> None:
    if not num_images:
        where = f" where {spec.where}" if spec.where else ""
        raise ValueError(f"{spec.name}: no images{where}{left_out_line(ignored or {})}")


def require_different(columns: Sequence[str], table: str) -> None:
    """Columns without a name may be several."""
    twice = [name for name, count in Counter(filter(None, columns)).items() if count > 1]
    if twice:
        raise ValueError(f"{table}: expected columns of different names, got {twice[0]!r} twice: {', '.join(columns)}")


def _delimiter(header: str, spec: DataSpec) -> str:
    """The spec's, or a tab if the header holds one, or else the one that gives the header a column of images.

    Raises ValueError where several do. Where none does, it is the one that makes the most columns.
    """
    if spec.delimiter is not None or "\t" in header:
        return spec.delimiter or "\t"
    columns = {own: next(csv.reader([header], delimiter=own), []) for own in DELIMITERS if own in header}
    wanted = {spec.image} if spec.image is not None else set(IMAGE_COLUMNS)
    fitting = [own for own in columns if wanted.intersection(columns[own])]
    if len(fitting) > 1:
        raise ValueError(f"cells may be separated by {' or '.join(fitting)}: say which, as delimiter={fitting[0]}")
    return fitting[0] if fitting else max(columns, key=lambda own: len(columns[own]), default=",")


def _read_table(path: Path, spec: DataSpec) -> tuple[list[str], list[dict[str, str]]]:
    quotes = spec.quotes
    check_is_file(path)
    with open(path, newline="", encoding="utf-8-sig") as file:
        line = 1
        try:
            header = file.readline()
            if "\0" in header:
                raise ValueError("expected text in UTF-8, got zero bytes (UTF-16?)")
            delimiter = _delimiter(header, spec)
            file.seek(0)
            quoting = csv.QUOTE_NONE if quotes == "none" else csv.QUOTE_MINIMAL
            reader = csv.reader(file, delimiter=delimiter, strict=True, quoting=quoting)
            columns, rows = next(reader, []), []
            for cells in reader:
                line = reader.line_num
                if cells and len(cells) != len(columns):
                    raise ValueError(f"expected {len(columns)} cells, as in the header, got {len(cells)}")
                if delimiter == "\t" and quotes is None and any("\n" in cell for cell in cells):
                    raise ValueError("a quoted cell of several lines; where it is meant so, say quotes=csv")
                if cells:
                    rows.append(dict(zip(columns, cells, strict=True)))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: near line {line}: expected UTF-8{_looks_like(path)}: {error}") from None
        except (csv.Error, ValueError) as error:
            unsure = isinstance(error, csv.Error) or "quoted" in str(error)
            hint = "; quotes=none takes quotes as they are" if unsure else ""
            raise ValueError(f"{path}: near line {line}: {error}{hint}") from None
    if not columns:
        raise ValueError(f"{path}: empty, expected a header line")
    require_different(columns, str(path))
    return columns, rows


def _looks_like(path: Path) -> str:
    with open(path, "rb") as file:
        return ", got UTF-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""


def conditions(where: str | None, columns: Sequence[str], table: str) -> list[tuple[str, str, bool]]:
    """'split=train;style!=noto' as (column, value, whether it is to be equal)."""
    found = []
    for text in where.split(";") if where else ():
        column, equals, value = text.partition("=")
        name = column.removesuffix("!")
        if not equals or name not in columns:
            raise ValueError(f"{table}: where {text!r}: expected column=value, columns are {', '.join(columns)}")
        found.append((name, value, not column.endswith("!")))
    return found


def row_filter(where: str | None, columns: Sequence[str], table: str) -> Callable[[Row], bool]:
    wanted = conditions(where, columns, table)
    return lambda row: all((_compared(row[name]) == value) is equal for name, value, equal in wanted)


def _compared(value: Any) -> str:
    """Null and NaN are as an empty cell."""
    return "" if value is None or value != value else str(value)
