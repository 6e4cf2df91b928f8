"""Labelled images to classify: pictures, the number of each one's class, and how classes are put into words.

Four layouts are read, and nothing is unpacked to disk; only an id on the hub is downloaded, by `datasets`:

    open_webdataset    CLIP_benchmark's: classnames.txt, zeroshot_classification_templates.txt, SPLIT/nshards.txt,
                       SPLIT/0.tar ... with an image and a .cls (or .npy, where an image has several classes)
    open_folder        a folder or .zip of class folders
    open_torchvision   what a class of torchvision.datasets finds in its root
    open_huggingface   what `datasets` saved to a directory, or an id on the hub

and `labelled_set` takes any Source whose items have labels. Class numbers decide which words a picture is compared
with, so a folder whose names are not those of the classes is an error, and is not numbered in the order of its names.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from tinyclip.data.decode import BadItem, decode, one_line, to_rgb
from tinyclip.data.loader import LeftOut
from tinyclip.data.shards import Tars
from tinyclip.data.sources import Source, left_out, open_source
from tinyclip.evaluate.embed import texts_of
from tinyclip.evaluate.zeroshot import DEFAULT_TEMPLATES
from tinyclip.formats.files import read_json

Metric = Literal["accuracy", "mean_per_class", "mean_top1_top5", "roc_auc", "map_11point"]
Names = tuple[tuple[str, ...], ...]  # synonyms of each class

SEVERAL: Metric = "map_11point"  # for images of several classes, and for no others
MISSING_DATASETS = "this needs the datasets library: pip install 'tinyclip[suites]'"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
TYPES = ("classification", "multilabel")  # in dataset_type.txt; retrieval is the third
TORCHVISION_LABELS = ("targets", "labels", "_labels")


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """A split of a data set. Raises ValueError for an empty one, and for labels that have no class name."""

    name: str
    source: Source
    labels: tuple[int, ...]  # class number of each item of the source
    class_names: Names
    templates: tuple[str, ...]  # {} is the class name
    metric: str = "accuracy"
    label_sets: tuple[tuple[int, ...], ...] | None = None  # all classes of each item, where items have several

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError(f"{self.name}: expected images, the split is empty")
        if len(self.labels) != len(self.source):
            raise ValueError(f"{self.name}: expected a label for each of {len(self.source)} images, got {len(self)}")
        numbers = {number for numbers in self.label_sets or [self.labels] for number in numbers}
        if min(numbers) < 0 or max(numbers) >= len(self.class_names):
            raise ValueError(
                f"{self.name}: expected labels from 0 to {len(self.class_names) - 1}, as there are "
                f"{len(self.class_names)} class names, got {min(numbers)} to {max(numbers)}"
            )
        if self.metric not in get_args(Metric):
            raise ValueError(f"{self.name}: unknown metric {self.metric!r}; known: {', '.join(get_args(Metric))}")
        if (self.label_sets is not None) != (self.metric == SEVERAL):
            have = "one class" if self.label_sets is None else "several classes"
            raise ValueError(f"{self.name}: {self.metric} is not for images of {have}; only {SEVERAL} is for several")

    def __len__(self) -> int:
        return len(self.labels)


class Absent(NamedTuple):
    """A data set that a suite has and that could not be found."""

    name: str
    why: str


class Texts(NamedTuple):
    """How the classes are put into words, where that is known beside the data."""

    class_names: Names | None = None
    templates: tuple[str, ...] | None = None


NO_TEXTS = Texts()


# Sources.


class Subset:
    """Some items of another source; `why` says what is left out."""

    def __init__(self, source: Source, indices: Sequence[int], why: Mapping[str, int]) -> None:
        self.name, self._source, self._indices = source.name, source, tuple(indices)
        self.left_out = left_out(source) | dict(why)

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        return self._source.key(self._indices[index])

    def image(self, index: int) -> Image.Image:
        return self._source.image(self._indices[index])

    def captions(self, index: int) -> Sequence[str]:
        return self._source.captions(self._indices[index])

    def label(self, index: int) -> tuple[str, ...] | None:
        return self._source.label(self._indices[index])


class ByClass:
    """The items of a labelled set, each labelled with its class's names.

    Classes of equal names are numbered, so that labels tell apart what class numbers do. A training and a test split
    with the same class names have the same labels.
    """

    def __init__(self, labelled: LabelledSet) -> None:
        self.name, self._labelled, self._labels = labelled.name, labelled, list[tuple[str, ...]]()
        self.left_out = left_out(labelled.source)
        seen: Counter[tuple[str, ...]] = Counter()
        for names in labelled.class_names:
            self._labels.append((*names, str(seen[names])))
            seen[names] += 1

    def __len__(self) -> int:
        return len(self._labelled)

    def key(self, index: int) -> str:
        return self._labelled.source.key(index)

    def image(self, index: int) -> Image.Image:
        return self._labelled.source.image(index)

    def captions(self, index: int) -> Sequence[str]:
        return ()

    def label(self, index: int) -> tuple[str, ...]:
        return self._labels[self._labelled.labels[index]]


class Pairs:
    """(image, class number) pairs of torchvision. Its images are read by Pillow."""

    def __init__(self, name: str, pairs: Any) -> None:
        self.name, self._pairs = name, pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def image(self, index: int) -> Image.Image:
        try:
            return to_rgb(self._pairs[index][0])
        except Exception as error:  # whatever a broken file makes Pillow raise
            raise BadItem(one_line(error)) from error

    def captions(self, index: int) -> Sequence[str]:
        return ()

    def label(self, index: int) -> None:
        return None


class Table(Pairs):
    """Rows of `datasets`, with the encoded image in a column."""

    def __init__(self, name: str, rows: Any, column: str) -> None:
        super().__init__(name, rows)
        self._column = column

    def image(self, index: int) -> Image.Image:
        cell = self._pairs[index][self._column]
        return decode(lambda: cell["bytes"] or Path(cell["path"]).read_bytes())


class NumberedShards(Tars):
    """Shards whose samples have a class number (.cls), or one flag for each class (.npy), in place of texts."""

    def captions(self, index: int) -> Sequence[str]:
        return ()

    def label(self, index: int) -> None:
        return None

    def number(self, index: int) -> int:
        """Raises ValueError for a sample without one."""
        try:
            return int(self.read(index, "cls"))
        except KeyError:
            raise ValueError(f"{self.key(index)}: expected a class number in .cls, found no such file") from None
        except ValueError:
            raise ValueError(f"{self.key(index)}: expected a class number in .cls") from None

    def numbers(self, index: int) -> tuple[int, ...]:
        """Those whose flag is not 0. Raises ValueError where there are none."""
        try:
            flags = np.load(io.BytesIO(self.read(index, "npy")), allow_pickle=False)
            return tuple(np.flatnonzero(flags).tolist())
        except (KeyError, ValueError, OSError, EOFError, MemoryError) as error:  # a header may claim any length
            raise ValueError(f"{self.key(index)}: expected the classes in .npy: {one_line(error)}") from None


# Opening.


def labelled_set(
    name: str,
    source: Source,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    metric: str = "accuracy",
    class_names: Mapping[str, Sequence[str]] | Names | None = None,
) -> LabelledSet:
    """A labelled source; its items without a label, or with one that cannot be read, are left out, and counted.

    The classes are the labels that occur, sorted: by number where all are numbers. `class_names` gives their names by
    label, or in this order; numbers are then positions in it. Raises ValueError where their number does not match.
    """
    dropped = LeftOut()
    labels = texts_of(source, source.label, "labels", dropped)
    if len(labels) < len(source):
        source = Subset(source, tuple(labels), dropped.counts[source.name])
    found = tuple(sorted(set(labels.values()), key=_order))
    numbers, names = _numbered(name, found, class_names)
    return LabelledSet(name, source, tuple(numbers[own] for own in labels.values()), names, tuple(templates), metric)


def _numbered(
    name: str, found: Names, class_names: Mapping[str, Sequence[str]] | Names | None
) -> tuple[dict[tuple[str, ...], int], Names]:
    """The number of each label, and the names of each class."""
    numbers = {label: number for number, label in enumerate(found)}
    if class_names is None:
        return numbers, found
    if isinstance(class_names, Mapping):
        if missing := [label[0] for label in found if label[0] not in class_names]:
            raise ValueError(f"{name}: {len(missing)} labels have no class name; the first is {missing[0]!r}")
        return numbers, tuple(tuple(class_names[label[0]]) for label in found)
    if all(_is_number(label) for label in found):
        return {label: int(label[0]) for label in found}, class_names
    if len(class_names) != len(found):
        raise ValueError(f"{name}: expected {len(found)} class names, as many as labels, got {len(class_names)}")
    return numbers, class_names


def _is_number(label: Sequence[str]) -> bool:
    return len(label) == 1 and label[0].isascii() and label[0].isdigit()


def _order(label: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    return (int(label[0]), label) if _is_number(label) else (-1, label)


def open_webdataset(
    directory: Path, name: str, texts: Texts = NO_TEXTS, *, split: str = "test", metric: str = "accuracy"
) -> LabelledSet:
    """CLIP_benchmark's layout; what `texts` does not say, classnames.txt and the templates beside the data do.

    Raises ValueError or FileNotFoundError, one line, for a file that is missing or damaged.
    """
    kind = (_lines(directory / "dataset_type.txt") or ["classification"])[0].lower()
    if kind not in TYPES:
        raise ValueError(f"{directory}/dataset_type.txt: expected {' or '.join(TYPES)}, got {kind}")
    class_names = texts.class_names or _synonyms(_lines(directory / "classnames.txt"))
    templates = texts.templates or _lines(directory / TEMPLATES_FILE)
    if class_names is None or templates is None:
        file = "classnames.txt" if class_names is None else TEMPLATES_FILE
        raise ValueError(f"{directory}/{file}: expected this file, or another source of its content")
    num_shards = _lines(directory / split / "nshards.txt")
    if num_shards is None or len(num_shards) != 1 or not num_shards[0].isdigit():
        raise ValueError(f"{directory}/{split}/nshards.txt: expected the number of shards")
    shards = NumberedShards(name, (directory / split / f"{i}.tar" for i in range(int(num_shards[0]))))
    label_sets = tuple(map(shards.numbers, range(len(shards)))) if kind == "multilabel" else None
    if label_sets is not None and not all(label_sets):
        raise ValueError(f"{shards.key(label_sets.index(()))}: expected at least one class, its .npy has none")
    labels = (own[0] for own in label_sets) if label_sets is not None else map(shards.number, range(len(shards)))
    return LabelledSet(name, shards, tuple(labels), class_names, templates_from(templates), metric, label_sets)


def _lines(path: Path) -> list[str] | None:
    """Stripped, without blank ones at the end; None where there is no file."""
    if not path.is_file():
        return None
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def _synonyms(names: Iterable[str] | None) -> Names | None:
    return tuple((name,) for name in names) if names else None


def templates_from(lines: Iterable[str]) -> tuple[str, ...]:
    """CLIP_benchmark writes {c} for the class name, we {}."""
    return tuple(line.replace("{c}", "{}") for line in lines)


def open_folder(
    path: Path,
    name: str,
    texts: Texts = NO_TEXTS,
    *,
    numbers: Mapping[str, int] | None = None,
    metric: str = "accuracy",
) -> LabelledSet:
    """A folder or .zip of class folders. `numbers` says which class a folder is; others are left out.

    Without it folders are matched to class names by name, or are numbers themselves; without class names, folders are
    the classes. Raises ValueError where they do not match.
    """
    source = open_source({"path": str(path)})
    labels = [(source.label(index) or ("",))[0] for index in range(len(source))]
    folders = sorted(set(labels))
    if numbers is None:
        numbers, texts = _folder_numbers(name, folders, texts)
    keep = [index for index, label in enumerate(labels) if label in numbers]
    class_names = texts.class_names or ()
    own = tuple(numbers[labels[index]] for index in keep)
    others = Counter({"images in folders that are no class of it": len(labels) - len(keep)})
    subset = Subset(source, keep, +others)
    return LabelledSet(name, subset, own, class_names, texts.templates or DEFAULT_TEMPLATES, metric)


def _folder_numbers(name: str, folders: Sequence[str], texts: Texts) -> tuple[dict[str, int], Texts]:
    if texts.class_names is None:
        names = tuple((folder.replace("_", " "),) for folder in folders)
        return {folder: number for number, folder in enumerate(folders)}, texts._replace(class_names=names)
    return matched(name, folders, texts.class_names), texts


def matched(name: str, found: Sequence[str], class_names: Names) -> dict[str, int]:
    """The class number of each name that was found: itself where all are numbers, else that of the same name.

    Names are the same up to case and what separates words. Raises ValueError for a name of no class.
    """
    if all(_is_number([label]) for label in found):
        return {label: int(label) for label in found}
    numbers = {_plain(synonym): number for number, names in enumerate(class_names) for synonym in names}
    if unknown := [label for label in found if _plain(label) not in numbers]:
        raise ValueError(
            f"{name}: {len(unknown)} of {len(found)} classes of the data are not among its {len(class_names)} class "
            f"names; the first is {unknown[0]!r}. A suite file can give class_names by label"
        )
    return {label: numbers[_plain(label)] for label in found}


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def open_torchvision(
    dataset: Any, name: str, texts: Texts = NO_TEXTS, *, metric: str = "accuracy", separators: str = ""
) -> LabelledSet:
    """A data set of torchvision. Where `texts` has no class names its own are taken, with spaces for `separators`."""
    words = str.maketrans(dict.fromkeys(separators, " "))
    names = texts.class_names or _synonyms(str(own).translate(words) for own in dataset.classes)
    assert names is not None, f"torchvision's {type(dataset).__name__} has no class names"
    labels = tuple(int(number) for number in _torchvision_labels(dataset))
    return LabelledSet(name, Pairs(name, dataset), labels, names, texts.templates or DEFAULT_TEMPLATES, metric)


def _torchvision_labels(dataset: Any) -> Iterable[int]:
    """Without reading images where the data set keeps its labels: torchvision has no one name for them."""
    for attribute in TORCHVISION_LABELS:
        if (labels := getattr(dataset, attribute, None)) is not None:
            return labels
    if (samples := getattr(dataset, "_samples", None)) is not None:
        return [number for _, number in samples]
    return [dataset[index][1] for index in range(len(dataset))]


def is_saved(directory: Path) -> bool:
    """Whether `datasets` saved it: Dataset.save_to_disk or DatasetDict.save_to_disk."""
    return any((directory / file).is_file() for file in ("dataset_dict.json", "state.json"))


def saved_splits(directory: Path) -> tuple[str, ...]:
    """Of a saved DatasetDict; a saved Dataset has none."""
    path = directory / "dataset_dict.json"
    return tuple(read_json(path).get("splits", ())) if path.is_file() else ()


def open_huggingface(
    where: str | Path, name: str, texts: Texts = NO_TEXTS, *, split: str = "test", metric: str = "accuracy"
) -> LabelledSet:
    """A saved directory, or an id on the hub. It needs one image column and one column of class labels.

    Raises ValueError for another split, other columns, and classes that are not those of `texts`.
    """
    rows = _huggingface_rows(where, split)
    image, label, names = _columns(str(where), rows)
    encoded = rows.select_columns([image]).cast_column(image, type(rows.features[image])(decode=False))
    numbers = None if texts.class_names is None else matched(name, names, texts.class_names)
    labels = tuple(number if numbers is None else numbers[names[number]] for number in rows[label])
    class_names = texts.class_names or tuple((known.replace("_", " "),) for known in names)
    templates = texts.templates or DEFAULT_TEMPLATES
    return LabelledSet(name, Table(name, encoded, image), labels, class_names, templates, metric)


def _huggingface_rows(where: str | Path, split: str) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
    except ImportError:
        raise ValueError(f"{where}: {MISSING_DATASETS}") from None
    try:
        found = datasets.load_from_disk(str(where)) if isinstance(where, Path) else datasets.load_dataset(where)
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from None
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise ValueError(f"{where}: no split {split!r}; it has {', '.join(map(str, found))}")
    return found[split]


def _columns(where: str, rows: Any) -> tuple[str, str, list[str]]:
    """The image's column, the label's, and the names of its classes."""
    import datasets

    images = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{where}: expected one image column and one of class labels, got {images or 'none'} and {labels or 'none'}"
        )
    return images[0], labels[0], list(rows.features[labels[0]].names)
