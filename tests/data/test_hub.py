"""What `datasets` saved or builds is read as it is; files that can be sought are streamed. Nothing is downloaded."""

import pickle

import datasets
import pytest

from tests.data.test_sources import COLOURS, error_of, everything, png, write_tar
from tinyclip.data.sources import open_source

EXPECTED = [
    (COLOURS["red"], ("a rose",), ("warm one",)),
    (COLOURS["green"], ("grass",), ("cold",)),
    (COLOURS["blue"], ("the sky",), ("cold",)),
]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def rows():
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "caption": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["warm_one", "cold"]),
        }
    )
    pictures = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    columns = {"picture": pictures, "caption": ["a rose", "grass", "the sky"], "kind": [0, 1, 1]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_saved_set_is_read_by_row(tmp_path, rows):
    rows.save_to_disk(str(tmp_path / "one"))
    spec = f"huggingface:{tmp_path}/one?label=kind"
    source = open_source(spec)
    assert everything(source) == EXPECTED
    assert everything(pickle.loads(pickle.dumps(source))) == EXPECTED
    assert everything(open_source(f"{spec}&where=kind=cold&limit=1")) == EXPECTED[1:2]
    assert "no images where kind=none" in error_of(f"{spec}&where=kind=none")
    assert "no column 'class'; it has caption, kind" in error_of(f"huggingface:{tmp_path}/one?label=class")


def test_how_a_saved_set_shows_its_rows_changes_nothing(tmp_path, rows):
    rows.with_format("numpy", columns=["caption"]).save_to_disk(str(tmp_path / "one"))
    assert everything(open_source(f"huggingface:{tmp_path}/one?label=kind")) == EXPECTED


def test_splits_are_chosen_by_name(tmp_path, rows):
    parts = {"train": rows.select([0, 1]), "test": rows.select([2])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    spec = f"huggingface:{tmp_path}/two?label=kind"
    assert everything(open_source(spec)) == EXPECTED[:2]
    assert everything(open_source(f"{spec}&split=test")) == EXPECTED[2:]
    assert "no split 'dev'; it has train, test" in error_of(f"{spec}&split=dev")


@pytest.mark.parametrize("streaming", ["", "&streaming=true"])
def test_parquet_files_are_read_whole_or_as_shards(tmp_path, rows, streaming):
    (tmp_path / "set").mkdir()
    for shard in range(3):
        rows.select([shard]).to_parquet(str(tmp_path / f"set/train-0000{shard}-of-00003.parquet"))
    source = open_source(f"huggingface:{tmp_path}/set?label=kind&image=picture{streaming}")
    assert everything(source) == EXPECTED
    assert (getattr(source, "groups", None) is not None) is bool(streaming)


def test_tar_files_are_streamed_as_shards(tmp_path):
    (tmp_path / "set").mkdir()
    for number, colour in enumerate(COLOURS):
        write_tar(tmp_path / f"set/train-{number}.tar", {"1.png": png(colour), "1.txt": colour.encode()})
    source = open_source(f"huggingface:{tmp_path}/set?streaming=true")
    assert everything(source) == [(rgb, (colour,), None) for colour, rgb in COLOURS.items()]


def test_what_cannot_be_streamed_or_found_is_one_line(tmp_path, rows):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"caption": "x"}\n')
    assert "only Parquet and tar files can be sought" in error_of(f"huggingface:{tmp_path}/set?streaming=true")
    rows.save_to_disk(str(tmp_path / "one"))
    assert "leave streaming out" in error_of(f"huggingface:{tmp_path}/one?streaming=true")
    for streaming in ("", "?streaming=true"):
        assert error_of(f"huggingface:{tmp_path}/none{streaming}").startswith(f"huggingface:{tmp_path}/none: ")
