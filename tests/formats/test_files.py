"""Settings of strangers are read within limits; a refusal is quick, in one line, and names the file and the line.

CPU only.
"""

import io
import json
import re
import struct
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from tinyclip.data.decode import BadItem
from tinyclip.data.files import Zip
from tinyclip.formats import files
from tinyclip.formats.files import parse_yaml, read_json, read_member, read_text, read_yaml

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))


def assert_refused(read, path: Path, message: str) -> None:
    start = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(path)
    assert time.monotonic() - start < 10
    text = str(error.value)
    assert str(path) in text and re.search(message, text) and "\n" not in text and len(text) < 400, text


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not JSON: Expecting value"),
        ("[1]", "expected a JSON object, got list"),
        ('{"a": 1, "b": {"a": 2, "a": 3}}', "not JSON: the key 'a' is given twice"),
        ('{"a": ' + "[" * 100_000, "not JSON: "),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "not JSON: more than 64 lists or mappings in each other"),
        ('{"a": ' + "9" * 1_000_000 + "}", "not JSON: a number of 1000000 digits"),
        ('{"a": 0.' + "9" * 1_000_000 + "}", "not JSON: a number of 1000002 digits"),
        (r'{"a": "\ud800"}', "not JSON: .*surrogates not allowed"),
        (r'{"\udfff": 1}', "not JSON: .*surrogates not allowed"),
        ('{"a": "\0"}', "not JSON: Invalid control character"),
        (b'{"a": "\xff"}', "not JSON: 'utf-8' codec can't decode"),
        ('{"a": "' + "x" * files.MAX_BYTES + '"}', r"expected at most 16777216 bytes of JSON, got 167772\d\d"),
    ],
    ids=range(12),
)
def test_json_that_is_damaged_or_a_bomb_is_refused(content, message, tmp_path):
    path = tmp_path / "settings.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(read_json, path, message)


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [1\nb: 2", "not YAML: line 2: while parsing a flow sequence"),
        ("a: 1\nb:\n  c: 2\n  c: 3", "not YAML: line 4: the key 'c' is given twice"),
        (LAUGHS, r"not YAML: line \d\d: more than 131072 values, with aliases as what they stand for"),
        (MERGES, r"not YAML: line \d\d: more than 131072 values"),
        ("a: &a [*a]", "not YAML: line 1: an alias inside of what it stands for"),
        ("a: *b", "not YAML: line 1: found undefined alias 'b'"),
        ("a: " + "[" * 100_000, "not YAML: "),
        ("a: " + "[" * 70 + "]" * 70, "not YAML: more than 64 lists or mappings in each other"),
        ("a: " + "9" * 500_000, "not YAML: line 1: a number of 500000 digits"),
        ("a: 1" + ":59" * 100_000, "not YAML: line 1: a number of 300001 digits"),
        ("a: 2001-13-45", "not YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML: line 1: could not determine a constructor"),
        ("? [a]\n: b", "not YAML: line 1: .*unhashable key"),
        ("a: \0", "not YAML: unacceptable character"),
        (b"\xff\xfe\x00", "not YAML: 'utf-8' codec can't decode"),
        ("#" * (files.MAX_YAML_BYTES + 1), "expected at most 1048576 bytes of YAML, got 1048577"),
    ],
    ids=range(16),
)
def test_yaml_that_is_damaged_or_a_bomb_is_refused(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(read_yaml, path, message)


def test_plain_yaml_with_a_few_aliases_is_what_pyyaml_makes_of_it():
    text = "base: &base {lr: 0.001, betas: [0.9, 0.98]}\nfirst: {<<: *base, lr: 2}\nsecond: *base\nday: 2024-01-02\n"
    assert parse_yaml(text, "text") == yaml.safe_load(text)
    assert parse_yaml("", "text") is None and parse_yaml("3e-4", "text") == yaml.safe_load("3e-4")


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_refused(read_json, tmp_path / "directory", "expected a JSON file, found a directory")
    assert_refused(read_yaml, tmp_path / "loop", "expected a YAML file, found none")
    assert_refused(read_text, tmp_path / "nothing", "expected a text file, found none")
    assert files.is_there(tmp_path / "loop") and not files.is_there(tmp_path / "nothing")


def archive_of(size: int, method: int = zipfile.ZIP_DEFLATED, said: int | None = None) -> bytes:
    """A zip archive of one file of zeros, which says to be `said` bytes long."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("0.jpg", bytes(size))
    data = buffer.getvalue()
    return data if said is None else data.replace(struct.pack("<I", size), struct.pack("<I", said))


@pytest.mark.parametrize(
    "data, message",
    [
        (archive_of(2000), "expected at most 1000 bytes, got 2000"),
        (archive_of(50_000_000, said=900), "damaged: "),
        (archive_of(900, said=1000), "damaged: "),
        (archive_of(900, zipfile.ZIP_BZIP2), "expected a file stored or deflated, got method 12"),
        (archive_of(900, zipfile.ZIP_LZMA), "expected a file stored or deflated, got method 14"),
    ],
    ids=["larger", "more than it says", "less than it says", "bzip2", "lzma"],
)
def test_a_file_of_an_archive_is_never_longer_than_it_says(data, message, monkeypatch):
    inflated = []
    update = zipfile.ZipExtFile._update_crc
    monkeypatch.setattr(
        zipfile.ZipExtFile, "_update_crc", lambda self, new: inflated.append(len(new)) or update(self, new)
    )
    with zipfile.ZipFile(io.BytesIO(data)) as archive, pytest.raises(ValueError, match=message):
        read_member(archive, "0.jpg", 1000)
    assert sum(inflated) <= 1001


def test_a_picture_in_an_archive_that_lies_about_its_length_is_broken(tmp_path):
    (tmp_path / "pictures.zip").write_bytes(archive_of(50_000_000, said=900))
    with pytest.raises(BadItem, match="0.jpg: damaged: "):
        Zip(tmp_path / "pictures.zip").read("0.jpg")
    (tmp_path / "whole.zip").write_bytes(archive_of(900))
    assert Zip(tmp_path / "whole.zip").read("0.jpg") == bytes(900)


def test_settings_come_back(tmp_path):
    settings = {"a": [1, 2.5, None, True, "é"], "b": {"c": {}}, "c": 10**30}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert read_json(tmp_path / "settings.json") == settings
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    assert read_yaml(tmp_path / "settings.yaml") == settings
