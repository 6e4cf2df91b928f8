"""Captions -> token ids: CLIP's lower-case byte-level BPE, with ids equal to open_clip's.

A text is cleaned in Python (`clean`), split by CLIP's pattern, and merged by Hugging Face `tokenizers`. The whole of
it is one tokenizer.json that travels with the model; the file also carries the part of the cleaning that `tokenizers`
can do (NFC, white space, lower case), so that a browser reading it gets the same ids for ordinary text.
Ids: 256 bytes, the same 256 at the end of a word, one per merge, start, end. 0 pads; the end is the largest id.

A tokenizer.json can ask `tokenizers` for any amount of padding and for any regular expression, so a file is not handed
on: its merges are read, and everything else must be what they make of it.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import ftfy
import tokenizers
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from tinyclip.formats.files import read_json, validated

START, END = "<start_of_text>", "<end_of_text>"
WORD_END = "</w>"
WORDS = (
    "'[s\u017f]" + r"|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)  # the long s: CLIP's pattern is case-blind
NUM_BYTE_TOKENS = 512  # every byte, inside and at the end of a word
NUM_OPENAI_MERGES = 49152 - 256 - 2

Merges = Sequence[tuple[str, str]]


def _pair(merge: Any) -> Any:
    """The older way to write it: "a b" -> ["a", "b"]."""
    return merge.split(" ") if isinstance(merge, str) else merge


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")


Token = Annotated[str, Field(min_length=1)]


class Bpe(_File):
    """The model in a tokenizer.json: a byte pair encoding with nothing that CLIP's has not."""

    type: Literal["BPE"] = "BPE"
    dropout: None = None
    unk_token: str | None = None
    continuing_subword_prefix: Literal["", None] = None
    end_of_word_suffix: Literal["</w>"]
    fuse_unk: Literal[False] = False
    byte_fallback: Literal[False] = False
    ignore_merges: Literal[False] = False
    vocab: dict[str, int]
    merges: list[Annotated[tuple[Token, Token], BeforeValidator(_pair)]]


class AddedToken(BaseModel):
    id: int
    content: str


class TokenizerFile(_File):
    """A tokenizer.json, whoever wrote it."""

    version: str
    truncation: Any = None
    padding: Any = None
    added_tokens: list[AddedToken]
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None
    model: Bpe

    @property
    def vocab(self) -> dict[str, int]:
        return self.model.vocab | {token.content: token.id for token in self.added_tokens}


class _Truncation(_File):
    max_length: int = Field(ge=3, le=65536)
    stride: Literal[0] = 0
    direction: Literal["Right"] = "Right"
    strategy: Literal["LongestFirst"] = "LongestFirst"


class Tokenizer:
    """Captions to ids. Two tokenizers are equal when every text gets the same ids from both."""

    def __init__(self, bpe: tokenizers.Tokenizer):
        """`bpe` frames a text with its two largest ids and truncates; ValueError otherwise."""
        self.vocab_size = bpe.get_vocab_size()
        self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1
        if bpe.truncation is None or bpe.encode("").ids != [self.sot, self.eot]:
            raise ValueError(
                f"expected a tokenizer that truncates and frames a text with its last ids, {self.sot} and {self.eot}; "
                f"got truncation {bpe.truncation} and {bpe.encode('').ids} for the empty text"
            )
        self.context_length: int = bpe.truncation["max_length"]
        bpe.normalizer = None  # type: ignore[assignment]  # `clean` does more; see `save`
        self._bpe = bpe

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with start and end, unpadded; longer texts are cut to `context_length` ids, the last of them the end."""
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts, got one text: {texts[:40]!r}")
        return [self._bpe.encode(_split_unframed(clean(text))).ids for text in texts]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids each text has, with start and end, before it is cut to `context_length`."""
        encoded = (self._bpe.encode(_split_unframed(clean(text))) for text in texts)
        return [len(first) + sum(len(rest) - 2 for rest in first.overflowing) for first in encoded]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 ids [B, context_length], padded with 0."""
        tokens_BL = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row_L, ids in zip(tokens_BL, self.encode(texts), strict=True):
            row_L[: len(ids)] = torch.tensor(ids)
        return tokens_BL

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._bpe.to_str() == other._bpe.to_str()

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: Path) -> None:
        """Write tokenizer.json in the format of Hugging Face `tokenizers`."""
        _portable(self._bpe).save(str(path))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json. Raises FileNotFoundError, or ValueError for a file that `save` does not write."""
        where = f"{path}: not a CLIP tokenizer"
        settings = read_json(Path(path))
        found = validated(TokenizerFile, settings, where)
        length = validated(_Truncation, found.truncation, f"{where}: truncation").max_length
        if found.vocab != (vocab := vocab_of(found.model.merges)):
            raise ValueError(
                f"{where}: expected {len(vocab)} tokens: 512 bytes, {len(found.model.merges)} merges, start and end; "
                f"got {len(found.vocab)}, or others"
            )
        for part, ours in ours_of(len(vocab), length).items():
            if not is_same(ours, settings.get(part)):
                raise ValueError(f"{where}: {part}: expected {ours!r:.200}, got {settings.get(part)!r:.200}")
        try:
            return cls.from_merges(found.model.merges, length)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @property
    def tokens(self) -> list[str]:
        """The token of every id."""
        vocab = self._bpe.get_vocab()
        return sorted(vocab, key=vocab.__getitem__)

    @classmethod
    def from_merges(cls, merges: Merges, context_length: int) -> Tokenizer:
        """The ids follow from the merges, in order of rank. Raises ValueError for a merge of what is no token."""
        return cls(_bpe(merges, context_length))

    @classmethod
    def openai(cls, context_length: int = 77) -> Tokenizer:
        """CLIP's tokenizer of 49,408 ids, from the vocabulary file inside the open_clip package."""
        package = find_spec("open_clip")  # finds without importing
        if package is None or not package.submodule_search_locations:
            raise ValueError("CLIP's vocabulary file comes with open_clip_torch: expected it to be installed")
        path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1:]
        merges = [(left, right) for left, right in (line.split() for line in lines[:NUM_OPENAI_MERGES])]
        return cls(_bpe(merges, context_length))

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int, context_length: int) -> Tokenizer:
        """A tokenizer of the same form for small data, with at most `vocab_size` ids.

        It has fewer where the captions run out of pairs that occur twice. Raises ValueError below 514 ids.
        """
        num_merges = vocab_size - NUM_BYTE_TOKENS - 2
        if num_merges < 0:
            raise ValueError(f"expected a vocab_size of at least {NUM_BYTE_TOKENS + 2}, got {vocab_size}")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns when a DataLoader worker forks
        bpe = _bpe([], context_length)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=_byte_alphabet(),
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        bpe.train_from_iterator((clean(caption) for caption in captions), trainer)
        merges = [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
        return cls(_bpe(merges[:num_merges], context_length))


def clean(text: str) -> str:
    """CLIP's cleaning: mojibake repaired, HTML entities read twice, white space collapsed, lower case."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # else there is nothing to repair
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _split_unframed(text: str) -> str:
    """Part "!<start_of_text>" after its punctuation, which CLIP's pattern reads first, so it is no start token."""
    if "_of_text>" not in text:
        return text
    pattern = r"(<(?:start|end)_of_text>)|((?:[^\w\s]|_)+<)(?=(?:start|end)_of_text>)"
    return re.sub(pattern, lambda match: match[1] or match[2] + " ", text)


def _byte_alphabet() -> list[str]:
    """One printable character per byte, in CLIP's order: the printable bytes, then those that stand in for the rest."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def vocab_of(merges: Merges) -> dict[str, int]:
    """The ids that follow from a list of merges."""
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *(left + right for left, right in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _portable(bpe: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """With the part of the cleaning that `tokenizers` can do."""
    portable = tokenizers.Tokenizer.from_str(bpe.to_str())
    whitespace = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    portable.normalizer = normalizers.Sequence([normalizers.NFC(), whitespace, normalizers.Lowercase()])
    return portable


@cache
def ours_of(vocab_size: int, context_length: int) -> dict[str, Any]:
    """What a tokenizer.json of ours says beside its model."""
    parts = json.loads(_portable(_bpe([], context_length)).to_str())
    for token in parts["added_tokens"]:
        token["id"] += vocab_size - NUM_BYTE_TOKENS - 2
    for token in parts["post_processor"]["special_tokens"].values():
        token["ids"] = [id + vocab_size - NUM_BYTE_TOKENS - 2 for id in token["ids"]]
    del parts["model"], parts["version"]
    return parts


def is_same(ours: Any, theirs: Any) -> bool:
    """But for fields that one version of `tokenizers` writes and another leaves out."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(is_same(ours.get(name), theirs.get(name)) for name in ours | theirs)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(is_same, ours, theirs))
    return ours == theirs or (not ours and not theirs)


def _bpe(merges: Merges, context_length: int) -> tokenizers.Tokenizer:
    """The ids and the pipeline that follow from a list of merges."""
    if context_length < 3:
        raise ValueError(f"expected a context_length of at least 3 (start, one token, end), got {context_length}")
    vocab = vocab_of(merges)
    if unknown := next((part for pair in merges for part in pair if part not in vocab), None):
        raise ValueError(f"expected merges of tokens, got one of {unknown!r:.80}")
    bpe = tokenizers.Tokenizer(models.BPE(vocab, list(merges), end_of_word_suffix=WORD_END))
    bpe.add_special_tokens([START, END])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocab[START]), (END, vocab[END])]
    )
    bpe.decoder = decoders.BPEDecoder(suffix=WORD_END)
    bpe.enable_truncation(context_length)
    return bpe
