"""Tables, shards and class folders say the same pairs through one interface, and bad input is one plain line."""

import io
import json
import os
import pickle
import re
import tarfile
import zipfile

import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from tinyclip.data import files, shards
from tinyclip.data.files import without_folder
from tinyclip.data.sources import BadItem, left_out, open_source
from tinyclip.data.spec import DataSpec

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def add_to_tar(path, files):
    with tarfile.open(path, "a") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def table(tmp_path):
    """Three images in a zip; red has two captions, blue is of another split."""
    write_zip(tmp_path / "images.zip", {f"{colour}.png": png(colour) for colour in COLOURS})
    rows = [
        "file\tsplit\tcaption\tnames",
        'red.png\ttrain\t"a ""warm"" square"\tred|crimson',
        "red.png\ttrain\tsomething red\tred|crimson",
        "green.png\ttrain\tgrass\tgreen",
        "blue.png\tdev\tthe sky\tblue",
    ]
    path = tmp_path / "captions.tsv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "000.tar"
    fields = {"captions": ["grass", "a lawn"], "name": "green"}
    write_tar(
        path,
        {
            "red.png": png("red"),
            "red.json": json.dumps({"captions": ["a rose"], "name": "red"}).encode(),
            "a.b/green.png": png("green"),
            "a.b/green.json": json.dumps(fields).encode(),
            "readme.md": b"not a sample",
        },
    )
    return path


def everything(source):
    """Colour, captions and label of every item."""
    return [
        (source.image(i).convert("RGB").getpixel((0, 0)), tuple(source.captions(i)), source.label(i))
        for i in range(len(source))
    ]


def error_of(spec, error=ValueError):
    with pytest.raises(error) as caught:
        open_source(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Specs


def test_a_second_image_of_a_sample_is_counted(tmp_path):
    write_tar(tmp_path / "1.tar", {"a.png": png("red"), "a.webp": png("blue"), "a.txt": b"red"})
    source = open_source(str(tmp_path / "1.tar"))
    assert source.image(0).getpixel((0, 0)) == COLOURS["red"]
    assert left_out(source) == {"images beside the one that stands for their sample": 1}


@pytest.mark.parametrize("name", ["set.tsv", "set.tar", "set.zip", "set.parquet"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert f"{tmp_path / name}: expected a file, got a pipe or device" in error_of(str(tmp_path / name))


def test_a_string_and_a_mapping_are_the_same_spec():
    text = "t.tsv?images=i.zip&where=split=dev&caption=cats %26 {name}&limit=5"
    fields = {"path": "t.tsv", "images": "i.zip", "where": "split=dev", "caption": "cats & {name}", "limit": 5}
    assert DataSpec.parse(text) == DataSpec.parse(fields)
    assert DataSpec.parse(DataSpec.parse(text).model_dump()) == DataSpec.parse(text)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("t.tsv?colour=red", "unknown key 'colour'; known: path, images, image, caption"),
        ({"path": "t.tsv", "colour": "red"}, "unknown key 'colour'; known: path, images, image, caption"),
        ("t.tsv?count=3", "key 'count' means nothing for table, which take images"),
        ("scenes?split=dev", "split: expected 'train', 'heldout' or 'classes', got 'dev'"),
        ("t.tsv?limit=0", "limit: Input should be greater than 0"),
        ("t.tsv?limit", "expected key=value after '?', got 'limit'"),
        ("t.tsv?limit=1&limit=2", "key 'limit' is given twice"),
        ("pipe: ", "expected a command behind pipe:, such as pipe:cat {000..003}.tar"),
        ("0.tar?quotes=none", "key 'quotes' means nothing for shards"),
    ],
)
def test_a_wrong_spec_is_one_line_that_says_what_is_known(spec, expected):
    assert expected in error_of(spec)


@pytest.mark.parametrize(
    "spec, shown",
    [
        ("pipe:curl -H 'Authorization: Bearer KEY' https://host/1.tar?limit=3", "pipe:...?limit=3"),
        ("https://me:KEY@host/{0..3}.tar%3Fsignature=KEY", "https://host/{0..3}.tar"),
        ("mixture?2=s3://bucket/1.tar&1=pipe:cat KEY.tar", "mixture?2.0=s3://bucket/1.tar&1.0=pipe:..."),
        ("https://me:KEY@host/0.tar%3Fsig=KEY::pipe:cat KEY.tar?limit=3", "https://host/0.tar::pipe:...?limit=3"),
        ("a/pairs.tsv?limit=3", "a/pairs.tsv?limit=3"),
    ],
)
def test_secrets_of_a_spec_can_be_left_out(spec, shown):
    assert DataSpec.parse(spec).public == shown
    assert DataSpec.parse(str(DataSpec.parse(spec))) == DataSpec.parse(spec)


# Tables


def test_rows_with_the_same_image_are_one_item(table):
    source = open_source(f"{table}?images=images.zip&label=names&sep=|")
    assert everything(source) == [
        (COLOURS["red"], ('a "warm" square', "something red"), ("red", "crimson")),
        (COLOURS["green"], ("grass",), ("green",)),
        (COLOURS["blue"], ("the sky",), ("blue",)),
    ]
    assert [source.key(i) for i in range(3)] == ["red.png", "green.png", "blue.png"]


def test_where_and_limit_choose_rows(table):
    spec = f"{table}?images=images.zip"
    assert [text for _, (*_, text), _ in everything(open_source(f"{spec}&where=split=dev"))] == ["the sky"]
    assert len(open_source(f"{spec}&where=split!=dev;caption!=grass")) == 1
    assert len(open_source(f"{spec}&limit=2")) == 2
    assert "no images where split=test" in error_of(f"{spec}&where=split=test")
    assert "columns are file, split, caption, names" in error_of(f"{spec}&where=part=dev")
    assert len(open_source(f"{spec}&where=split!=")) == 3


def test_a_template_is_filled_with_every_combination(table):
    source = open_source(
        f"{table}?images=images.zip&caption=a {{names}} thing ({{split}})&sep=|&where=caption=something red"
    )
    assert source.captions(0) == ("a red thing (train)", "a crimson thing (train)")


def test_a_csv_beside_its_images_reads_like_a_tsv_with_a_zip(tmp_path):
    (tmp_path / "red.png").write_bytes(png("red"))
    (tmp_path / "list.csv").write_text('filepath,title\nred.png,"red, only red"\n')
    assert everything(open_source(str(tmp_path / "list.csv"))) == [(COLOURS["red"], ("red, only red",), None)]


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_separator_is_the_one_that_gives_a_column_of_images(tmp_path, separator, end):
    (tmp_path / "red.png").write_bytes(png("red"))
    path = tmp_path / "t.csv"
    path.write_bytes(f'\ufefffile{separator}caption{end}red.png{separator}"a, b; c | d"{end}'.encode())
    assert everything(open_source(str(path))) == [(COLOURS["red"], ("a, b; c | d",), None)]
    path.write_text(f"picture{separator}caption\nred.png{separator}red\n")
    assert "or filename or path; it has picture, caption" in error_of(str(path))
    assert open_source(f"{path}?image=picture").captions(0) == ("red",)


def test_a_separator_that_is_unclear_is_asked_for(tmp_path):
    (tmp_path / "red.png").write_bytes(png("red"))
    path = tmp_path / "t.csv"
    path.write_text("file,image;text\nred.png,1;red\n")
    assert open_source(f"{path}?caption=image;text").captions(0) == ("1;red",)
    path.write_text("file;a,image\nred.png;b,c\n")
    message = error_of(str(path))
    assert "t.csv: near line 1: cells may be separated by , or ;: say which, as delimiter=," in message
    assert open_source(f"{path}?delimiter=;&caption=a,image").captions(0) == ("b,c",)
    assert "delimiter: String should match" in error_of(f"{path}?delimiter=ab")
    path.write_text("file:caption\nred.png:red\n")
    assert "no image column file or filepath or image or filename or path; it has file:caption" in error_of(str(path))
    assert open_source(f"{path}?delimiter=:").captions(0) == ("red",)


@pytest.mark.parametrize("coding, found", [("utf-16", ", got UTF-16"), ("utf-16-be", "zero bytes"), ("cp1252", "")])
def test_a_table_that_is_not_utf_8_says_so(tmp_path, coding, found):
    text = "cheese" if coding == "utf-16-be" else "Käse"
    (tmp_path / "t.csv").write_bytes(f"file,caption\nred.png,{text}\n".encode(coding))
    message = error_of(f"{tmp_path}/t.csv")
    assert "UTF-8" in message and found in message


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("file,caption,caption\nred.png,a,b\n")
    assert "t.csv: expected columns of different names, got 'caption' twice: file, caption, caption" in error_of(
        str(path)
    )
    (tmp_path / "red.png").write_bytes(png("red"))
    path.write_text(",file,caption,\n0,red.png,a,\n")  # an index without a name, and a comma at the end
    assert open_source(str(path)).captions(0) == ("a",)


def test_an_image_may_be_named_in_two_ways(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/red.png").write_bytes(png("red"))
    (tmp_path / "t.csv").write_text("file,caption\na/red.png,1\n./a/red.png,2\na//red.png,3\n")
    assert everything(open_source(f"{tmp_path}/t.csv")) == [(COLOURS["red"], ("1", "2", "3"), None)]


def test_a_missing_column_is_an_error_that_lists_the_columns(table):
    spec = f"{table}?images=images.zip"
    assert "no column 'name'; it has file, split, caption, names" in error_of(f"{spec}&caption=a {{name}}")
    assert "no column 'class'; it has file" in error_of(f"{spec}&label=class")
    assert "no image column url; it has file" in error_of(f"{spec}&image=url")
    table.write_text("file\tsplit\nred.png\ttrain\n")
    assert "no caption column captions or caption or txt or title or text; it has file, split" in error_of(spec)


def test_missing_images_are_counted_and_the_first_is_named(table):
    message = error_of(f"{table}", FileNotFoundError)
    assert "3 of 3 images are not in" in message and "'red.png'" in message


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "empty, expected a header line"),
        (b"file\tcaption\n", "no images"),
        (b"file\tcaption\nred.png\n", "line 2: expected 2 cells, as in the header, got 1"),
        (b'file\tcaption\nred.png\t"open\n', "unexpected end of data"),
        (b"file\tcaption\nred.png\t\xff\n", "can't decode byte 0xff"),
    ],
)
def test_a_broken_table_is_one_line(table, data, expected):
    table.write_bytes(data)
    message = error_of(f"{table}?images=images.zip")
    assert expected in message and str(table) in message


@pytest.mark.parametrize("spec", ["no.tsv", "no.tar", "no.zip", "no", "table.parquet"])
def test_a_missing_file_is_named(tmp_path, spec):
    assert spec in error_of(str(tmp_path / spec), FileNotFoundError)


def test_quotes_of_a_tsv_are_not_guessed(tmp_path):
    """A stray one would otherwise swallow the rows up to the next."""
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    stray = 'file\tcaption\nred.png\t"to be\ngreen.png\tor\nblue.png\tnot to be"\n'
    (tmp_path / "t.tsv").write_text(stray)
    (tmp_path / "one.tsv").write_text('file\tcaption\nred.png\t"to be\ngreen.png\tor\n')
    message = error_of(str(tmp_path / "one.tsv"))
    assert "unexpected end of data; quotes=none takes quotes as they are" in message
    message = error_of(str(tmp_path / "t.tsv"))
    assert "t.tsv: near line 4: a quoted cell of several lines; where it is meant so, say quotes=csv" in message
    assert "quotes=none takes quotes as they are" in message
    source = open_source(f"{tmp_path}/t.tsv?quotes=none")
    assert [tuple(source.captions(i)) for i in range(3)] == [('"to be',), ("or",), ('not to be"',)]
    assert open_source(f"{tmp_path}/t.tsv?quotes=csv").captions(0) == ("to be\ngreen.png\tor\nblue.png\tnot to be",)
    (tmp_path / "t.tsv").write_text('file\tcaption\nred.png\t"red" or so\n')
    assert "quotes=none" in error_of(str(tmp_path / "t.tsv"))


def test_rows_that_name_no_image_are_counted(tmp_path):
    (tmp_path / "red.png").write_bytes(png("red"))
    (tmp_path / "t.tsv").write_text("file\tcaption\nred.png\tred\n\tnothing\n")
    source = open_source(str(tmp_path / "t.tsv"))
    assert len(source) == 1 and left_out(source) == {"rows that name no image": 1}


def test_a_template_with_a_single_brace_is_refused(table):
    message = error_of(f"{table}?images=images.zip&caption=a {{word of it")
    assert "template 'a {word of it': expected columns as {COLUMN}, got a single brace" in message


# Class folders


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_class_folders_are_labelled_with_their_names(tmp_path, form):
    files = {f"{colour}/1.png": png(colour) for colour in ("blue", "red")}
    files |= {"red/notes.txt": b"", "__MACOSX/red/._1.png": b""}
    path = tmp_path / ("set.zip" if form == "zip" else "set")
    if form == "zip":
        write_zip(path, files)
    for name, data in files.items() if form == "folder" else ():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    assert everything(open_source(f"{path}?caption=a photo of {{label}}")) == [
        (COLOURS["blue"], ("a photo of blue",), ("blue",)),
        (COLOURS["red"], ("a photo of red",), ("red",)),
    ]


def test_an_empty_folder_and_a_damaged_zip_are_errors(tmp_path):
    assert "no images" in error_of(str(tmp_path))
    (tmp_path / "set.zip").write_bytes(b"")
    assert "set.zip: not a zip file, or damaged" in error_of(str(tmp_path / "set.zip"))


# Shards


def test_a_shard_gives_captions_and_labels_from_json(shard):
    source = open_source(f"{shard}?label=name")
    assert everything(source) == [
        (COLOURS["red"], ("a rose",), ("red",)),
        (COLOURS["green"], ("grass", "a lawn"), ("green",)),
    ]
    assert source.key(1) == "000.tar/a.b/green"


def test_webdataset_writes_what_we_read_and_reads_the_same(tmp_path):
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for colour in COLOURS:
            writer.write({"__key__": f"x/{colour}", "png": png(colour), "txt": f"all {colour}", "json": {"n": 1}})
    source = open_source(str(path))
    with open(path, "rb") as file:
        theirs = list(group_by_keys({"__url__": str(path), **entry} for entry in tar_file_iterator(file)))
    assert [source.key(i) for i in range(3)] == [f"w.tar/{sample['__key__']}" for sample in theirs]
    assert [source.captions(i)[0] for i in range(3)] == [sample["txt"].decode() for sample in theirs]


def test_items_have_the_same_names_wherever_a_set_lies():
    for folder in ("", "./", "/data/", "s3://bucket/pairs/", "https://host:80/"):
        assert without_folder([f"{folder}train/0.tar", f"{folder}val/0.tar"]) == ["train/0.tar", "val/0.tar"]
        assert without_folder([f"{folder}train/0.tar", f"{folder}train/1.tar"]) == ["0.tar", "1.tar"]
        assert without_folder([f"{folder}train/0.tar"]) == ["0.tar"]
    assert without_folder([]) == []


def test_the_first_samples_may_be_broken_or_lack_their_text(tmp_path):
    images = {f"{number}.png": png("red") for number in range(4)}
    write_tar(tmp_path / "1.tar", images | {"0.json": b"{no", "2.txt": b"two", "3.json": b'{"name": "three"}'})
    source = open_source(str(tmp_path / "1.tar"))
    assert [tuple(source.captions(index)) for index in (1, 2, 3)] == [(), ("two",), ()]
    with pytest.raises(BadItem, match="cannot read the text of 0"):
        source.captions(0)
    texts = {f"{number}.txt": b"a picture" for number in range(4)}
    write_tar(tmp_path / "3.tar", images | texts | {"2.json": b'{"caption": "of one alone"}'})
    source = open_source(str(tmp_path / "3.tar"))
    assert [tuple(source.captions(index)) for index in range(4)] == [("a picture",)] * 4
    write_tar(tmp_path / "2.tar", images | {"0.json": b"{no"})
    assert "2.tar: 2.tar/0: cannot read the text of 0: JSONDecodeError" in error_of(str(tmp_path / "2.tar"))


def test_files_that_are_no_item_are_counted(tmp_path):
    files = {
        "a.png": png("red"),
        "a.txt": b"red",
        "img.v1.0.png": png("blue"),
        "img.v1.1.png": png("blue"),
        "g.gif": b"",
        "README": b"",
        ".b.png": png("red"),
    }
    write_tar(tmp_path / "1.tar", files)
    (count,) = left_out(open_source(str(tmp_path / "1.tar"))).items()
    assert count == ("files in a tar without an image (.jpg, .jpeg, .png, .webp) of their name", 5)
    for name in ("cat/1.png", "cat/2.gif", "dog/1.png", "loose.png", "cat/.hidden.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(png("red"))
    source = open_source(f"{tmp_path}/set?caption=label")
    assert len(source) == 2
    assert left_out(source) == {
        "files that are no .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp": 1,
        "images in no class folder": 1,
        "images that are hidden, or in a hidden folder": 1,
    }


@pytest.mark.parametrize(
    "second", ["0.png", "./0.png", "0.PNG", "a/../0.png", "0.txt", ".//0.TXT", "0.json"], ids=lambda name: name
)
def test_two_files_of_one_sample_and_kind_are_refused(tmp_path, second):
    """Which image belongs to which caption cannot be told, or the last file would take the place of the first."""
    files = [("0.png", png("red")), ("0.txt", b"red"), ("0.json", b"{}"), ("1.png", png("blue")), ("1.txt", b"blue")]
    path = tmp_path / "0.tar"
    write_tar(path, dict(files))
    add_to_tar(path, [(second, png("green")), ("readme.md", b""), ("readme.md", b"")])
    if ".." in second:
        assert left_out(open_source(str(path)))["unsafe names in a tar"] == 1
        return
    message = error_of(str(path))
    assert f"0.tar: 1 of 2 samples have two files of one name and kind; the first is {second!r}" in message


def test_files_of_one_sample_need_not_be_written_alike(tmp_path):
    write_tar(tmp_path / "0.tar", {"./0.png": png("red"), "x//1.png": png("blue"), "0.txt": b"red", "x/1.txt": b"blue"})
    source = open_source(f"{tmp_path}/0.tar")
    assert everything(source) == [(COLOURS["red"], ("red",), None), (COLOURS["blue"], ("blue",), None)]
    assert [source.key(index) for index in range(2)] == ["0.tar/./0", "0.tar/x//1"]  # as they were written first


def test_braces_name_several_shards_and_txt_is_a_caption(tmp_path):
    for number, colour in enumerate(COLOURS):
        write_tar(tmp_path / f"{number:03}.tar", {"1.PNG": png(colour), "1.txt": f"{colour}\n".encode()})
    source = open_source(f"{tmp_path}/{{000..002}}.tar")
    assert everything(source) == [(rgb, (colour,), None) for colour, rgb in COLOURS.items()]


def test_a_field_that_the_json_lacks_is_an_error_that_lists_the_fields(shard):
    assert "no column 'title'; it has captions, name" in error_of(f"{shard}?caption=title")


@pytest.mark.parametrize("cut", [0, 100, 700, 1024, 1100, 2048, 4096])
def test_a_truncated_shard_is_an_error_wherever_it_is_cut(shard, cut):
    shard.write_bytes(shard.read_bytes()[:cut])
    assert str(shard) in error_of(str(shard))


def test_links_devices_and_paths_that_lead_outside_are_ignored(tmp_path):
    path = tmp_path / "odd.tar"
    write_tar(path, {"../up.png": png("red"), "/root.png": png("red"), "line\nbreak.png": png("red")})
    with tarfile.open(path, "a") as archive:
        for name, kind in [("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert "no images" in error_of(str(path))
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("good.png")
        member.size = len(png("red"))
        archive.addfile(member, io.BytesIO(png("red")))
        archive.addfile(tarfile.TarInfo("good.txt"))
    assert left_out(open_source(str(path))) == {
        "unsafe names in a tar": 3,
        "links in a tar": 2,
        "devices and sparse files in a tar": 1,
    }


def test_names_that_lead_outside_a_zip_are_only_names(tmp_path):
    (tmp_path / "inside").mkdir()
    write_zip(tmp_path / "inside/slip.zip", {"../red/1.png": png("red"), "/green/1.png": png("green")})
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(tmp_path / "inside/slip.zip?caption=label"))
    assert sorted(everything(source)) == [
        (COLOURS["green"], ("green",), ("green",)),
        (COLOURS["red"], ("red",), ("red",)),
    ]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_index_of_a_large_shard_is_kept_until_the_shard_changes(tmp_path, shard, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "REMEMBERED_BYTES", 0)
    scanned = []
    scan = shards.scan_tar
    monkeypatch.setattr(shards, "scan_tar", lambda file, name: scanned.append(name) or scan(file, name))
    first = everything(open_source(str(shard)))
    assert everything(open_source(str(shard))) == first and scanned == [str(shard)]
    [kept] = (tmp_path / "cache/index").iterdir()
    another_digit = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), kept.read_text(), count=1)
    for times, damaged in enumerate(("{", another_digit), 2):
        kept.write_text(damaged)
        assert everything(open_source(str(shard))) == first and len(scanned) == times
    source = open_source(str(shard))
    write_tar(shard, {"blue.png": png("blue"), "blue.txt": b"sky"})
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        source.image(0)
    assert everything(open_source(str(shard))) == [(COLOURS["blue"], ("sky",), None)] and len(scanned) == 4


@pytest.mark.parametrize("text", [b"{", b"3", b"[" * 100_000, b"\xff"])
def test_broken_json_is_a_bad_item(shard, tmp_path, text):
    write_tar(
        tmp_path / "1.tar", {"1.png": png("red"), "1.json": b'{"caption": "x"}', "2.png": png("red"), "2.json": text}
    )
    source = open_source(str(tmp_path / "1.tar"))
    with pytest.raises(BadItem, match="^cannot read the text of 2: .*$"):
        source.captions(1)


# Images


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png("red")[:45], "OSError|SyntaxError"),
    ],
    ids=["zero bytes", "a web page", "a PostScript program", "a cut PNG"],
)
@pytest.mark.parametrize("kind", ["table", "shard"])
def test_a_broken_image_is_a_bad_item(tmp_path, kind, data, reason):
    (tmp_path / "1.png").write_bytes(data)
    (tmp_path / "list.tsv").write_text("file\tcaption\n1.png\tx\n")
    write_tar(tmp_path / "1.tar", {"1.png": data, "1.txt": b"x"})
    source = open_source(str(tmp_path / {"table": "list.tsv", "shard": "1.tar"}[kind]))
    with pytest.raises(BadItem, match=f"^({reason}).*$"):
        source.image(0)


def test_a_decompression_bomb_is_a_bad_item(tmp_path):
    Image.new("1", (9_500, 9_500)).save(tmp_path / "bomb.png")  # 90 megapixels in 11 kB
    Image.new("1", (14_000, 14_000)).save(tmp_path / "huge.png")  # more than Pillow itself allows
    (tmp_path / "list.tsv").write_text("file\tcaption\nbomb.png\tx\nhuge.png\tx\n")
    source = open_source(str(tmp_path / "list.tsv"))
    for index in range(2):
        with pytest.raises(BadItem, match="pixels|DecompressionBomb"):
            source.image(index)


def test_a_file_that_would_unpack_beyond_the_limit_is_a_bad_item(table, shard, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    with pytest.raises(BadItem, match="the limit is 10"):
        open_source(f"{table}?images=images.zip").image(0)
    assert "the limit is 10" in error_of(str(shard))


def test_sources_survive_pickling(table, shard):
    for spec in (f"{table}?images=images.zip", str(shard), "scenes?count=3"):
        source = open_source(spec)
        assert everything(pickle.loads(pickle.dumps(source))) == everything(source)


def test_the_real_sets_open(shared):
    data = shared / "data"
    flickr = open_source(f"{data}/flickr8k-train/captions.tsv?images=images.zip&where=split=dev")
    assert len(flickr) == 1000 and len(flickr.captions(0)) == 5 and flickr.image(0).size == (128, 128)
    emoji = open_source(
        f"{data}/emoji-demo/pairs.tsv?images=images.zip&caption=a {{style}} drawing of {{name}}&limit=9"
    )
    assert emoji.captions(0) == ("a noto drawing of grinning face",)
    classes = open_source(f"{data}/tiny-imagenet-val/labels.tsv?images=images.zip&label=names&sep=,")
    assert len(classes) == 3000 and classes.label(0) == ("goldfish", "Carassius auratus")
