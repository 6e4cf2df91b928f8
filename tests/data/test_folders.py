"""Class folders are torchvision's ImageFolder without what is hidden; whatever else is left out is counted."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from tinyclip.data.sources import left_out, open_source
from tinyclip.data.tables import IMAGE_FOLDER
from tinyclip.evaluate.suites import open_dataset

OTHER_ENDINGS = f"files that are no {', '.join(IMAGE_FOLDER)}"


def picture(file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, file_format)
    return buffer.getvalue()


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir(exist_ok=True)
        else:
            (root / name).write_bytes(picture())
    return root


def write_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"" if name.endswith("/") else picture())
    return path


def ours(path: Path) -> list[tuple[str, str]]:
    source = open_source({"path": str(path)})
    return [(source.key(index), *source.label(index)) for index in range(len(source))]


def theirs(path: Path) -> list[tuple[str, str]]:
    found = ImageFolder(str(path))
    return [(os.path.relpath(image, path), found.classes[number]) for image, number in found.samples]


def test_endings_are_torchvision_s():
    assert IMAGE_FOLDER == IMG_EXTENSIONS


@pytest.mark.parametrize(
    "names",
    [
        ("cat/0.jpg", "dog/0.jpg"),
        ("cat/0.JPG", "cat/1.JpEg", "cat/2.PNG", *(f"dog/a{ending}" for ending in IMG_EXTENSIONS)),
        ("cat/inner/0.jpg", "cat/1.jpg", "dog/inner/deep/0.jpg", "dog/inner.jpg", "dog/zebra.jpg"),
        ("cat/0.jpg", "cat-2/0.jpg", "cat 2/0.jpg", "Cat/0.jpg", "cat.d/0.jpg"),
        ("cat.jpg/0.jpg", "dog/a.jpg.png", "10/0.jpg", "9/0.jpg"),
        ("n01/images/0.JPEG", "n02/images/0.JPEG", "n02/boxes.txt", "words.txt"),
        ("a\\b/0.jpg", "a b/0 0.jpg", "a#b/0%20.jpg", "ünï/ö.jpg", "a&b/x;y|z.jpg"),
    ],
)
def test_images_classes_and_their_order_are_image_folder_s(tmp_path, names):
    write(tmp_path, *names)
    assert ours(tmp_path) == theirs(tmp_path) and len(ours(tmp_path)) == sum(
        not name.endswith(".txt") for name in names
    )


def test_links_to_folders_and_files_are_followed(tmp_path):
    write(tmp_path, "store/bird/0.jpg", "store/bird/chick/1.jpg", "store/one.jpg", "val/cat/0.jpg", "val/dog/0.jpg")
    (tmp_path / "val/bird").symlink_to(tmp_path / "store/bird")
    (tmp_path / "val/robin").symlink_to("../store/bird")  # the same folder a second time
    (tmp_path / "val/dog/linked.jpg").symlink_to(tmp_path / "store/one.jpg")
    assert ours(tmp_path / "val") == theirs(tmp_path / "val")
    assert [label for _, label in ours(tmp_path / "val")] == ["bird", "bird", "cat", "dog", "dog", "robin", "robin"]
    assert not left_out(open_source({"path": str(tmp_path / "val")}))
    (tmp_path / "linked").symlink_to("val")
    assert ours(tmp_path / "linked") == ours(tmp_path / "val")


def test_links_in_a_circle_and_to_nothing_are_counted(tmp_path):
    root = write(tmp_path / "val", "cat/0.jpg", "dog/in/1.jpg")
    for link, target in (("cat/up", ".."), ("dog/in/me", "../in"), ("cat/gone.jpg", "no.jpg"), ("dog/self", "self")):
        (root / link).symlink_to(target)
    os.mkfifo(root / "cat/pipe.jpg")
    assert ours(root) == [("cat/0.jpg", "cat"), ("dog/in/1.jpg", "dog")]
    assert left_out(open_source({"path": str(root)})) == {
        "links to a folder above them": 2,
        "links that lead nowhere": 2,
        "devices, pipes and sockets": 1,
    }


STRAY = [
    *("cat/0.jpg", "dog/0.jpg", "cat/._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "dog/.ipynb_checkpoints/0.png"),
    *("__MACOSX/cat/._0.jpg", "dog/@eaDir/0.jpg/THUMB.jpg", "cat/.DS_Store", "dog/Thumbs.db", "cat/0.jpg.part"),
    *("cat/1.gif", "loose.jpg", "empty/", "notes/readme.txt"),
]


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_what_is_hidden_empty_or_no_image_is_counted(tmp_path, form):
    path = write(tmp_path / "set", *STRAY) if form == "folder" else write_zip(tmp_path / "set.zip", *STRAY)
    assert ours(path) == [("cat/0.jpg", "cat"), ("dog/0.jpg", "dog")]
    assert left_out(open_source({"path": str(path)})) == {
        "images that are hidden, or in a hidden folder": 5,
        OTHER_ENDINGS: 4,
        "images in no class folder": 1,
        "class folders without an image": 2,
    }


@pytest.mark.parametrize("around", ["", "val/", "data/val/", "./", "val\\"])
def test_a_zip_of_a_folder_is_the_folder(tmp_path, around):
    names = ("cat/0.jpg", "cat/inner/1.jpg", "dog/0.jpg", "empty/")
    separator = around[-1] if around.endswith("\\") else "/"
    path = write_zip(tmp_path / "set.zip", *(around + name.replace("/", separator) for name in names[:3]))
    assert [label for _, label in ours(path)] == ["cat", "cat", "dog"]
    write_zip(tmp_path / "one.zip", *(around + "cat/" + name for name in ("0.jpg", "1.jpg")))
    assert {label for _, label in ours(tmp_path / "one.zip")} == {"cat"}


def test_one_folder_of_folders_is_refused(tmp_path):
    """It is one class for ImageFolder, and most likely the folder that was meant."""
    root = write(tmp_path / "set", "val/cat/0.jpg", "val/dog/0.jpg")
    with pytest.raises(ValueError, match="set: expected a folder for each class, its one folder 'val' holds folders$"):
        open_source(str(root))
    assert ours(root / "val") == theirs(root / "val")
    write_zip(tmp_path / "set.zip", "val/cat/0.jpg", "val/0.jpg")
    with pytest.raises(ValueError, match="set.zip: expected a folder for each class, its one folder 'val' holds"):
        open_source(str(tmp_path / "set.zip"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_in_a_zip_are_refused(tmp_path):
    write_zip(tmp_path / "set.zip", "cat/0.jpg", "dog/0.jpg", "cat/0.jpg")
    with pytest.raises(ValueError, match="set.zip: expected one file of each name, it holds 'cat/0.jpg' twice"):
        open_source(str(tmp_path / "set.zip"))
    (tmp_path / "list.tsv").write_text("file\tcaption\ncat/0.jpg\ta cat\n")
    with pytest.raises(ValueError, match="holds 'cat/0.jpg' twice"):
        open_source(str(tmp_path / "list.tsv?images=set.zip"))


def test_hidden_folders_do_not_shift_the_numbers_of_a_known_data_set(tmp_path):
    """FER2013's folders are numbered in their order; ImageNet's must all be WordNet ids."""
    pytest.importorskip("clip_benchmark")
    names = ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")
    write(tmp_path, *(f"fer2013/test/{name}/0.jpg" for name in names), "fer2013/test/.ipynb_checkpoints/0.jpg")
    labelled = open_dataset("fer2013", tmp_path)
    assert list(labelled.labels) == list(range(7))
    write(tmp_path, "imagenet-a/val/n01498041/0.JPEG", "imagenet-a/val/.ipynb_checkpoints/0.jpg")
    with pytest.raises(ValueError, match="expected 200 classes, got 1"):
        open_dataset("imagenet-a", tmp_path)
