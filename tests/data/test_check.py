"""A data set's report says what is in it, broken items and all; its sheet shows pictures with their captions."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from tinyclip import cli
from tinyclip.data.check import Checking, Spread, check, flag_values, rows, spread, to_json
from tinyclip.data.contact_sheet import GAP, NUM_PICTURES, SIDE, Card, contact_sheet, fitted, sheet
from tinyclip.data.decode import BadItem
from tinyclip.data.flags import flags_in
from tinyclip.data.scenes import Scenes
from tinyclip.data.sources import open_source
from tinyclip.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.openai(8)


class Toy:
    """Items 0 and 3 are the same grey, 2 is broken, 4 has no caption, 5 is a line; some have flags."""

    name = "toy"
    sizes = ((8, 6), (20, 10), (1, 1), (8, 6), (6, 8), (2, 300))
    texts = (("a cat", "a dog"), ("a cat",), ("x",), ("one two three four five six seven eight",), (), ("a line",))

    def __len__(self):
        return len(self.sizes)

    def key(self, index):
        return f"item {index}"

    def image(self, index):
        if index == 2:
            raise BadItem("OSError: truncated (17 bytes not processed)")
        return Image.new("RGB", self.sizes[index], (40 * (index % 3),) * 3)

    def captions(self, index):
        return self.texts[index]

    def label(self, index):
        return ("odd",) if index % 2 else None

    def flags(self, index):
        return ({"opt_out": index == 0} if index < 3 else {}) | {"punsafe": index / 10}


def test_a_report_says_what_is_in_a_set(tokenizer):
    report = check(Toy(), tokenizer)
    assert (report.items, report.seen, report.images, report.pairs) == (6, 6, 5, 5)
    assert report.formats == {"drawn": 5} and report.classes == 1 and report.lines == 1
    assert report.width == pytest.approx(Spread(2, 2.8, 8, 8.8, 17.6, 20))
    assert report.shortest_side == pytest.approx(Spread(2, 2.8, 6, 6.0, 9.2, 10))
    assert report.without_caption == 1 and report.different_captions == 4
    assert (report.caption_tokens.least, report.caption_tokens.most) == (4, 10)
    assert (report.context_length, report.cut_captions) == (8, 1)
    assert report.duplicates == 1 and report.duplicate_groups == [(2, ["item 0", "item 3"])]
    assert report.broken == 1 and report.broken_reasons == {"OSError: truncated (N bytes not processed)": 1}
    assert report.broken_items == [("item 2", "OSError: truncated (17 bytes not processed)")]
    assert report.flags["opt_out"] == {"n": 2, "different": 2, "values": {"True": 1, "False": 1}}
    assert report.flags["punsafe"]["n"] == 5


def test_flags_are_counted_by_value_or_spread_where_they_are_many_numbers():
    assert flag_values([0, 1, 0]) == {"n": 3, "different": 2, "values": {"0": 2, "1": 1}}
    assert flag_values(["0.5", 0, 1, 2, 3, 4])["spread"] == pytest.approx(Spread(0, 0.125, 1.5, 1.75, 3.75, 4))
    assert flag_values(list("abcdefa")) == {"n": 7, "different": 6, "values": {"a": 2, "b": 1, "c": 1, "d": 1, "e": 1}}
    rows_shown = [text for name, text in rows(check(Toy(), Tokenizer.openai(8))) if name.startswith("field")]
    assert rows_shown == ["2 items: True 1, False 1", "5 items: 0.0 1, 0.1 1, 0.3 1, 0.4 1, 0.5 1"]


def test_workers_change_nothing_and_progress_adds_up(tokenizer):
    read = []
    assert check(Scenes("train", 150), tokenizer, Checking(workers=2), progress=read.append) == check(
        Scenes("train", 150), tokenizer
    )
    assert sum(read) == 150


def test_a_limit_reads_the_first_items(tokenizer):
    report = check(Toy(), tokenizer, Checking(limit=2))
    assert (report.items, report.seen, report.pairs, report.broken) == (6, 2, 3, 0)
    assert ("items", "6, the first 2 read") in rows(report)


def test_a_set_of_broken_items_has_a_report(tokenizer):
    class Broken(Toy):
        def image(self, index):
            raise BadItem("gone")

    report = check(Broken(), tokenizer)
    assert (report.images, report.broken, report.width, report.caption_tokens) == (0, 6, None, None)
    assert dict(rows(report))["images"] == "none" and json.loads(json.dumps(to_json(report)))["broken"] == 6


def test_lengths_are_those_of_a_context_that_cuts_nothing():
    texts = ["", "a cat", "one two three " * 40, "Antidisestablishmentarianism! " * 9, "caf\u00e9 &amp; th\u00e9 " * 30]
    expected = [len(ids) for ids in Tokenizer.openai(1000).encode(texts)]
    assert Tokenizer.openai(8).lengths(texts) == Tokenizer.openai(77).lengths(texts) == expected


def test_a_spread_is_numpy_s_percentiles():
    numbers = torch.rand(101, generator=torch.Generator().manual_seed(0)).tolist()
    found = spread(numbers)
    assert [found.least, found.p5, found.median, found.p95, found.most] == np.percentile(
        numbers, (0, 5, 50, 95, 100)
    ).tolist()
    assert found.mean == pytest.approx(np.mean(numbers))


@pytest.mark.parametrize("field", ["opt_out", "optOut", "X-Robots-Tag", "noai", "no_image_ai", "NSFW", "punsafe"])
def test_fields_of_consent_and_safety_are_flags(field):
    assert flags_in({field: 0, "caption": "noai"}) == {field: 0}
    assert flags_in({field: None}) == flags_in({field: ""}) == flags_in({field: float("nan")}) == {}


@pytest.mark.parametrize("field", ["caption", "url", "nominal_aim", "noaim", "options"])
def test_other_fields_are_not(field):
    assert flags_in({field: 1}) == {}


@pytest.fixture
def shard(tmp_path):
    """A picture twice, one with an opt-out, and half a picture."""
    buffer = io.BytesIO()
    Scenes("train", 1).image(0).save(buffer, "JPEG")
    whole = buffer.getvalue()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in {
            "a.jpg": whole,
            "a.json": b'{"caption": "a [red] ring", "opt_out": true, "NSFW": "UNLIKELY"}',
            "b.jpg": whole,
            "b.json": b'{"caption": "a red ring", "opt_out": false}',
            "c.jpg": whole[: len(whole) // 2],
            "c.json": b'{"caption": "half a ring"}',
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tmp_path / "0.tar"


def test_a_shard_s_duplicates_flags_and_broken_items_are_found(shard, tokenizer):
    report = check(open_source(str(shard)), tokenizer)
    assert report.formats == {"JPEG": 2} and report.duplicates == 1
    assert report.broken_items == [("0.tar/c", report.broken_items[0][1])]
    assert report.broken_items[0][1].startswith("OSError: ")
    assert report.flags["opt_out"]["values"] == {"True": 1, "False": 1}
    assert report.flags["NSFW"] == {"n": 1, "different": 1, "values": {"UNLIKELY": 1}}


def test_modes_turned_pictures_and_what_folders_leave_out_are_counted(tmp_path, tokenizer):
    exif, drawn = Image.Exif(), Scenes("train", 1).image(0)
    exif[0x0112] = 6
    for name in ("cat", "dog", ".hidden"):
        (tmp_path / name).mkdir()
        drawn.save(tmp_path / name / "turned.jpg", exif=exif)
    drawn.save(tmp_path / "cat/palette.png")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "cat/deep.tif")
    Image.new("F", (8, 8)).save(tmp_path / "dog/floats.tif")
    shown = dict(rows(check(open_source(f"{tmp_path}?caption=label"), tokenizer)))
    assert shown["images"] == "4 (JPEG 2, TIFF 1, PNG 1)" and shown["broken"] == "1"
    assert shown["colour modes"] == "RGB 3, I;16 1" and shown["turned as their EXIF says"] == "2"
    assert shown["  a picture of mode F: viewers do not agree on what is white"] == "1"
    assert shown["left out: images that are hidden, or in a hidden folder"] == "1"


@pytest.mark.parametrize("kind", ["tsv", "parquet", "filtered", "mixture"])
def test_a_table_s_flags_are_found(tmp_path, tokenizer, kind, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    Scenes("train", 1).image(0).save(tmp_path / "0.png")
    (tmp_path / "list.tsv").write_text("file\tcaption\topt_out\n0.png\ta ring\tyes\n")
    spec = str(tmp_path / "list.tsv")
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        image = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
        table = pyarrow.Table.from_pylist([{"image": image, "caption": "a ring", "opt_out": "yes"}])
        parquet.write_table(table, spec := str(tmp_path / "list.parquet"))
    spec = {"filtered": f"{spec}?min_side=9", "mixture": f"mixture?1={spec}"}.get(kind, spec)
    report = check(open_source(spec), tokenizer)
    assert report.flags == {"opt_out": {"n": 1, "different": 1, "values": {"yes": 1}}}


def test_the_sheet_shows_readable_pictures_where_their_captions_are(tmp_path):
    contact_sheet(Toy(), tmp_path / "sheet.png")
    contact_sheet(Scenes("train", 200), tmp_path / "scenes.webp")
    with Image.open(tmp_path / "sheet.png") as few, Image.open(tmp_path / "scenes.webp") as many:
        assert few.width == many.width == GAP + 8 * (SIDE + GAP)
        assert few.height < 2 * SIDE and NUM_PICTURES == 48 and 6 * SIDE < many.height < 9 * SIDE


def test_a_sheet_s_frames_hold_their_pictures():
    cards = [Card(Image.new("RGB", (30, 30), colour), "x") for colour in ("red", "blue")]
    image = sheet(cards, "two")
    top = image.height - 100 - SIDE // 2
    assert image.getpixel((GAP + SIDE // 2, top)) == (255, 0, 0)
    assert image.getpixel((2 * GAP + SIDE + SIDE // 2, top)) == (0, 0, 255)


def test_captions_are_broken_between_words_and_cut_with_an_ellipsis():
    font = ImageFont.load_default(14)
    assert fitted("a cat", font, 200, 3) == ["a cat"] and fitted("", font, 200, 3) == [""]
    lines = fitted("a very long caption of a cat on a mat " * 5, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("...") and all(font.getlength(line) <= 200 for line in lines)
    whole = fitted("Donaudampfschifffahrtsgesellschaftskapitaen", font, 100, 9)
    assert "".join(whole) == "Donaudampfschifffahrtsgesellschaftskapitaen" and len(whole) > 1


@pytest.fixture
def tiny(capsys, monkeypatch):
    """The status, stdout and stderr of the command."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_reports_a_set_with_broken_items(tiny, shard, tmp_path):
    status, out, err = tiny("data", "check", shard, "--out", tmp_path / "out", "--json")
    assert status == 0 and err == "" and json.loads(out) == json.loads((tmp_path / "out" / "check.json").read_text())
    assert json.loads(out)["broken"] == 1 and (tmp_path / "out" / "pictures.webp").stat().st_size > 1000
    status, out, _ = tiny("data", "check", shard, "--limit", 1)
    assert status == 0 and "[red]" not in out and "3, the first 1 read" in out


def test_a_set_that_cannot_be_opened_is_one_line(tiny, tmp_path):
    for arguments in (("data", "check", tmp_path / "none.tar"), ("data", "check", "scenes?count=3", "--limit", "0")):
        status, out, err = tiny(*arguments)
        assert status == 2 and out == "" and err.startswith("tinyclip: error: ") and err.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert "expected a directory" in tiny("data", "check", "scenes?count=3", "--out", tmp_path / "file")[2]
