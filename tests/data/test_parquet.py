"""Parquet says what a .tsv says, with images as paths or inside as Hugging Face stores them; damage is one line."""

import io
import json
import pickle

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.data.test_loader import assert_same, first, reader  # noqa: F401
from tests.data.test_remote import server
from tests.data.test_sources import COLOURS, error_of, everything, png, write_zip
from tinyclip.data import parquet as ours
from tinyclip.data.loader import PairLoader
from tinyclip.data.sources import BadItem, open_source

CAPTIONS = ["a rose", "grass", "the sky"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, columns, metadata=None, **how):
    table = pa.table(columns)
    parquet.write_table(table.replace_schema_metadata(metadata) if metadata else table, path, **how)
    return path


def encoded(path, form="struct", **how):
    data = [png(colour) for colour in COLOURS]
    images = [{"bytes": own, "path": f"{i}.png"} for i, own in enumerate(data)] if form == "struct" else data
    features = {"label": {"_type": "ClassLabel", "names": ["red", "dark_green", "blue"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"image": images, "caption": CAPTIONS, "split": ["train", "train", "dev"], "label": [0, 1, -1]}
    return write(path, columns, metadata, **how)


def test_a_table_of_paths_reads_like_a_tsv(tmp_path):
    write_zip(tmp_path / "images.zip", {f"{colour}.png": png(colour) for colour in COLOURS})
    columns = {
        "file": ["red.png", "red.png", "green.png"],
        "split": [1, 1, 2],
        "caption": [["a rose", "a dot"], ["more red"], ["grass"]],
    }
    source = open_source(f"{write(tmp_path / 't.parquet', columns)}?images=images.zip&label=split")
    assert everything(source) == [
        (COLOURS["red"], ("a rose", "a dot", "more red"), ("1",)),
        (COLOURS["green"], ("grass",), ("2",)),
    ]
    assert len(open_source(f"{tmp_path}/t.parquet?images=images.zip&where=split=2")) == 1


@pytest.mark.parametrize("form", ["struct", "binary"])
def test_images_inside_are_read_by_row(tmp_path, form):
    source = open_source(f"{encoded(tmp_path / 't.parquet', form, row_group_size=2)}?label=label")
    assert everything(source) == [
        (COLOURS["red"], ("a rose",), ("red",)),
        (COLOURS["green"], ("grass",), ("dark green",)),
        (COLOURS["blue"], ("the sky",), None),
    ]
    assert source.key(2) == "t.parquet/2"
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)


def test_where_and_limit_choose_rows_and_braces_name_several_files(tmp_path):
    for number in range(2):
        encoded(tmp_path / f"{number}.parquet")
    spec = f"{tmp_path}/{{0..1}}.parquet"
    assert [text for _, (text,), _ in everything(open_source(f"{spec}?where=split=train"))] == CAPTIONS[:2] * 2
    assert [text for _, (text,), _ in everything(open_source(f"{spec}?limit=4"))] == [*CAPTIONS, CAPTIONS[0]]
    assert len(open_source(f"{spec}?where=label=dark green&label=label")) == 2
    assert "no images where split=test" in error_of(f"{spec}?where=split=test")


def test_a_remote_table_reads_like_a_local_one(tmp_path):
    expected = everything(open_source(str(encoded(tmp_path / "t.parquet"))))
    system = fsspec.filesystem("memory")
    system.pipe("/tables/t.parquet", (tmp_path / "t.parquet").read_bytes())
    assert everything(open_source("memory://tables/t.parquet")) == expected
    assert len(open_source("memory://tables/t.parquet?where=split=dev")) == 1
    system.rm("/tables", recursive=True)
    with server(tmp_path) as web:  # it serves whole files only
        assert everything(open_source(f"{web.url}/t.parquet")) == expected
        assert web.asked == ["/t.parquet"]


def test_a_file_is_rewritten_once_and_within_the_cache(tmp_path, cache, monkeypatch):
    rewritten = []
    rewrite = ours._rewrite
    monkeypatch.setattr(ours, "_rewrite", lambda table, *rest: rewritten.append(table.name) or rewrite(table, *rest))
    path = encoded(tmp_path / "t.parquet")
    for _ in range(2):
        everything(open_source(str(path)))
    assert rewritten == [str(path)]
    (cache / "shards").rename(cache / "before")
    assert "too small for two windows of 8 shards" in error_of(f"{path}?cache_gb=1e-7")
    with pytest.raises(ValueError, match="no room for a file"):
        everything(open_source(f"{path}?cache_gb=1e-6"))


def test_missing_images_are_bad_items(tmp_path):
    images = [{"bytes": None, "path": "red.png"}, {"bytes": b"", "path": None}, {"bytes": None, "path": None}]
    (tmp_path / "red.png").write_bytes(png("red"))
    path = write(tmp_path / "t.parquet", {"image": images, "caption": ["a", "b", ""]})
    source = open_source(f"{path}?images=.")
    assert source.image(0).size == (8, 6) and source.captions(2) == ()
    for index, reason in ((1, "empty file"), (2, "no image bytes")):
        with pytest.raises(BadItem, match=reason):
            source.image(index)
    with pytest.raises(BadItem, match="no image bytes, and no file red.png"):
        open_source(str(path)).image(0)


def test_damaged_files_are_one_line(tmp_path):
    path = encoded(tmp_path / "t.parquet")
    data = path.read_bytes()
    for cut in (0, 3, 100, len(data) - 5):
        path.write_bytes(data[:cut])
        assert error_of(str(path)).startswith(f"{path}: not Parquet, or damaged: ")
    path.write_bytes(data[:4] + b"\xff" * 60 + data[64:])  # the footer is whole
    with pytest.raises(ValueError, match="not Parquet, or damaged"):
        everything(open_source(str(path)))


def test_wrong_columns_are_one_line(tmp_path):
    path = write(tmp_path / "0.parquet", {"image": [1], "caption": ["x"]})
    assert "column image: expected paths, bytes or a struct of bytes and path" in error_of(str(path))
    assert "no image column url; it has image, caption" in error_of(f"{path}?image=url")
    write(tmp_path / "1.parquet", {"image": [b""], "text": ["x"]})
    assert "1.parquet: its columns are not those of" in error_of(f"{tmp_path}/{{0..1}}.parquet")
    write(tmp_path / "2.parquet", {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    assert "no images" in error_of(f"{tmp_path}/2.parquet")
    error_of(str(tmp_path / "3.parquet"), FileNotFoundError)


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [pa.array([png("red")]), pa.array(["a"]), pa.array(["b"])]
    parquet.write_table(pa.Table.from_arrays(columns, ["image", "caption", "caption"]), tmp_path / "t.parquet")
    message = error_of(f"{tmp_path}/t.parquet")
    assert "t.parquet: expected columns of different names, got 'caption' twice: image, caption, caption" in message


@pytest.mark.parametrize("images", ["inside", "as paths"])
def test_columns_of_any_type_are_read(tmp_path, images):
    """Categories of pandas are dictionaries, of which every batch has its own; large and small types are alike."""
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    pictures = {"inside": pa.array([png(colour) for colour in COLOURS] * 200, pa.large_binary())}
    pictures["as paths"] = pa.array([f"{colour}.png" for colour in COLOURS] * 200).dictionary_encode()
    columns = {
        "image": pictures[images],
        "captions": pa.nulls(600),
        "caption": pa.array([f"caption {number}" for number in range(600)], pa.large_string()).dictionary_encode(),
        "title": pa.array([None, *("t" for _ in range(599))], pa.string()),
        "all.texts": pa.array([["a", None]] * 600, pa.large_list(pa.string())),
        "kind": pa.array(["x", None, "y"] * 200).dictionary_encode(),
    }
    path = write(tmp_path / "t.parquet", columns, row_group_size=300)
    source = open_source(f"{path}?label=kind")
    assert source.captions(0)[0] == "caption 0"
    assert [source.label(index) for index in range(3)] == [("x",), None, ("y",)]
    if images == "inside":
        assert [tuple(source.captions(number)) for number in (1, 599)] == [("caption 1",), ("caption 599",)]
    assert open_source(f"{path}?caption=all.texts").captions(0)[0] == "a"
    assert len(open_source(f"{path}?where=kind=&limit=1")) == 1 and "no images" in error_of(f"{path}?where=kind=None")
    assert len(open_source(f"{path}?where=title=;kind=x")) == 1


def test_a_table_of_paths_reads_the_columns_that_it_needs(tmp_path, monkeypatch):
    asked = []
    rows = ours._rows
    monkeypatch.setattr(ours, "_rows", lambda table, names, own: asked.append(names) or rows(table, names, own))
    (tmp_path / "red.png").write_bytes(png("red"))
    columns = {
        "file": ["red.png"],
        "thumbnail": [b"x" * 999],
        "page": ["a" * 999],
        "caption": ["a"],
        "split": ["dev"],
        "nsfw": [0.5],
    }
    source = open_source(f"{write(tmp_path / 't.parquet', columns)}?where=split=dev")
    assert source.captions(0) == ("a",) and source.flags(0) == {"nsfw": 0.5}
    assert asked == [["file", "caption", "split", "nsfw"]]


def test_batches_are_a_function_of_seed_and_step(tmp_path, reader):  # noqa: F811
    for number in range(4):
        encoded(tmp_path / f"{number}.parquet")
    source = open_source(f"{tmp_path}/{{0..3}}.parquet?window=2")
    settings = dict(source=source, readers=[reader], batch_size=3, seed=5)
    batches = first(PairLoader(**settings), 8)
    assert len({key for batch in batches[:4] for key in batch.keys}) == 12
    assert_same(first(PairLoader(**settings, workers=2), 8), batches)
    assert_same(first(PairLoader(**settings, start_step=5), 3), batches[5:])


def test_what_datasets_writes_is_what_we_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"image": [{"bytes": png("red"), "path": None}], "caption": ["a rose"], "label": [1]}
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(buffer)
    (tmp_path / "t.parquet").write_bytes(buffer.getvalue())
    assert everything(open_source(f"{tmp_path}/t.parquet?label=label")) == [(COLOURS["red"], ("a rose",), ("b",))]
