"""Suites of zero-shot data sets: which data sets, their splits and metrics, their words, and one run over all of them.

`DATASETS` is the table. Class names and templates are read from the CLIP_benchmark package (LAION; those of the CLIP
authors' notebooks), which must be installed but is not imported, or from files that lie beside the data. Metrics are
those of Radford et al. 2021, appendix A, table 9: the mean over classes for Caltech-101, Oxford Pets, FGVC Aircraft
and Flowers102, the 11-point mAP for VOC2007, ROC AUC for Hateful Memes, the mean of top 1 and top 5 for Kinetics-700,
and accuracy for all others.

A data set is looked for under the data root, in folders with one of its names; what is not there is listed as absent,
and the mean says how many of how many data sets it is over.
"""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tinyclip.config import Config
from tinyclip.data.files import class_folders
from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import open_source
from tinyclip.data.spec import DataSpec, FromFile, is_remote, joined_paths
from tinyclip.evaluate.datasets import (
    TEMPLATES_FILE,
    Absent,
    ByClass,
    LabelledSet,
    Metric,
    Names,
    Texts,
    is_saved,
    labelled_set,
    open_folder,
    open_huggingface,
    open_torchvision,
    open_webdataset,
    saved_splits,
    templates_from,
)
from tinyclip.evaluate.embed import Model
from tinyclip.evaluate.linear_probe import probe as linear_probe
from tinyclip.evaluate.zeroshot import DEFAULT_TEMPLATES, SCORE_OF_METRIC, alike_line, answer_scores, answers
from tinyclip.formats.files import parse_json, read_json, read_text, read_yaml, validated

Split = Literal["train", "test"]
Folders = Literal["names", "wnids", "sorted", "objectnet"]

MISSING = "class names and templates of known data sets need CLIP_benchmark: pip install 'tinyclip[suites]'"
HUGGINGFACE = "huggingface:"  # before an id on the hub, in a suite file
NOT_FREE = "CLIP_benchmark has no class names and templates for it: they must lie beside the data"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A row of the table."""

    classes: int | None  # None: what the data says
    names: str | None = None  # key of CLIP_benchmark's class names; None: the data has them
    templates: str | None  # key of CLIP_benchmark's templates; None: the data has them
    metric: Metric = "accuracy"
    split: str = "test"  # of the original data set
    train: str = "train"
    benchmark: str  # its name in CLIP_benchmark
    folders: Folders = "names"  # what class folders are called; numbers are class numbers everywhere
    test_folders: tuple[str, ...] = ("test", "val")  # where class folders lie
    torchvision: tuple[str, Mapping[str, Any], Mapping[str, Any]] | None = None  # class, arguments for test, for train
    separators: str = ""  # of words in torchvision's class names


def _row(name: str, classes: int | None, **given: Any) -> tuple[str, DataSet]:
    settings: dict[str, Any] = {"benchmark": name, "templates": name} | given
    return name, DataSet(classes=classes, **settings)


def _splits(kind: str, train: str = "train", **both: Any) -> dict[str, Any]:
    return {"torchvision": (kind, {"split": "test", **both}, {"split": train, **both})}


_BY_TRAIN: tuple[Mapping[str, Any], Mapping[str, Any]] = {"train": False}, {"train": True}
_IMAGENET: dict[str, Any] = {
    "names": "imagenet1k",
    "templates": "imagenet1k",
    "folders": "wnids",
    "test_folders": ("val", "test", "ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val", "."),
}

DATASETS: Mapping[str, DataSet] = dict(
    [
        _row("food101", 101, separators="_", **_splits("Food101")),
        _row("cifar10", 10, benchmark="vtab/cifar10", torchvision=("CIFAR10", *_BY_TRAIN)),
        _row("cifar100", 100, benchmark="vtab/cifar100", torchvision=("CIFAR100", *_BY_TRAIN)),
        _row("birdsnap", 500, templates=None),
        _row("sun397", 397, separators="_/", split="test, in torchvision all", torchvision=("SUN397", {}, {})),
        _row("cars", 196, **_splits("StanfordCars")),
        _row(
            "fgvc_aircraft",
            100,
            metric="mean_per_class",
            train="trainval",
            **_splits("FGVCAircraft", train="trainval", annotation_level="variant"),
        ),
        _row("voc2007_multilabel", 20, metric="map_11point"),
        _row("dtd", 47, benchmark="vtab/dtd", split="test 1", **_splits("DTD")),
        _row(
            "pets",
            37,
            names="pets",
            metric="mean_per_class",
            benchmark="vtab/pets",
            train="trainval",
            **_splits("OxfordIIITPet", train="trainval"),
        ),
        _row(
            "caltech101",
            102,
            names="caltech101_vtab",
            metric="mean_per_class",
            benchmark="vtab/caltech101",
            split="VTAB's test: it has no own",
        ),
        _row(
            "flowers", 102, names="flowers", metric="mean_per_class", benchmark="vtab/flowers", **_splits("Flowers102")
        ),
        _row("mnist", 10, names="mnist", torchvision=("MNIST", *_BY_TRAIN)),
        _row("fer2013", 7, names="fer2013", folders="sorted"),
        _row("stl10", 10, **_splits("STL10")),
        _row("eurosat", 10, names="eurosat", benchmark="vtab/eurosat", split="VTAB's test: it has no own"),
        _row("resisc45", 45, benchmark="vtab/resisc45", split="VTAB's test: it has no own"),
        _row("gtsrb", 43, names="gtsrb", **_splits("GTSRB")),
        _row(
            "kitti_closest_vehicle_distance",
            4,
            names="kitti_closest_vehicle_distance",
            benchmark="vtab/kitti_closest_vehicle_distance",
        ),
        _row("country211", 211, names="country211", **_splits("Country211")),
        _row("pcam", 2, names="pcam", benchmark="vtab/pcam", **_splits("PCAM")),
        _row("ucf101", 101, templates=None, split="test 1, the middle frame"),
        _row("kinetics700", 700, templates=None, metric="mean_top1_top5", split="val, the middle frame"),
        _row("clevr_count_all", 8, names="clevr_count_all", benchmark="vtab/clevr_count_all", split="val"),
        _row("hateful_memes", 2, templates=None, metric="roc_auc", split="dev"),
        _row("renderedsst2", 2, **_splits("RenderedSST2")),
        _row("imagenet1k", 1000, split="val", **_IMAGENET),
        _row("imagenetv2", 1000, split="matched-frequency", **_IMAGENET),
        _row("imagenet_sketch", 1000, **_IMAGENET),
        _row("imagenet-a", 200, **_IMAGENET),
        _row("imagenet-r", 200, **_IMAGENET),
        _row("objectnet", 113, templates="imagenet1k", folders="objectnet", split="the classes that ImageNet has"),
        _row("voc2007", 20, split="test, each object cut out"),
        _row(
            "clevr_closest_object_distance",
            6,
            names="clevr_closest_object_distance",
            benchmark="vtab/clevr_closest_object_distance",
            split="val",
        ),
        _row("diabetic_retinopathy", 5, names="diabetic_retinopathy", benchmark="vtab/diabetic_retinopathy"),
        _row("dmlab", 6, names="dmlab", benchmark="vtab/dmlab"),
        _row("dsprites_label_orientation", None, benchmark="vtab/dsprites_label_orientation"),
        _row("dsprites_label_x_position", None, benchmark="vtab/dsprites_label_x_position"),
        _row("smallnorb_label_azimuth", None, benchmark="vtab/smallnorb_label_azimuth"),
        _row("smallnorb_label_elevation", None, benchmark="vtab/smallnorb_label_elevation"),
        _row("svhn", 10, names="svhn", benchmark="vtab/svhn", **_splits("SVHN")),
    ]
)

_WNID_OR_NUMBER = re.compile(r"n\d{8}|\d+")

CLIP27 = tuple(DATASETS)[: tuple(DATASETS).index("imagenet1k") + 1]
NOT_IN_CLIP23 = ("birdsnap", "ucf101", "kinetics700", "hateful_memes")  # not freely had
NOT_IN_VTAB = (*NOT_IN_CLIP23, "food101")

SUITES: Mapping[str, tuple[str, ...]] = {
    "clip27": CLIP27,
    "clip23": tuple(name for name in CLIP27 if name not in NOT_IN_CLIP23),
    "imagenet": ("imagenet1k", "imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "objectnet"),
    "vtab+": tuple(name for name in DATASETS if name not in NOT_IN_VTAB),
}


class Entry(Config):
    """A data set in a suite file: a name of the table, or one of one's own, which has `data`.

    Relative paths start at the data root, and without one at the suite file.
    """

    name: str = Field(min_length=1)
    data: str | None = Field(
        default=None,
        min_length=1,
        description="labelled images: a path or spec as for training, CLIP_benchmark's layout, what `datasets` saved, "
        "or huggingface:ID",
    )
    train: str | None = Field(default=None, description="the same for the probe's training images")
    split: str = Field(default="test", description="of what has splits")
    train_split: str = "train"
    class_names: str | None = Field(
        default=None, description=".txt, one name a line, or .json: a list, or an object by label; names or lists"
    )
    templates: str | tuple[str, ...] | None = Field(default=None, description=".txt or .json, or the templates")
    metric: Metric = "accuracy"

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_known_or_own(self) -> Self:
        if self.data is None and self.model_fields_set != {"name"}:
            raise ValueError(f"{self.name} has no data; a known data set has nothing but its name")
        return self


class SuiteFile(Config):
    datasets: tuple[Entry, ...] = Field(min_length=1)


Opener = Callable[[Split], LabelledSet | Absent]


def open_suite(
    suite: str, data_root: Path | None, *, split: Split = "test", allow_remote: bool = False
) -> tuple[list[LabelledSet], list[Absent]]:
    """The data sets of a suite that are there, opened, and those that are not. `suite` is a name or a YAML file.

    Raises ValueError for an unknown suite or data set, for one that is there and damaged, and, unless `allow_remote`,
    for a command (pipe:) in the file.
    """
    opened = [opener(split) for opener in _openers(suite, data_root, allow_remote).values()]
    return (
        [found for found in opened if isinstance(found, LabelledSet)],
        [found for found in opened if isinstance(found, Absent)],
    )


def check_suite(suite: str, data_root: Path | None) -> None:
    """Raises ValueError for an unknown suite or data set, and where the data root is needed and not there."""
    _openers(suite, data_root, allow_remote=False)


def run_suite(
    model: Model,
    suite: str,
    data_root: Path | None,
    *,
    probe: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    say: Callable[[str], None] = print,
    left_out: LeftOut | None = None,
    allow_remote: bool = False,
) -> dict[str, Any]:
    """Zero-shot scores of every data set that is there, with `probe` those of a linear probe too.

    {"suite", "datasets": {name: scores}, "absent": {name: why}, "mean": {"value", "low", "high", "of", "n_datasets"},
    "in_mean": {name: score}, "left_out": {name: {reason: number}}}: the mean is over `of` data sets of `n_datasets`,
    each by the score that `in_mean` names. With `probe` also "probe_absent": {name: why}. `say` is told what was left
    out, too. All sets are opened before the first is scored. Raises ValueError as `open_suite` does, where no data set
    is there, and for a model without a text tower.
    """
    openers = _openers(suite, data_root, allow_remote)
    test = {name: opener("test") for name, opener in openers.items()}
    present = {name: found for name, found in test.items() if isinstance(found, LabelledSet)}
    train = {name: _train(labelled, openers[name]) for name, labelled in present.items() if probe}
    if not present:
        first = next(found for found in test.values() if isinstance(found, Absent))
        raise ValueError(f"suite {suite}: none of its {len(test)} data sets is there; {first.name}: {first.why}")
    datasets, reading = {}, {"batch_size": batch_size, "workers": workers, "left_out": left_out or LeftOut(say)}
    for number, (name, labelled) in enumerate(present.items(), 1):
        say(f"{number} of {len(present)}: {name}, {len(labelled):,} images")
        datasets[name] = _scores(model, labelled, train.get(name), reading, say)
    in_mean = {name: SCORE_OF_METRIC[labelled.metric] for name, labelled in present.items()}
    result = {
        "suite": suite,
        "datasets": datasets,
        "absent": _absent(test.values()),
        "mean": {**_mean(datasets, in_mean), "of": len(present), "n_datasets": len(test)},
        "in_mean": in_mean,
        "left_out": reading["left_out"].counts,
    }
    return result | ({"probe_absent": _absent(train.values())} if probe else {})


def _mean(datasets: Mapping[str, Mapping[str, float]], in_mean: Mapping[str, str]) -> dict[str, float]:
    """ "value", and where every score has an interval "low" and "high": those add up as normal and independent."""
    value = statistics.fmean(datasets[name][score] for name, score in in_mean.items())
    widths = [
        datasets[name][f"{score}_high"] - datasets[name][f"{score}_low"]
        for name, score in in_mean.items()
        if f"{score}_low" in datasets[name]
    ]
    if len(widths) < len(in_mean):
        return {"value": value}
    half = math.hypot(*widths) / (2 * len(widths))
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def _train(labelled: LabelledSet, opener: Opener) -> LabelledSet | Absent:
    if labelled.label_sets is not None:
        return Absent(labelled.name, "its images have several classes, and a probe tells apart those that have one")
    return opener("train")


def _absent(opened: Iterable[LabelledSet | Absent]) -> dict[str, str]:
    return {found.name: found.why for found in opened if isinstance(found, Absent)}


def _scores(
    model: Model,
    labelled: LabelledSet,
    train: LabelledSet | Absent | None,
    reading: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, float]:
    said = answers(model, labelled, **reading)
    if line := alike_line(said.class_CE, labelled.class_names):
        say(f"{labelled.name}: {line}")
    scores = answer_scores(said, labelled.metric)
    if isinstance(train, LabelledSet):
        scores |= linear_probe(model, ByClass(train), ByClass(labelled), **reading)
    return scores


def _openers(suite: str, data_root: Path | None, allow_remote: bool) -> dict[str, Opener]:
    """Of each data set by name, what opens a split of it."""
    if suite in SUITES:
        return {name: partial(_open_known, name, _root(data_root, name)) for name in SUITES[suite]}
    path = Path(suite)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(f"suite {suite}: no such suite or YAML file (suites: {', '.join(SUITES)})")
    openers: dict[str, Opener] = {}
    for entry in _read(path).datasets:
        if entry.name in openers:
            raise ValueError(f"{path}: data set {entry.name} is named twice")
        if entry.data is None:
            openers[entry.name] = partial(_open_known, _known(entry.name, str(path)), _root(data_root, entry.name))
        else:
            openers[entry.name] = partial(_open_own, entry, entry.data, data_root or path.parent, allow_remote)
    return openers


def _root(data_root: Path | None, name: str) -> Path:
    if data_root is None:
        raise ValueError(f"{name}: expected the folder that data sets lie in: --data-root")
    if not data_root.is_dir():
        raise FileNotFoundError(f"{data_root}: no such folder of data sets")
    return data_root


def _known(name: str, where: str) -> str:
    if name not in DATASETS:
        raise ValueError(f"{where}: unknown data set {name} (known: {', '.join(DATASETS)})")
    return name


def _read(path: Path) -> SuiteFile:
    return validated(SuiteFile, read_yaml(path), f"suite {path}")


# Known data sets.


def open_dataset(name: str, data_root: Path, *, split: Split = "test") -> LabelledSet | Absent:
    """A data set of the table. Raises ValueError for an unknown one, and for one that is there and damaged."""
    return _open_known(_known(name, "data set"), data_root, split)


def _open_known(name: str, data_root: Path, split: Split) -> LabelledSet | Absent:
    row = DATASETS[name]
    folders = [data_root / folder for folder in _folder_names(name, row) if (data_root / folder).is_dir()]
    for opener in (_from_webdataset, _from_huggingface, _from_torchvision, _from_folder):
        for folder in folders if opener is not _from_torchvision else [*folders, data_root]:
            if (found := opener(name, row, folder, split)) is not None:
                return _checked(found, row)
    if folders:
        return Absent(name, f"{folders[0]} holds no {split} split in a layout that is read")
    return Absent(name, f"no folder {' or '.join(_folder_names(name, row))} in {data_root}")


def _folder_names(name: str, row: DataSet) -> list[str]:
    """Its name, and those that the data sets of CLIP_benchmark have on the hub, such as wds_vtab-cifar10."""
    names = dict.fromkeys([name, row.benchmark.replace("/", "-")])
    return [*names, *(f"wds_{own}" for own in names)]


def _checked(found: LabelledSet, row: DataSet) -> LabelledSet:
    if row.classes is not None and len(found.class_names) != row.classes:
        raise ValueError(f"{found.name}: expected {row.classes} classes, got {len(found.class_names)}")
    return found


def texts_of(name: str) -> Texts:
    """Class names and templates of a data set of the table, each None where only its data has them."""
    row = DATASETS[name]
    return Texts(
        None if row.names is None else tuple((own,) for own in _package_json("en_classnames.json")[row.names]),
        None
        if row.templates is None
        else templates_from(_package_json("en_zeroshot_classification_templates.json")[row.templates]),
    )


def _package_file(name: str) -> Path:
    spec = find_spec("clip_benchmark")
    if spec is None or spec.origin is None:
        raise ValueError(MISSING)
    return Path(spec.origin).parent / "datasets" / name


@cache
def _package_json(name: str) -> dict[str, list[str]]:
    return json.loads(_package_file(name).read_text(encoding="utf-8"))


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """WordNet ids of ImageNet's 1,000 classes in order: a list in CLIP_benchmark's source, which is not run."""
    tree = ast.parse(_package_file("builder.py").read_text(encoding="utf-8"))
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return tuple(ast.literal_eval(values["all_imagenet_wordnet_ids"]))


def _from_webdataset(name: str, row: DataSet, folder: Path, split: Split) -> LabelledSet | None:
    if not (folder / split / "nshards.txt").is_file():
        return None
    has_own = (folder / "classnames.txt").is_file() and (folder / TEMPLATES_FILE).is_file()
    return open_webdataset(folder, name, Texts() if has_own else texts_of(name), split=split, metric=row.metric)


def _from_huggingface(name: str, row: DataSet, folder: Path, split: Split) -> LabelledSet | None:
    if not is_saved(folder):
        return None
    parts = {"test": ["test", "validation", "valid", "val"], "train": ["train", row.train]}[split]
    part = next((part for part in parts if part in saved_splits(folder)), None)
    if part is None and (split == "train" or saved_splits(folder)):
        return None
    return open_huggingface(folder, name, _needed(name), split=part or split, metric=row.metric)


def _from_torchvision(name: str, row: DataSet, folder: Path, split: Split) -> LabelledSet | None:
    if row.torchvision is None or (split == "train" and row.torchvision[1] == row.torchvision[2]):
        return None  # torchvision does not split all of them
    import torchvision

    kind, *arguments = row.torchvision
    try:
        dataset = getattr(torchvision.datasets, kind)(folder, **arguments[split == "train"])
    except (RuntimeError, FileNotFoundError):  # "Dataset not found": it is for other layouts to be there
        return None
    return open_torchvision(dataset, name, _needed(name), metric=row.metric, separators=row.separators)


def _from_folder(name: str, row: DataSet, folder: Path, split: Split) -> LabelledSet | None:
    if row.folders == "objectnet":
        return _from_objectnet(name, folder) if split == "test" else None
    parts = (row.train, "train") if split == "train" else row.test_folders
    path = next((folder / part for part in parts if (folder / part).is_dir()), None)
    if path is None or (path == folder and not any(_WNID_OR_NUMBER.fullmatch(part.name) for part in folder.iterdir())):
        return None
    texts = _needed(name)
    if row.folders == "wnids":
        return _from_wnids(name, row, path, texts)
    if row.folders == "sorted" and texts.class_names is not None:
        numbers = {part: number for number, part in enumerate(class_folders(path))}
        return open_folder(path, name, texts, numbers=numbers, metric=row.metric)
    return open_folder(path, name, texts, metric=row.metric)


def _needed(name: str) -> Texts:
    """Raises ValueError where there is no source of templates but the data, and it brings none."""
    texts = texts_of(name)
    if texts.templates is None:
        raise ValueError(f"{name}: {NOT_FREE}")
    return texts


def _from_wnids(name: str, row: DataSet, path: Path, texts: Texts) -> LabelledSet:
    """Folders are named after WordNet ids, or are numbers as in ImageNet-V2. A and R have some of the classes."""
    folders = class_folders(path)
    if all(folder.isdigit() for folder in folders) or texts.class_names is None:
        return open_folder(path, name, texts, metric=row.metric)
    name_of = dict(zip(imagenet_wnids(), texts.class_names, strict=True))
    if unknown := [folder for folder in folders if folder not in name_of]:
        raise ValueError(f"{path}: expected folders named after ImageNet's WordNet ids, got {unknown[0]!r}")
    texts = texts._replace(class_names=tuple(name_of[folder] for folder in folders))
    return open_folder(path, name, texts, numbers={own: i for i, own in enumerate(folders)}, metric=row.metric)


def _from_objectnet(name: str, folder: Path) -> LabelledSet | None:
    """The classes that ImageNet has too, in the order of their folders, as in CLIP_benchmark."""
    images = folder / "objectnet-1.0" / "images"
    mappings = [folder, folder / "objectnet-1.0" / "mappings"]
    root = next((path for path in mappings if (path / "folder_to_objectnet_label.json").is_file()), None)
    if root is None or not images.is_dir():
        return None
    label_of = _texts(root / "folder_to_objectnet_label.json")
    known = read_json(root / "objectnet_to_imagenet_1k.json")
    folders = sorted(own for own, label in label_of.items() if label in known)
    class_names: Names = tuple((label_of[own].lower(),) for own in folders)
    texts = Texts(class_names, texts_of(name).templates)
    return open_folder(images, name, texts, numbers={own: i for i, own in enumerate(folders)})


def _texts(path: Path) -> dict[str, str]:
    """A JSON object of texts."""
    found = read_json(path)
    if not all(isinstance(own, str) for own in found.values()):
        raise ValueError(f"{path}: expected a text for each name")
    return found


# Own data sets.


def _open_own(own: Entry, data: str, root: Path, allow_remote: bool, split: Split) -> LabelledSet | Absent:
    """Where `train` is not given, the other split of what has splits."""
    data, part = (data, own.split) if split == "test" else (own.train or data, own.train_split)
    templates = DEFAULT_TEMPLATES if own.templates is None else _templates(own.templates, own.name, root)
    class_names = None if own.class_names is None else _class_names(root / own.class_names)
    texts = Texts(None if isinstance(class_names, dict) else class_names, templates)
    if data.startswith(HUGGINGFACE):
        return open_huggingface(data.removeprefix(HUGGINGFACE), own.name, texts, split=part, metric=own.metric)
    folder = root / data
    is_webdataset = (folder / part / "nshards.txt").is_file()
    if split == "train" and own.train is None and not is_webdataset and part not in saved_splits(folder):
        return Absent(own.name, f"its entry names no `train` images, and {data} has no split {part}")
    if is_webdataset:
        if own.templates is None and (folder / TEMPLATES_FILE).is_file():
            texts = texts._replace(templates=None)
        return open_webdataset(folder, own.name, texts, split=part, metric=own.metric)
    if is_saved(folder):
        return open_huggingface(folder, own.name, texts, split=part, metric=own.metric)
    spec = DataSpec.parse(FromFile(data), allow_remote=allow_remote)
    if spec.kind not in ("scenes", "mixture") and not is_remote(spec.path):
        spec = spec.model_copy(update={"path": "::".join(str(root / part) for part in joined_paths(spec.path))})
        if spec.kind not in ("shards", "parquet") and not Path(spec.path).exists():
            return Absent(own.name, f"no file or folder {spec.path}")
    return labelled_set(own.name, open_source(spec), templates, own.metric, class_names)


def _templates(given: str | Sequence[str], name: str, root: Path) -> tuple[str, ...]:
    content = _content(root / given) if isinstance(given, str) else given
    if not content or not all(isinstance(own, str) and ("{}" in own or "{c}" in own) for own in content):
        raise ValueError(f'{name}: expected templates like "a photo of a {{}}.", got {given}')
    return templates_from(content)


def _class_names(path: Path) -> Names | dict[str, tuple[str, ...]]:
    """A name or a list of synonyms for each class, in order or by label."""
    content = _content(path)
    classes = content.values() if isinstance(content, dict) else content
    synonyms = tuple((own,) if isinstance(own, str) else tuple(own) for own in classes if isinstance(own, str | list))
    if len(synonyms) != len(content) or not all(own and all(isinstance(n, str) for n in own) for own in synonyms):
        raise ValueError(f"{path}: expected a name or a list of names for each class")
    return dict(zip(content, synonyms, strict=True)) if isinstance(content, dict) else synonyms


def _content(path: Path) -> Any:
    """The lines of a .txt, or a list or an object of JSON."""
    text = read_text(path)
    is_json = path.suffix == ".json"
    content = parse_json(text, str(path)) if is_json else [line.strip() for line in text.rstrip().splitlines()]
    if not isinstance(content, dict | list) or not content:
        raise ValueError(f"{path}: expected a list or an object that is not empty")
    return content
