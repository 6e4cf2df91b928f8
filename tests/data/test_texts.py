"""Captions are drawn by their weights, class names become captions by templates, and wrong settings are one line."""

import pickle
from collections import Counter
from random import Random

import pytest

from tests.data.test_sources import error_of, png, write_tar
from tinyclip.data.sources import open_source
from tinyclip.data.spec import DataSpec
from tinyclip.data.texts import Weighted, Words, chosen, draw, joined

ROW = {"original": "IMG 1", "synthetic": ["a cat", "a small cat"], "name": "tabby"}


def words(**fields):
    return Words(DataSpec(path="t.tsv", **fields), list(ROW))


def test_a_column_keeps_its_weight_whatever_the_number_of_its_texts():
    captions = words(captions="original:0.3|synthetic:0.7").captions(ROW)
    assert captions == ("IMG 1", "a cat", "a small cat") and captions.weights == (0.3, 0.35, 0.35)
    random = Random(0)
    drawn = Counter(captions[draw(captions, random)] for _ in range(10_000))
    assert abs(drawn["IMG 1"] / 10_000 - 0.3) < 0.015 and abs(drawn["a cat"] / 10_000 - 0.35) < 0.015


def test_the_weight_of_an_empty_column_goes_to_the_others():
    captions = words(captions="original:0.3|synthetic:0.7").captions({**ROW, "original": ""})
    assert captions == ("a cat", "a small cat") and captions.weights == (0.35, 0.35)
    assert words(captions="original:0.3|synthetic").captions({}) == ()


def test_templates_can_be_weighted_and_a_missing_weight_is_one():
    captions = words(captions="a picture: {name}|original:2").captions(ROW)
    assert captions == ("a picture: tabby", "IMG 1") and captions.weights == (1.0, 2.0)


def test_without_weights_every_caption_is_as_likely_and_drawn_as_by_random_choice():
    captions = ("a", "b", "c")
    assert [captions[draw(captions, Random(seed))] for seed in range(50)] == [
        Random(seed).choice(captions) for seed in range(50)
    ]


def test_weights_stay_with_their_texts():
    captions = Weighted(("a", "bb", "ccc"), (1.0, 2.0, 3.0))
    kept = chosen(captions, [True, False, True])
    assert kept == ("a", "ccc") and kept.weights == (1.0, 3.0)
    assert pickle.loads(pickle.dumps(captions)).weights == captions.weights
    assert joined([captions, kept]).weights == (1.0, 2.0, 3.0, 1.0, 3.0)
    assert joined([("a",), ("b",)]) == ("a", "b")


def test_class_names_teach_through_templates(tmp_path):
    (tmp_path / "t.txt").write_text("a photo of a {c}.\n\na drawing of a {}.\n")
    expected = ("a photo of a tabby.", "a drawing of a tabby.", "a photo of a cat.", "a drawing of a cat.")
    for templates in (tmp_path / "t.txt", "a photo of a {}.|a drawing of a {}."):
        own = words(label="name", templates=str(templates), sep="|")
        assert own.captions({"name": "tabby|cat"}) == expected and own.label({"name": "tabby|cat"}) == ("tabby", "cat")
        assert own.captions({"name": ""}) == ()


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_labelled_images_have_captions(tmp_path, form):
    if form == "folder":
        (tmp_path / "set/tabby").mkdir(parents=True)
        (tmp_path / "set/tabby/1.png").write_bytes(png("red"))
        spec = f"{tmp_path}/set?"
    else:
        write_tar(tmp_path / "1.tar", {"1.png": png("red"), "1.json": b'{"class": "tabby"}'})
        spec = f"{tmp_path}/1.tar?label=class&"
    assert open_source(f"{spec}templates=a {{}}.|the {{}}.").captions(0) == ("a tabby.", "the tabby.")


def test_wrong_settings_are_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"une photo d'un {} \xe9")
    table = tmp_path / "t.tsv"
    table.write_text("file\tname\n")
    for query, expected in {
        "caption=a&captions=b": "expected one of caption, captions and templates, got caption and captions",
        "templates=a {}": "templates are filled with the label: expected label=COLUMN too",
        "label=name&templates=a {}|a photo": "expected {}, the class name, in each, got 'a photo'",
        f"label=name&templates={tmp_path}/empty.txt": "expected at least one, the file is empty",
        f"label=name&templates={tmp_path}/latin.txt": "not UTF-8",
        "caption=": "expected a column, or a template",
        "captions=name:0|file": "expected COLUMN:WEIGHT|COLUMN:WEIGHT, got 'name:0'",
        "captions=name:1|title:2": "no column 'title'; it has file, name",
    }.items():
        assert expected in error_of(f"{table}?{query}")
