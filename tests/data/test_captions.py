"""What a caption is does not depend on the reader: no null, NaN or object is a text, and what has none is counted."""

import csv
import json
import math
from random import Random

import pytest
import torch

from tests.data.test_sources import error_of, png, write_tar
from tinyclip.data.loader import PairLoader, Reader
from tinyclip.data.sources import BadItem, left_out, open_source
from tinyclip.data.texts import texts
from tinyclip.preprocess import Preprocess

ONE_NULL = {"images without a caption": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))


def write_set(kind, folder, columns):
    """A set whose items have these captions, as this reader finds them; returns its spec."""
    folder.mkdir()
    num_items = len(next(iter(columns.values())))
    names = [f"{number}.png" for number in range(num_items)]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "shard":
        members = {}
        for name, row in zip(names, rows, strict=True):
            members |= {name: png("red"), name.replace("png", "json"): json.dumps(row).encode()}
        write_tar(folder / "0.tar", members)
        return f"{folder}/0.tar"
    if kind in ("table", "parquet of paths"):
        for name in names:
            (folder / name).write_bytes(png("red"))
    if kind == "table":
        with open(folder / "t.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows(
                [["file", *columns], *([name, *row.values()] for name, row in zip(names, rows, strict=True))]
            )
        return f"{folder}/t.csv"
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"image": [png("red")] * num_items, **columns}).save_to_disk(str(folder / "set"))
        return f"huggingface:{folder}/set"
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = {"file": names} if kind == "parquet of paths" else {"image": [png("red")] * num_items}
    parquet.write_table(pa.table({**images, **columns}), folder / "t.parquet")
    return f"{folder}/t.parquet"


VALUES = [
    (None, ()),
    ("", ()),
    (" \n\t", ()),
    (" a cat\n", ("a cat",)),
    (math.nan, ()),
    (math.inf, ()),
    (7, ("7",)),
    (1.5, ("1.5",)),
    (True, ()),
    ({"raw": "a cat"}, ()),
    ([], ()),
    (["a cat", None, " "], ("a cat",)),
    ([["a cat"], [], ["a dog", None]], ("a cat", "a dog")),
    ([{"raw": "a cat"}], ()),
]
READERS = ["shard", "table", "parquet of paths", "parquet of images", "hub"]


@pytest.mark.parametrize("kind", READERS)
def test_only_texts_and_numbers_are_captions_and_else_the_next_column_is_asked(tmp_path, kind):
    for number, (value, expected) in enumerate(VALUES):
        if kind == "table" and not isinstance(value, str | int | None):
            continue  # a cell is a text
        if kind == "table" and isinstance(value, bool):
            expected = ("True",)  # the cell's text
        spec = write_set(kind, tmp_path / str(number), {"caption": [value], "title": ["the next"], "class": ["c"]})
        assert tuple(open_source(spec).captions(0)) == (expected or ("the next",)), value
        if not isinstance(value, dict) and not (isinstance(value, list) and isinstance((value or [0])[0], dict)):
            assert tuple(open_source(f"{spec}?caption=caption&label=class").captions(0)) == expected, value


@pytest.mark.parametrize("kind", READERS)
def test_what_has_no_caption_is_left_out_and_counted(tmp_path, kind):
    captions = ["a cat", None, "a dog", ""]
    spec = write_set(kind, tmp_path / "set", {"caption": captions, "class": ["c"] * 4})
    source = open_source(f"{spec}?min_caption_chars=1")
    assert [tuple(source.captions(index)) for index in range(len(source))] == [("a cat",), ("a dog",)]
    assert left_out(source) == {"images without a caption": 2}
    assert len(open_source(f"{spec}?label=class")) == 4  # labels are enough for zero-shot
    if kind in ("table", "parquet of paths"):  # which read all captions when they are opened
        assert left_out(open_source(spec)) == {"images without a caption": 2}
        assert len(open_source(f"{spec}?limit=2")) == 2
    empty = write_set(kind, tmp_path / "empty", {"caption": ["", ""]})
    assert "left out: 2 images without a caption" in error_of(f"{empty}?min_caption_chars=1")


@pytest.mark.parametrize("kind", READERS[2:])
def test_bytes_are_texts_in_utf_8_or_a_broken_item(tmp_path, kind):
    spec = write_set(kind, tmp_path / "set", {"caption": ["Käse".encode(), None]})
    assert tuple(open_source(spec).captions(0)) == ("Käse",)
    spec = write_set(kind, tmp_path / "latin", {"caption": ["Käse".encode("latin-1")]})
    if kind == "parquet of paths":
        assert "0.png: expected a text in UTF-8" in error_of(spec)
    else:
        with pytest.raises(BadItem, match="expected a text in UTF-8"):
            open_source(spec).captions(0)


@pytest.mark.parametrize("kind", READERS[2:])
def test_a_column_of_objects_is_refused_where_it_is_asked_for(tmp_path, kind):
    spec = write_set(kind, tmp_path / "set", {"caption": [{"raw": "a cat"}], "all": [[{"raw": "a cat"}]], "t": ["x"]})
    assert "no caption column" in (message := error_of(spec)) and "caption (struct<raw: string>), all (list<" in message
    for query in ("caption=caption", "captions=all:1|t:2", "caption=a {t}&label=all"):
        assert "expected texts or lists of them, got" in error_of(f"{spec}?{query}")


def test_a_yes_or_no_is_a_class_but_no_caption(tmp_path):
    spec = write_set("shard", tmp_path / "set", {"caption": ["x", "y"], "indoors": [True, False]})
    source = open_source(f"{spec}?label=indoors&caption=indoors")
    assert [source.label(index) for index in range(2)] == [("True",), ("False",)]
    assert source.captions(0) == ()


def test_no_value_is_a_caption_as_python_writes_it():
    random = Random(0)

    def value(depth=0):
        kind = random.randrange(9 if depth < 3 else 7)
        scalars = ["a cat", " ", None, math.nan, True, 7, {"caption": "a dog"}]
        return scalars[kind] if kind < 7 else [value(depth + 1) for _ in range(random.randrange(4))]

    found = {text for _ in range(500) for text in texts("{caption}", {"caption": value()}, None)}
    assert found == {"a cat", "7"}


def test_lists_may_be_as_deep_as_json_allows():
    deep: list = ["a cat"]
    for _ in range(5000):
        deep = [deep]
    assert texts("{caption}", {"caption": deep}, None) == ("a cat",)


# Shards


def shard(tmp_path, *samples, name="0.tar"):
    """Each sample is its files by extension."""
    files = {f"{number}.png": png("red") for number in range(len(samples))}
    files |= {f"{number}.{kind}": data for number, own in enumerate(samples) for kind, data in own.items()}
    write_tar(tmp_path / name, files)
    return str(tmp_path / name)


def captions_of(spec):
    source = open_source(spec)
    return [tuple(source.captions(index)) for index in range(len(source))]


def test_the_txt_comes_before_the_json_and_a_key_says_otherwise(tmp_path):
    spec = shard(tmp_path, {"txt": b"of the txt", "json": b'{"caption": "of the json", "captions": ["a", "b"]}'})
    assert captions_of(spec) == [("of the txt",)]
    assert captions_of(f"{spec}?caption=caption") == [("of the json",)]
    assert captions_of(f"{spec}?captions=txt|captions") == [("of the txt", "a", "b")]


def test_what_one_file_of_a_sample_lacks_the_other_has(tmp_path):
    spec = shard(
        tmp_path,
        {"txt": b"0", "json": b'{"caption": null}'},
        {"txt": b"", "json": b'{"caption": "1"}'},
        {"txt": b" \n", "json": b'{"caption": {}, "title": "2"}'},
        {"txt": b"3", "json": b"null"},
        {"txt": b"4"},
        {"json": b'{"text": "5"}'},
        {"txt": b"", "json": b'{"caption": NaN, "url": "x"}'},
    )
    assert captions_of(spec) == [("0",), ("1",), ("2",), ("3",), ("4",), ("5",), ()]
    assert left_out(open_source(f"{spec}?min_caption_chars=1")) == ONE_NULL


def test_a_field_that_the_first_samples_lack_is_asked_all_the_same(tmp_path):
    samples = [{"txt": b"a cat"}] * 101 + [{"txt": b"", "json": b'{"title": "a dog"}'}]
    assert captions_of(shard(tmp_path, *samples))[-1] == ("a dog",)


def test_each_line_of_a_txt_is_a_caption_as_clip_benchmark_reads_sets_for_retrieval(tmp_path):
    """It calls str.splitlines (clip_benchmark/datasets/builder.py)."""
    text = "one\r\n two \n\nthree\u2028four"
    spec = shard(tmp_path, {"txt": f"\ufeff{text}\n".encode()})
    assert captions_of(spec) == [tuple(filter(None, map(str.strip, text.splitlines())))]
    assert captions_of(f"{spec}?lines=false") == [(text,)]
    assert captions_of(f"{spec}?lines=false&sep=%0A") == [("one", "two", "three\u2028four")]
    spec = shard(tmp_path, {"txt": b"one|two\nthree"}, name="1.tar")
    assert captions_of(f"{spec}?sep=|") == [("one", "two", "three")]
    assert "key 'lines' means nothing for table" in error_of("t.tsv?lines=false")


@pytest.mark.parametrize(
    "sample, reason",
    [
        ({"json": b'{"caption": "a", "caption": "b"}'}, "two fields are named 'caption'"),
        ({"json": b'[["caption", "a"]]'}, "expected an object, got list"),
        ({"json": b'"a cat"'}, "expected an object, got str"),
        ({"txt": "Käse".encode("utf-16")}, "can't decode byte 0xff"),
    ],
)
def test_a_text_that_cannot_be_read_is_a_bad_item(tmp_path, sample, reason):
    source = open_source(shard(tmp_path, {"json": b'{"caption": "good"}'}, sample))
    with pytest.raises(BadItem, match=f"^cannot read the text of 1: .*{reason}"):
        source.captions(1)


# What a run says


def test_a_batch_without_captions_names_the_key_that_leaves_them_out(tmp_path):
    source = open_source(shard(tmp_path, {"txt": b""}, {"txt": b""}, {"txt": b"a cat"}))
    unasked = Reader(Preprocess(size=16), lambda texts: torch.zeros(len(texts), 1))
    with pytest.raises(ValueError, match="no caption; the data's key min_caption_chars=1 leaves out") as caught:
        next(iter(PairLoader(source, [unasked], batch_size=3, seed=0)))
    assert "\n" not in str(caught.value)
