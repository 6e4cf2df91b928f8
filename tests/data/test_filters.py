"""Small images, short captions and repeated images are left out and counted; the pass over a set is remembered."""

import io

import fsspec
import pytest
from PIL import Image

from tests.data.test_sources import error_of, png, write_tar, write_zip
from tinyclip.data import filters
from tinyclip.data.order import visits
from tinyclip.data.sources import BadItem, left_out, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(width, height, colour):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {
    "0": (picture(20, 30, "red"), "a red thing"),
    "1": (picture(9, 30, "red"), "a narrow thing"),
    "2": (picture(20, 30, "red"), "the first again"),
    "3": (picture(20, 30, "green"), "g"),
    "4": (b"no image", "a broken thing"),
    "5": (picture(20, 30, "blue"), "a blue thing"),
}


@pytest.fixture(params=["shard", "remote", "table"])
def spec(request, tmp_path):
    members = {f"{name}.png": data for name, (data, _) in FILES.items()}
    write_tar(tmp_path / "0.tar", members | {f"{name}.txt": text.encode() for name, (_, text) in FILES.items()})
    write_zip(tmp_path / "images.zip", members)
    lines = ["file\tcaption", *(f"{name}.png\t{text}" for name, (_, text) in FILES.items())]
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    fsspec.filesystem("memory").pipe("/filters/0.tar", (tmp_path / "0.tar").read_bytes())
    yield {
        "shard": f"{tmp_path}/0.tar?",
        "remote": "memory://filters/0.tar?",
        "table": f"{tmp_path}/t.tsv?images=images.zip&",
    }[request.param]
    fsspec.filesystem("memory").rm("/filters", recursive=True)


def kept(source):
    return "".join(source.key(index).removesuffix(".png")[-1] for index in range(len(source)))


@pytest.mark.parametrize(
    "query, names, counts",
    [
        ("min_side=10", "02345", {filters.SMALL: 1}),
        ("min_caption_chars=5", "01245", {filters.SHORT: 1}),
        ("dedup=true", "01345", {filters.TWICE: 1}),
        ("dedup=true&min_side=10&min_caption_chars=2", "045", {filters.SMALL: 1, filters.SHORT: 1, filters.TWICE: 1}),
        ("dedup=true&limit=2", "01", {}),
        ("dedup=false", "012345", {}),
    ],
)
def test_what_does_not_pass_is_left_out_and_counted(spec, query, names, counts):
    source = open_source(spec + query)
    assert kept(source) == names and left_out(source) == counts
    assert sorted(index for index, _ in visits(source, 0, 0, 0, len(source))) == list(range(len(names)))
    assert source.captions(0) == ("a red thing",) and source.image(0).size == (20, 30)


def test_what_cannot_be_read_is_left_to_be_counted_as_bad(spec):
    source = open_source(f"{spec}dedup=true&min_side=10")
    with pytest.raises(BadItem, match="not an image"):
        source.image(kept(source).index("4"))


def test_the_pass_is_remembered_until_the_set_or_the_question_changes(spec, tmp_path, monkeypatch):
    passed = []
    one_pass = filters._pass
    monkeypatch.setattr(filters, "_pass", lambda source, *rest: passed.append(rest) or one_pass(source, *rest))
    for _ in range(2):
        open_source(f"{spec}min_side=10")
    assert passed == [(0, 10, False)]
    open_source(f"{spec}min_side=11")
    assert len(passed) == 2


def test_short_captions_go_and_others_of_the_image_stay(tmp_path):
    (tmp_path / "1.png").write_bytes(png("red"))
    (tmp_path / "t.tsv").write_text("file\tcaption\tmore\n1.png\tx\ta red thing\n")
    source = open_source(f"{tmp_path}/t.tsv?captions=caption:9|more:1&min_caption_chars=3")
    assert source.captions(0) == ("a red thing",) and source.captions(0).weights == (1.0,)
    assert left_out(source) == {filters.SHORT_CAPTIONS: 1}
    assert "no images are left" in error_of(f"{tmp_path}/t.tsv?min_caption_chars=3")
