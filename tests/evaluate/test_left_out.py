"""Every score says what it is not of: what is left out is counted by reason, told once, and stands in the JSON."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.evaluate.conftest import COLOURS, ColourModel, Pictures
from tests.evaluate.test_compare import QUICK, toy
from tests.evaluate.test_suites import write_model
from tests.test_cli import tiny  # noqa: F401  a fixture
from tinyclip.compress import compress
from tinyclip.data.loader import LeftOut
from tinyclip.embed import embed
from tinyclip.evaluate import answers, retrieval, zeroshot
from tinyclip.evaluate.compare import compare
from tinyclip.evaluate.compare_words import words
from tinyclip.evaluate.datasets import labelled_set
from tinyclip.evaluate.suites import run_suite
from tinyclip.formats import checkpoint
from tinyclip.recipe import Recipe

SET = Pictures(
    ("red", ["red"], ("red",)),
    (None, ["blue"], ("blue",)),
    ("green", [], None),
    ("blue", "broken", "broken"),
    ("blue", ["blue"], ("blue",)),
    (None, [], None),
)


def expected(noun: str) -> tuple[list[str], dict[str, int]]:
    """Lines, and counts; with the two that are scored they are all items."""
    return [
        f"toy: 2 left out: items without {noun}",
        f"toy: 1 left out: items whose {noun} cannot be read: item3: no JSON",
        "toy: 1 left out: images that cannot be read: item1: corrupt",
    ], {f"items without {noun}": 2, f"items whose {noun} cannot be read": 1, "images that cannot be read": 1}


def test_retrieval_counts_every_item_that_it_leaves_out(model):
    lines = []
    left_out = LeftOut(lines.append)
    scores = retrieval(model, SET, batch_size=4, left_out=left_out)
    assert (lines, left_out.counts) == (expected("captions")[0], {"toy": expected("captions")[1]})
    assert scores["images"] + sum(left_out.counts["toy"].values()) == len(SET)
    retrieval(model, SET, batch_size=3, left_out=left_out)
    assert len(lines) == 3  # the same again is not told again


def test_zero_shot_counts_every_item_that_it_leaves_out(model):
    model.scale = 10.0
    lines, again = [], []
    left_out = LeftOut(lines.append)
    scores = zeroshot(model, SET, left_out=left_out)
    assert (lines, left_out.counts) == (expected("labels")[0], {"toy": expected("labels")[1]})
    assert scores["n"] + sum(left_out.counts["toy"].values()) == len(SET)
    said = answers(model, labelled_set("named", SET), left_out=LeftOut(again.append))
    assert again == ["named" + line.removeprefix("toy").partition(": item3")[0] for line in lines]
    assert len(said.label_I) == 2 and said.item_I.tolist() == [0, 2]


def test_what_opening_left_out_is_told_too(model):
    lines = []
    source = Pictures(("red", ["red"], None), ("blue", ["blue"], None))
    source.left_out = {"rows that name no image": 1234}
    retrieval(model, source, left_out=LeftOut(lines.append))
    assert lines == ["toy: 1,234 left out: rows that name no image"]


def test_where_all_images_are_broken_the_error_says_why(model):
    with pytest.raises(ValueError, match="none of the 1 that have a text can be read: item0: corrupt$"):
        retrieval(model, Pictures((None, ["red"], None)))


def write_folders(root: Path, **colours: int) -> Path:
    """So many pictures of each colour; one more is broken, one hidden, and one has another ending."""
    for colour, number in colours.items():
        (root / colour).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (8, 8), COLOURS[colour]).save(root / colour / f"{index}.png")
    (root / "red/broken.jpg").write_bytes(b"<html>")
    (root / "red/.hidden.jpg").write_bytes(b"")
    (root / "red/notes.txt").write_bytes(b"")
    return root


HIDDEN = "images that are hidden, or in a hidden folder"
ENDINGS = "files that are no .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp"
OF_FOLDERS = {HIDDEN: 1, ENDINGS: 1, "images that cannot be read": 1}


def test_a_suite_counts_by_data_set(model, tmp_path):
    model.scale = 10.0
    write_folders(tmp_path / "test", red=3, blue=2)
    write_folders(tmp_path / "clean", red=1, green=1)
    (tmp_path / "clean/red/broken.jpg").unlink()
    entries = [{"name": "one", "data": "test"}, {"name": "two", "data": "clean"}]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    lines = []
    result = run_suite(model, str(tmp_path / "suite.yaml"), tmp_path, say=lines.append)
    assert result["left_out"] == {"one": OF_FOLDERS, "two": {HIDDEN: 1, ENDINGS: 1}}
    assert {name: scores["n"] for name, scores in result["datasets"].items()} == {"one": 5, "two": 2}
    assert "one: 1 left out: images that cannot be read: red/broken.jpg: not an image" in "\n".join(lines)


def test_a_probe_counts_its_training_images_apart(tmp_path):
    write_folders(tmp_path / "test", red=3, blue=2)
    write_folders(tmp_path / "train", red=4, blue=4)
    (tmp_path / "train/blue/too.jpg").write_bytes(b"")
    entry = {"name": "a", "data": "test", "train": "train"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"datasets": [entry]}))
    lines = []
    model = checkpoint.load(write_model(tmp_path / "model"))
    result = run_suite(model, str(tmp_path / "suite.yaml"), tmp_path, probe=True, say=lines.append)
    assert result["left_out"] == {"a": OF_FOLDERS, "a (train)": OF_FOLDERS | {"images that cannot be read": 2}}
    assert result["datasets"]["a"]["penultimate_probe_train_n"] == 8 and len(lines) == 7


def test_a_comparison_says_once_what_neither_model_saw():
    lines, models = [], [toy(ColourModel(), name) for name in ("teacher", "student")]
    items = [(colour, [colour], (colour,)) for colour in ("red", "blue", "green") * 2]
    source = Pictures(*items, (None, ["blue"], ("blue",)))
    found = compare(*models, [labelled_set("named", source)], source, QUICK, say=lines.append)
    told = [line for line in lines if "left out" in line]
    assert told == [f"{name}: 1 left out: images that cannot be read: item6: corrupt" for name in ("named", "toy")]
    assert asdict(found)["left_out"] == {name: {"images that cannot be read": 1} for name in ("named", "toy")}
    assert "left out of named: 1 images that cannot be read" in list(words(found))
    assert found.data_sets[0].n == found.retrieval.images == 6


def test_a_run_and_its_store_tell_what_their_data_leave_out(tmp_path):
    data = write_folders(tmp_path / "set", red=6, blue=5)
    recipe = Recipe.model_validate(
        {
            "teacher": str(write_model(tmp_path / "teacher")),
            "data": {"train": f"{data}?caption=label", "max_bad_share": 0.5},
            "store": {"views": 1},
            "stages": [{"name": "more", "distill": {"steps": 1, "batch_size": 4}}],
            "evaluation": {"zeroshot": str(data)},
            "device": "cpu",
        }
    )
    opened = [f"{data}: 1 left out: {reason}" for reason in (HIDDEN, ENDINGS)]
    unread = f"{data}: 1 left out: images that cannot be read: red/broken.jpg: not an image"
    stored, ran = [], []
    embed(recipe, tmp_path / "run", say=stored.append)
    assert stored[:2] == opened
    compress(recipe, tmp_path / "run", say=ran.append)
    assert ran[:2] == opened and [line.startswith(unread) for line in ran].count(True) == 2  # of teacher and student


def test_the_command_tells_on_stderr_and_in_its_json(tiny, tmp_path):  # noqa: F811
    model, data = write_model(tmp_path / "model"), write_folders(tmp_path / "set", red=3, blue=2)
    result = tiny("evaluate", model, "--zeroshot", data, "--json", "--out", tmp_path / "scores.json")
    scores = json.loads(result.out)
    assert result.status == 0 and scores["left_out"] == {str(data): OF_FOLDERS} and scores["n"] == 5
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert f"{data}: 1 left out: images that cannot be read: red/broken.jpg: not an image" in result.err
    clean = tiny("evaluate", model, "--retrieval", "scenes?count=4", "--json")
    assert clean.err == "" and "left_out" not in json.loads(clean.out)
