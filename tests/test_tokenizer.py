"""Ids are open_clip's, ftfy repairs and typed special tokens included, and tokenizer.json brings them back."""

import json
import pickle
import random

import pytest
import tokenizers
import torch

from tinyclip.formats.huggingface import read_tokenizer
from tinyclip.model import BlockConfig, TextConfig
from tinyclip.tokenizer import Tokenizer

CAPTIONS = ["two red dogs above a big blue heart", "a small green star, two blue hearts", "red dogs & green stars"] * 4
PIECES = (  # glued together at random: what a split, a repair or a special token could get wrong
    *("<start_of_text>", "<END_of_text>", "<", ">", "!", "_", "-", "'", "'s", "'S", "'ll", "'ve", "'\u017f", "\u212a"),
    *(" ", "\t", "\x1c", "\u2003", "\x00", "a", "dog", "N", "\u0130", "\u03a3", "1", "\u00bd", "\u00e9", "e&#769;"),
    *("\U0001f600", "\u4e2d", "\ud7ff", "&amp;", "&amp;lt;", "\u0301", "\ufb01", "\u00c3\u00b6"),
)


@pytest.fixture(scope="module")
def openai() -> Tokenizer:
    return Tokenizer.openai()


def test_golden_ids(openai, shared):
    golden = json.loads((shared / "golden" / "tokenizer.json").read_text(encoding="utf-8"))
    entries = golden["entries"]
    assert openai([entry["text"] for entry in entries]).tolist() == [entry["ids"] for entry in entries]
    expected = [golden[name] for name in ("context_length", "vocab_size", "sot", "eot")]
    assert [openai.context_length, openai.vocab_size, openai.sot, openai.eot] == expected


def test_ids_equal_open_clip_on_odd_strings(openai):
    from open_clip import SimpleTokenizer

    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(3000)]
    expected = SimpleTokenizer()(texts)
    different = [
        text for text, same in zip(texts, (openai(texts) == expected).all(1).tolist(), strict=True) if not same
    ]
    assert not different


def test_rows_are_padded_and_cut_at_the_context_length():
    tokenizer = Tokenizer.openai(context_length=5)
    assert tokenizer.encode(["", "a cat", "a cat on a mat"]) == [
        [49406, 49407],
        [49406, 320, 2368, 49407],
        [49406, 320, 2368, 525, 49407],
    ]
    ids = tokenizer(["a cat", "a cat on a mat"])
    assert ids.dtype == torch.int64 and ids.tolist() == [[49406, 320, 2368, 49407, 0], [49406, 320, 2368, 525, 49407]]


@pytest.mark.parametrize("name", ["openai", "trained"])
def test_tokenizer_json_and_pickle_bring_the_same_ids(name, tmp_path):
    trained = Tokenizer.train(CAPTIONS, vocab_size=560, context_length=9)
    tokenizer = trained if name == "trained" else Tokenizer.openai(32)
    tokenizer.save(tmp_path / "tokenizer.json")
    for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy == tokenizer and copy.context_length == tokenizer.context_length
        assert copy.encode(CAPTIONS) == tokenizer.encode(CAPTIONS)
    assert tokenizer != Tokenizer.openai(16)


def test_tokenizer_json_alone_gives_the_ids_of_ordinary_text(openai, tmp_path):
    openai.save(tmp_path / "tokenizer.json")
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # what a browser reads
    for text in (*CAPTIONS, "  A Photo\tof\n the CAFE\u0301 in M\u00dcNCHEN, it's 10 o'clock! "):
        assert alone.encode(text).ids == openai.encode([text])[0]


def test_a_trained_tokenizer_has_the_same_form():
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=530, context_length=12)
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (530, 528, 529)
    rows = tokenizer(["two red dogs", "UNSEEN \u2603 \u4e2d words"])
    assert rows.max(1).values.tolist() == [529, 529] and rows[:, 0].tolist() == [528, 528]
    assert tokenizer == Tokenizer.train(iter(CAPTIONS), vocab_size=530, context_length=12)
    longer = Tokenizer.train(CAPTIONS, vocab_size=600, context_length=12)
    assert len(longer.encode(["two red dogs"])[0]) == 5  # a word of the data has become one token


def test_little_text_gives_fewer_ids_than_asked():
    assert Tokenizer.train(["aaab aaab"], vocab_size=2000, context_length=8).vocab_size == 514 + 3


def test_misuse_is_refused(openai, tmp_path):
    with pytest.raises(ValueError, match="vocab_size of at least 514, got 300"):
        Tokenizer.train(CAPTIONS, vocab_size=300, context_length=8)
    with pytest.raises(ValueError, match="context_length of at least 3"):
        Tokenizer.openai(2)
    with pytest.raises(ValueError, match="expected a list of texts, got one text: 'a cat'"):
        openai("a cat")
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "nothing.json")


@pytest.mark.parametrize("text", ["", "{}", "[1", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'])
def test_a_file_that_is_no_tokenizer_is_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not (JSON|a CLIP tokenizer): [^\n]*$"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def tampered(path, change) -> None:
    """The file with one part of its settings changed."""
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def set_in(*path, to):
    def change(settings):
        for key in path[:-1]:
            settings = settings[key]
        settings[path[-1]] = to

    return change


BOMBS = {  # what a file can ask of `tokenizers`, and where it is refused
    "padding": set_in("padding", to={"strategy": {"Fixed": 10**9}, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}),
    "truncation: max_length": set_in("truncation", "max_length", to=10**18),
    "truncation: stride": set_in("truncation", "stride", to=10**9),
    "pre_tokenizer": set_in("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", to="(a+)+$"),
    "normalizer": set_in("normalizer", "normalizers", 1, "content", to=" " * 10**6),
    "post_processor": set_in("post_processor", "single", 0, "SpecialToken", "id", to="unknown"),  # `tokenizers` panics
    "expected 514 tokens": lambda settings: settings["added_tokens"].append({"id": 514, "content": "x" * 10**6}),
    "model.merges": lambda settings: settings["model"]["merges"].append(["", ""]),
    "model.vocab": lambda settings: settings["model"]["vocab"].update({"x": -1.5}),
    "model.dropout": set_in("model", "dropout", to=0.5),
    "got one of 'zz'": lambda settings: add_merge(settings, "zz", "a"),
}


def add_merge(settings, left: str, right: str) -> None:
    settings["model"]["merges"].append([left, right])
    for token in settings["added_tokens"]:
        token["id"] += 1
        settings["model"]["vocab"][token["content"]] = token["id"]
        settings["post_processor"]["special_tokens"][token["content"]]["ids"] = [token["id"]]
    settings["model"]["vocab"][left + right] = 512


@pytest.mark.parametrize("where, change", BOMBS.items(), ids=BOMBS)
def test_a_tokenizer_that_asks_for_more_than_ours_is_refused_before_it_is_built(where, change, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    Tokenizer.train([], vocab_size=514, context_length=10).save(path)
    Tokenizer.load(path)
    tampered(path, change)
    monkeypatch.setattr(Tokenizer, "__init__", lambda *_: pytest.fail("was built"))
    with pytest.raises(ValueError, match=f"tokenizer.json: not a CLIP tokenizer: {where}|{where}") as error:
        Tokenizer.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("where, change", BOMBS.items(), ids=BOMBS)
def test_one_of_another_library_is_never_handed_on(where, change, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    original = Tokenizer.train([], vocab_size=514, context_length=10)
    original.save(path)
    tampered(path, change)
    config = TextConfig(width=4, head_dim=4, blocks=(BlockConfig(heads=1, ffn=1),), context_length=10, vocab_size=514)
    if where.startswith(("padding", "truncation")):  # the length is the config's
        assert read_tokenizer(tmp_path, config) == original
        return
    monkeypatch.setattr(Tokenizer, "__init__", lambda *_: pytest.fail("was built"))
    with pytest.raises(ValueError, match="tokenizer.json: not CLIP's byte pair encoding: ") as error:
        read_tokenizer(tmp_path, config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_the_older_way_to_write_merges_is_read(openai, tmp_path):
    openai.save(tmp_path / "tokenizer.json")

    def older(settings):
        settings["model"]["merges"] = [" ".join(merge) for merge in settings["model"]["merges"]]
        del settings["model"]["ignore_merges"], settings["model"]["byte_fallback"]

    tampered(tmp_path / "tokenizer.json", older)
    assert Tokenizer.load(tmp_path / "tokenizer.json") == openai
