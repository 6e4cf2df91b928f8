"""Braces and :: lists mean what they mean to webdataset, at once or as one line; what exists by name is no pattern."""

import fsspec
import pytest
from braceexpand import braceexpand

from tests.data.test_sources import COLOURS, error_of, everything, png, write_tar, write_zip
from tinyclip.data import patterns
from tinyclip.data.patterns import expanded, paths_of
from tinyclip.data.sources import open_source
from tinyclip.data.spec import DataSpec, is_remote

ODD = ["a b", "50%", "%3F", "%253F", "a?b=c", "x&y=z", "{0..3}", "{a,b", "[ab]*", "#1", "e::f", "b\\c", "'", '"', "~"]
ODD += ["-x", "dots..", "é" * 80, "tab\t", "line\nbreak", "pipe:x", "s3:", "x.tar", "table.TSV"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))


PATTERNS = r"""
a {00..03}.tar {8..11} {3..0} {0..9..4} {-1..01} {a..e} {c..A..2} {a,b}{1..2} {a,{b,c}{1,2}} {a} {} {,x} x{{1..3}}y
{1..2,7} {1..} {a..bc} s3://b/{0..1}/{x,y}.tar C:\data\{0..2}.tar
"""


@pytest.mark.parametrize("pattern", PATTERNS.split())
def test_braces_are_expanded_as_by_braceexpand(pattern):
    assert expanded(pattern) == list(braceexpand(pattern, escape=False))


@pytest.mark.parametrize("pattern", ["{1..3", "}{", "{a,{b}"])
def test_a_brace_without_its_other_is_one_line(pattern):
    assert error_of(f"{pattern}.tar") == f"{pattern}.tar: expected a }} for each {{"


@pytest.mark.parametrize(
    "pattern",
    ["{0..999999999}", "{0..9999}{0..9999}{0..9999}", "{a,{0..99999999}}", "{0..999999}::{0..999999}", "{9..-9999999}"],
)
@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_a_pattern_of_a_billion_is_refused_at_once(pattern, ending, monkeypatch):
    monkeypatch.setattr(patterns, "MAX_FILES", 10_000)
    path = "::".join(f"{part}.{ending}" for part in pattern.split("::"))
    assert error_of(path) == f"{path}: expected at most 10,000 files, the pattern stands for more"


def test_braces_inside_braces_have_an_end():
    assert "at most 20 braces inside each other" in error_of("{" * 5000 + "}" * 5000 + ".tar")
    assert expanded("{" * 20 + "a,b" + "}" * 20) == ["{" * 19 + own + "}" * 19 for own in "ab"]


def test_lists_of_patterns_are_one_after_the_other(tmp_path):
    for place, colour in [("a/0", "red"), ("a/1", "green"), ("b/5", "blue")]:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / f"{place}.tar", {"1.png": png(colour), "1.txt": colour.encode()})
    source = open_source(f"{tmp_path}/a/{{0..1}}.tar::{tmp_path}/b/5.tar?limit=3")
    assert everything(source) == [(rgb, (colour,), None) for colour, rgb in COLOURS.items()]
    assert [source.key(index) for index in range(3)] == ["a/0.tar/1", "a/1.tar/1", "b/5.tar/1"]
    system = fsspec.filesystem("memory")
    system.pipe("/lists/0.tar", (tmp_path / "a/0.tar").read_bytes())
    mixed = f"memory://lists/0.tar::{tmp_path}/a/1.tar::pipe:cat {tmp_path}/b/5.tar"
    assert everything(open_source(mixed)) == everything(source)
    system.rm("/lists", recursive=True)


def test_a_list_shows_no_secret_and_is_as_remote_as_its_parts():
    path = "0.tar::pipe:curl -u KEY 1.tar::https://me:KEY@host/{0..3}.tar"
    assert is_remote(path) and not is_remote("a::b.tar")
    shown = "0.tar::pipe:...::https://host/{0..3}.tar"
    assert DataSpec.parse({"path": path}).public == shown


@pytest.mark.parametrize(
    "path, expected",
    [
        ("a.tar::b.parquet", "expected files of one kind between ::, got 'a.tar' beside parquet"),
        ("a::b.tar", "expected files of one kind between ::, got 'a' beside shards"),
        ("a.tar::pipe: ::b.tar", "expected a command behind pipe:"),
        ("{0..3}.tar::{3..5}.tar", "3.tar is named twice; to see it more often, give it a weight in a mixture"),
        ("{pipe:cat x,y}.tar", "expected pipe: or the scheme of a URL before the braces, not in them"),
        ("{https,s3}://bucket/x.tar", "expected pipe: or the scheme of a URL before the braces, not in them"),
    ],
)
def test_wrong_lists_are_one_line(path, expected):
    assert expected in error_of(path)


def test_a_command_keeps_its_backslashes(tmp_path):
    (tmp_path / "a b").mkdir()
    write_tar(tmp_path / "a b/0.tar", {"1.png": png("red"), "1.txt": b"red"})
    assert paths_of(r"pipe:cat a\ {b,c}.tar") == [r"pipe:cat a\ b.tar", r"pipe:cat a\ c.tar"]
    assert len(open_source(f"pipe:cat {tmp_path}/a\\ b/{{0..0}}.tar")) == 1


def write_sets(folder, odd):
    """A set of every kind whose folder, file and image have an odd name: their specs."""
    place = folder / odd
    place.mkdir(parents=True)
    image = f"{odd}.png"
    (place / image).write_bytes(png("red"))
    write_zip(place / f"{odd}.zip", {image: png("red")})
    cell = image.replace('"', '""')
    (place / f"{odd}.csv").write_text(f'file,caption\n"{cell}",x\n')
    stem = odd.replace(".", "").replace("\n", "").replace("\t", "")
    write_tar(place / f"{odd}.tar", {f"{stem}.png": png("red"), f"{stem}.txt": b"x"})
    (place / "set" / odd).mkdir(parents=True)
    (place / "set" / odd / image).write_bytes(png("red"))
    specs = [
        {"path": f"{place}/{odd}.csv"},
        {"path": f"{place}/{odd}.csv", "images": f"{odd}.zip"},
        {"path": f"{place}/{odd}.tar"},
        {"path": f"{place}/set", "caption": "label"},
    ]
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, (name, cells) in enumerate({"file": [image], "image": [png("red")]}.items()):
        with open(place / f"{odd}{number}.parquet", "wb") as file:
            parquet.write_table(pa.table({name: cells, "caption": ["x"]}), file)
        specs.append({"path": f"{place}/{odd}{number}.parquet"})
    return specs


@pytest.mark.parametrize("odd", ODD)
def test_names_may_hold_whatever_a_file_system_allows(tmp_path, odd):
    for spec in write_sets(tmp_path, odd):
        parsed = DataSpec.parse(spec)
        assert DataSpec.parse(str(parsed)) == parsed
        for own in (spec, str(parsed)):
            source = open_source(own)
            assert len(source) == 1 and source.image(0).size == (8, 6) and source.captions(0)
        mixture = DataSpec.parse({"mixture": [{"data": spec}, {"data": "scenes"}]})
        assert DataSpec.parse(str(mixture)) == mixture
        assert len(open_source({**spec, "dedup": True, "min_caption_chars": 1})) == 1


def test_what_exists_by_name_is_no_pattern_and_no_key(tmp_path):
    for name in ("{0..1}", "0", "1", "what?limit=1"):
        write_tar(tmp_path / f"{name}.tar", {"1.png": png("red"), "1.txt": name.encode()})
    (tmp_path / "{a,b}").mkdir()
    write_tar(tmp_path / "{a,b}/0.tar", {"1.png": png("red"), "1.txt": b"in"})
    for path, expected in {
        "{0..1}.tar": "{0..1}",
        "what?limit=1.tar": "what?limit=1",
        "{a,b}/{0..0}.tar": "in",
    }.items():
        assert everything(open_source(f"{tmp_path}/{path}")) == [(COLOURS["red"], (expected,), None)]
    (tmp_path / "{0..1}.tar").unlink()
    assert len(open_source(f"{tmp_path}/{{0..1}}.tar")) == 2


def test_endings_may_be_capitals(tmp_path):
    write_zip(tmp_path / "I.ZIP", {"1.png": png("red")})
    (tmp_path / "T.CSV").write_text("file,caption\n1.png,x\n")
    write_tar(tmp_path / "S.TAR", {"1.PNG": png("red"), "1.TXT": b"x"})
    for spec in ("T.CSV?images=I.ZIP", "S.TAR"):
        assert everything(open_source(f"{tmp_path}/{spec}")) == [(COLOURS["red"], ("x",), None)]


def test_names_inside_need_not_be_utf_8_nor_printable(tmp_path):
    for odd in ("caf\udce9", "zero\u200bwidth", "soft\xadhyphen"):
        write_tar(tmp_path / "0.tar", {f"{odd}.png": png("red"), f"{odd}.txt": b"x"})
        source = open_source(f"{tmp_path}/0.tar?dedup=true")
        assert (len(source), source.key(0)) == (1, f"0.tar/{odd}")
        (tmp_path / "set" / odd).mkdir(parents=True)
        (tmp_path / "set" / odd / "1.png").write_bytes(png("red"))
    assert len(open_source(f"{tmp_path}/set?caption=label&min_caption_chars=1")) == 3


def test_a_name_that_is_too_long_is_a_missing_image(tmp_path):
    (tmp_path / "t.csv").write_text(f"file,caption\nhttps://host/{'x' * 5000}.png,x\n")
    assert "1 of 1 images are not in" in error_of(f"{tmp_path}/t.csv", FileNotFoundError)
