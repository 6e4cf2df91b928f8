"""Every layout gives the same pictures, class numbers and words, and what is damaged is one line."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from tests.evaluate.conftest import COLOURS, Pictures
from tinyclip.data.sources import BadItem
from tinyclip.evaluate.datasets import (
    ByClass,
    LabelledSet,
    Texts,
    labelled_set,
    matched,
    open_folder,
    open_huggingface,
    open_torchvision,
    open_webdataset,
    saved_splits,
)
from tinyclip.evaluate.zeroshot import DEFAULT_TEMPLATES

NAMES = ("red", "light green", "blue")
PIXELS = {"red": COLOURS["red"], "light green": COLOURS["green"], "blue": COLOURS["blue"]}
TEXTS = Texts(tuple((name,) for name in NAMES), ("a {} picture.",))
NUMBERS = (2, 0, 1, 1)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), PIXELS[NAMES[number]]).save(file, "PNG")
    return file.getvalue()


def write_webdataset(directory: Path, samples, *, split="test", names=NAMES, templates=("a {c} picture.",), shards=2):
    """CLIP_benchmark's layout; a sample is extension -> bytes."""
    part = directory / split
    part.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(part / f"{shard}.tar", "w") as tar:
            for index, sample in list(enumerate(samples))[shard::shards]:
                for extension, data in sample.items():
                    info = tarfile.TarInfo(f"s{index:07}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (part / "nshards.txt").write_text(f"{shards}\n")
    if names:
        (directory / "classnames.txt").write_text("\n".join(names) + "\n")
    if templates:
        (directory / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    return directory


def numbered(numbers=NUMBERS):
    return [{"png": png(number), "cls": str(number).encode()} for number in numbers]


def assert_right(labelled: LabelledSet, numbers=NUMBERS):
    assert [names[0] for names in labelled.class_names] == [*NAMES] and labelled.templates == ("a {} picture.",)
    assert labelled.labels == tuple(numbers) and len(labelled) == len(labelled.source) == len(numbers)
    for index, number in enumerate(numbers):
        assert labelled.source.image(index).convert("RGB").getpixel((3, 3)) == PIXELS[NAMES[number]]


def test_clip_benchmarks_layout(tmp_path):
    labelled = open_webdataset(write_webdataset(tmp_path, numbered()), "toy", metric="mean_per_class")
    assert_right(labelled, (2, 1, 0, 1))  # shard by shard
    assert labelled.metric == "mean_per_class" and labelled.source.key(0).endswith("0.tar/s0000000")


def test_words_that_are_given_come_before_those_beside_the_data(tmp_path):
    write_webdataset(tmp_path / "bare", numbered(), names=(), templates=())
    assert_right(open_webdataset(tmp_path / "bare", "toy", TEXTS), (2, 1, 0, 1))
    write_webdataset(tmp_path / "own", numbered(), names=("a", "b", "c"))
    assert open_webdataset(tmp_path / "own", "toy", TEXTS).class_names == TEXTS.class_names
    assert open_webdataset(tmp_path / "own", "toy").class_names == (("a",), ("b",), ("c",))


def flags(*values) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=np.float32))
    return file.getvalue()


def test_images_of_several_classes(tmp_path):
    samples = [{"png": png(0), "npy": flags(0, 1, 1)}, {"png": png(0), "npy": flags(1, 0, 0)}]
    (write_webdataset(tmp_path, samples) / "dataset_type.txt").write_text("multilabel\n")
    labelled = open_webdataset(tmp_path, "toy", metric="map_11point")
    assert labelled.label_sets == ((1, 2), (0,)) and labelled.labels == (1, 0)


def unmake(kind: str, directory: Path) -> None:
    """What can be wrong with CLIP_benchmark's layout."""
    if kind == "cut":
        whole = (directory / "test" / "1.tar").read_bytes()
        (directory / "test" / "1.tar").write_bytes(whole[:1024])
    elif kind in ("retrieval", "multilabel"):
        (directory / "dataset_type.txt").write_text(kind)
    elif kind == "no shard":
        (directory / "test" / "nshards.txt").write_text("3")
    elif kind == "no count":
        (directory / "test" / "nshards.txt").write_text("two")
    elif kind == "names":
        (directory / "classnames.txt").write_text("red\nblue")
    else:
        (directory / kind).unlink()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("cut", "1.tar: .*cut short"),
        ("retrieval", "expected classification or multilabel, got retrieval"),
        ("multilabel", "s0000000: expected the classes in .npy"),
        ("no shard", "2.tar"),
        ("no count", "nshards.txt: expected the number of shards"),
        ("names", "toy: expected labels from 0 to 1, as there are 2 class names, got 0 to 2"),
        ("classnames.txt", "classnames.txt: expected this file"),
        ("zeroshot_classification_templates.txt", "templates.txt: expected this file"),
    ],
)
def test_a_damaged_layout_is_one_line(tmp_path, kind, message):
    unmake(kind, write_webdataset(tmp_path, numbered()))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_webdataset(tmp_path, "toy")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls, message", [(None, "in .cls, found no"), (b"red", "in .cls"), (b"-1", "got -1 to 0")])
def test_a_sample_without_a_class_number_is_one_line(tmp_path, cls, message):
    sample = {"png": png(0)} | ({} if cls is None else {"cls": cls})
    with pytest.raises(ValueError, match=message):
        open_webdataset(write_webdataset(tmp_path, [*numbered((0, 0)), sample]), "toy")


def test_an_array_is_not_unpickled(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    write_webdataset(tmp_path, [{"png": png(0), "npy": file.getvalue()}], shards=1)
    (tmp_path / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(ValueError, match="expected the classes in .npy"):
        open_webdataset(tmp_path, "toy")


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="toy: expected images, the split is empty"):
        open_webdataset(write_webdataset(tmp_path, []), "toy")


def write_folders(directory: Path, folders: list[str], numbers=NUMBERS) -> Path:
    for index, number in enumerate(numbers):
        (directory / folders[number]).mkdir(parents=True, exist_ok=True)
        (directory / folders[number] / f"{index}.png").write_bytes(png(number))
    return directory


@pytest.mark.parametrize("folders", [["Red", "light_green", "blue"], ["0", "1", "2"]])
def test_class_folders_are_matched_by_name_or_number(tmp_path, folders):
    labelled = open_folder(write_folders(tmp_path, folders), "toy", TEXTS)
    assert_right(labelled, tuple(sorted(NUMBERS)) if folders[0] == "0" else (0, 2, 1, 1))


def test_given_numbers_leave_other_folders_out(tmp_path):
    labelled = open_folder(write_folders(tmp_path, ["x", "y", "z"]), "toy", TEXTS, numbers={"x": 0, "z": 2})
    assert_right(labelled, (0, 2))


def test_folders_without_class_names_are_the_classes(tmp_path):
    labelled = open_folder(write_folders(tmp_path, ["c", "a_b", "d"]), "toy")
    assert labelled.class_names == (("a b",), ("c",), ("d",)) and labelled.templates == DEFAULT_TEMPLATES


def test_folders_that_are_not_the_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 of 3 classes of the data are not among its 3 class names.*'scarlet'"):
        open_folder(write_folders(tmp_path, ["scarlet", "light_green", "blue"]), "toy", TEXTS)
    assert matched("toy", ["BLUE", "light-green"], TEXTS.class_names or ()) == {"BLUE": 2, "light-green": 1}


# torchvision: its classes read what is written here in the layouts that it downloads.


def test_torchvisions_mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 3, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 3) + bytes([7, 0, 9]))
    labelled = open_torchvision(torchvision.datasets.MNIST(tmp_path, train=False), "mnist")
    assert labelled.labels == (7, 0, 9) and labelled.class_names[7] == ("7 - seven",)
    assert np.array_equal(np.asarray(labelled.source.image(1).convert("L")), pixels[1])


def test_torchvisions_textures_and_their_names(tmp_path):
    root = tmp_path / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    write_folders(root / "images", ["red", "light_green", "blue"])
    lines = [f"{folder.name}/{file.name}" for folder in (root / "images").iterdir() for file in folder.iterdir()]
    (root / "labels" / "test1.txt").write_text("\n".join(sorted(lines)))
    labelled = open_torchvision(torchvision.datasets.DTD(tmp_path, split="test"), "dtd", separators="_")
    assert labelled.class_names == (("blue",), ("light green",), ("red",)) and labelled.labels == (0, 1, 1, 2)
    assert labelled.source.image(3).getpixel((0, 0)) == PIXELS["red"]


def test_a_broken_picture_of_torchvision_is_a_bad_item(tmp_path):
    class Broken:
        classes, targets = ("a", "b"), [0, 1]

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise OSError("broken\nfile")

    with pytest.raises(BadItem, match="^OSError: broken file$"):
        open_torchvision(Broken(), "toy").source.image(0)


# `datasets`


def save_rows(directory: Path, names: list[str]) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {
        "img": [{"bytes": png(number), "path": None} for number in NUMBERS],
        "label": [names.index(NAMES[number]) for number in NUMBERS],
    }
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"test": split, "train": split.select([0])}).save_to_disk(str(directory))
    return directory


def test_what_datasets_saved_is_matched_by_class_name(tmp_path):
    directory = save_rows(tmp_path / "toy", ["blue", "red", "light green"])
    assert set(saved_splits(directory)) == {"test", "train"}
    assert_right(open_huggingface(directory, "toy", TEXTS))
    assert open_huggingface(directory, "toy").class_names == (("blue",), ("red",), ("light green",))
    with pytest.raises(ValueError, match="no split 'val'; it has test, train"):
        open_huggingface(directory, "toy", split="val")


# Any labelled source.


def test_a_labelled_source_is_numbered_by_its_sorted_labels():
    source = Pictures(("red", [], ("red", "scarlet")), ("blue", [], None), ("blue", [], ("blue",)))
    labelled = labelled_set("toy", source)
    assert labelled.class_names == (("blue",), ("red", "scarlet")) and labelled.labels == (1, 0)
    assert [labelled.source.key(index) for index in range(2)] == ["item0", "item2"]  # the one without a label is out


def test_class_names_by_number_by_label_and_in_order():
    by_number = Pictures(("red", [], ("10",)), ("blue", [], ("9",)))
    assert labelled_set("toy", by_number).class_names == (("9",), ("10",))
    many = tuple((f"class {number}",) for number in range(11))
    assert labelled_set("toy", by_number, class_names=many).labels == (10, 9)
    by_label = Pictures(("red", [], ("n02",)), ("blue", [], ("n01",)))
    names = {"n01": ("fish",), "n02": ("hen", "cock")}
    assert labelled_set("toy", by_label, class_names=names).class_names == (("fish",), ("hen", "cock"))
    with pytest.raises(ValueError, match="toy: expected 2 class names, as many as labels, got 11"):
        labelled_set("toy", by_label, class_names=many)
    with pytest.raises(ValueError, match="toy: 1 labels have no class name; the first is 'n02'"):
        labelled_set("toy", by_label, class_names={"n01": ("fish",)})


def test_classes_of_equal_names_stay_apart():
    source = Pictures(*(("red", [], (label,)) for label in "012"))
    labelled = labelled_set("toy", source, class_names=(("crane",), ("missile",), ("crane",)))
    labels = [ByClass(labelled).label(index) for index in range(3)]
    assert labels == [("crane", "0"), ("missile", "0"), ("crane", "1")]


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="toy: unknown metric 'accurate'; known: accuracy, mean_per_class"):
        labelled_set("toy", Pictures(("red", [], ("red",))), metric="accurate")
