"""Text for other eyes: `redacted` is without secrets, `visible` without characters that act instead of being read.

Everything that leaves a run's recipe.yaml goes through `redacted`: what is printed, recorded, exported and shown. It
knows secrets by where they stand, in plain text and percent-encoded any number of times:

    scheme://USER:PASSWORD@host                          user and password are left out
    https://host/1.tar?X-Amz-Signature=...&limit=3       of a URL the query is left out, unless all of it is tinyclip's
    pipe:COMMAND                                         pipe:..., to the end of the text or of the mixture's member
    token=..., AWS_SECRET_ACCESS_KEY=..., Bearer ...,    the value is left out
    Authorization: ..., Cookie: ..., hf_..., ghp_...
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
LEFT_OUT = "..."
SPEC_KEYS = frozenset(  # of a data spec, whose query stands behind a URL's own
    [
        *("images", "image", "caption", "captions", "label", "templates", "sep", "quotes", "where", "limit"),
        *("min_side", "min_caption_chars", "dedup", "jpeg_side", "window", "cache_gb", "timeout_s", "retries"),
        *("config", "streaming", "split", "count", "seed", "mixture", "lines", "delimiter"),
    ]
)


def _coded(*characters: str) -> str:
    """A pattern of one of these characters, also as %3F, %253F, ..."""
    return "(?:" + "|".join(f"{re.escape(own)}|%(?:25)*{ord(own):02X}" for own in characters) + ")"


COLON, AT, SLASH, QUESTION, AND, EQUALS = map(_coded, ":@/?&=")
LONGEST = 2000  # characters of a user or a password: nothing takes time that grows faster than the text
SPACE = rf"(?:{_coded(' ')}|\+|\s)"
_I = re.IGNORECASE
_WEIGHT = r"[\d.]+(?:e[-+]?\d+)?"  # of a mixture's member
_MIXTURE = re.compile(rf"mixture\?(?={_WEIGHT}=)")
_NEXT_MEMBER = re.compile(rf"&(?={_WEIGHT}=)")
_COMMAND = re.compile(rf"(?<!\w)pipe{COLON}(?!{re.escape(LEFT_OUT)})(?=\s*[^\s,)]).*", _I | re.DOTALL)
_START = rf"((?<![a-z0-9+.-])(?:[a-z][a-z0-9+.-]+{COLON}{SLASH}{{1,2}}|{SLASH}{SLASH}))"  # a Path has one slash
_USER = re.compile(rf"{_START}(?:(?!{SLASH})[^\s<>]){{0,{LONGEST}}}{AT}", _I)
_USER_WITH_SLASH = re.compile(
    rf"{_START}(?:(?!{SLASH}|{COLON}|{AT})\S){{1,{LONGEST}}}{COLON}(?!\d+(?:{SLASH}|$))[^\s<>]{{0,{LONGEST}}}{AT}", _I
)
_URL = re.compile(rf"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]+{COLON}{SLASH}", _I)
_QUERY = re.compile(rf"({QUESTION})", _I)
_PARAMETERS = re.compile(AND, _I)
_PARAMETER = re.compile(rf"((?:(?!{EQUALS})\S)+{EQUALS})", _I)
_END = re.compile(r"[\"'`:,;.)\]}>]*$")  # of a sentence, not of a URL
_NAMED = re.compile(  # token=..., X-Amz-Signature=..., HF_TOKEN = ...
    rf"(?<![a-z0-9])((?:[a-z0-9]+[-_.]){{0,6}}(?:token|passwd|password|pwd|passphrase|secret|signature|sig|credentials?|"
    rf"api[-_]?key|access[-_]?key(?:[-_]?id)?|secret[-_]?key|private[-_]?key|account[-_]?key|sas)\s*{EQUALS}\s*)"
    rf"(?:\"[^\"]*\"|'[^']*'|(?:(?!{AND})[^\s\"'])+)",
    _I,
)
_HEADER = re.compile(
    rf"((?<![a-z0-9])(?:(?:proxy-)?authorization|(?:set-)?cookie|(?:x-[a-z0-9-]*|private-|api-)(?:token|key|secret)|"
    rf"password){SPACE}*{COLON}{SPACE}*+)(?!{re.escape(LEFT_OUT)})[^\"'\n]+",
    _I,
)
_BEARER = re.compile(rf"(?<!\w)(bearer{SPACE}++)(?!{re.escape(LEFT_OUT)})[^\s\"']+", _I)
_TOKEN = re.compile(  # those that are known by their shape
    r"(?<![A-Za-z0-9])(?:hf_(?=[a-z0-9]*[A-Z0-9])[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|"
    r"glpat-[\w-]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|xox[abprs]-[\w-]{8,}|sk-[A-Za-z0-9_-]{16,}|eyJ[\w-]+\.[\w-]+\.[\w-]+)"
)


def redacted(value: T) -> T:
    """Text without its secrets; of a mapping, list or tuple all text in it, names too. Other values as they are."""
    return _redacted(value, {})


def _redacted(value: Any, done: dict[int, Any]) -> Any:
    """`done` holds what stands in several places (YAML's aliases), or in itself, by id."""
    if isinstance(value, str):
        return value if value.startswith("data:image/") else _without_secrets(value)
    if isinstance(value, tuple):
        parts = [_redacted(own, done) for own in value]
        return tuple(parts) if type(value) is tuple else type(value)(*parts)
    if not isinstance(value, Mapping | list):
        return value
    if id(value) not in done and isinstance(value, Mapping):
        done[id(value)] = found = {}
        found.update({_redacted(name, done): _redacted(own, done) for name, own in value.items()})
    elif id(value) not in done:
        done[id(value)] = found = []
        found.extend(_redacted(own, done) for own in value)
    return done[id(value)]


def has_secrets(value: Any) -> bool:
    return redacted(value) != value


def _without_secrets(text: str) -> str:
    mixture, command = _MIXTURE.search(text), _COMMAND.search(text)
    if mixture is not None and not (command is not None and command.start() < mixture.start()):
        members = _NEXT_MEMBER.split(text[mixture.end() :])
        return _of_one(text[: mixture.end()]) + "&".join(map(_of_one, members))
    return _of_one(text)


def _of_one(text: str) -> str:
    text = _COMMAND.sub(f"pipe:{LEFT_OUT}", text)
    text = _USER_WITH_SLASH.sub(r"\1", _USER.sub(r"\1", text))
    if "?" in text or "%" in text:
        text = re.sub(r"\S+", lambda word: _without_query(word[0]), text)
    for pattern in (_HEADER, _BEARER, _NAMED):
        text = pattern.sub(rf"\1{LEFT_OUT}", text)
    return _TOKEN.sub(LEFT_OUT, text)


def _without_query(word: str) -> str:
    """A URL without its query, and any other word without the values in its own; what tinyclip reads itself stays."""
    first, *rest = _QUERY.split(word)
    is_url, kept = _URL.search(first) is not None, [first]
    for mark, query in zip(rest[::2], rest[1::2], strict=True):
        parameters = _PARAMETERS.split(query)
        if all(map(_is_ours, parameters)) or not (is_url or any(map(_PARAMETER.match, parameters))):
            kept += [mark, query]
            is_url = is_url or _URL.search(query) is not None  # a member of a mixture
            continue
        end = _END.findall(query)[0]
        if not is_url:
            end = end.removeprefix(LEFT_OUT)
            named = [(own, _PARAMETER.match(own)) for own in parameters]
            kept += [mark, "&".join(own if found is None else found[1] + LEFT_OUT for own, found in named)]
        kept.append(end)
    return "".join(kept)


def _is_ours(parameter: str) -> bool:
    named = _PARAMETER.match(parameter)
    if named is None:
        return parameter.strip("\"'`:,;.)]}>") in {"", *SPEC_KEYS}
    name = re.split(EQUALS, named[1], flags=_I)[0]
    return name in SPEC_KEYS or re.fullmatch(_WEIGHT, name) is not None


JOINERS = "\u200c\u200d"  # of letters and of emoji: they change nothing but the shape of what is beside them
ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control characters, marks of direction, halves of characters, line ends


def visible(text: str, keep: str = "") -> str:
    r"""Text in which what acts on a terminal or a page (ESC, line ends, turns of direction) is escaped, as \x1b.

    The characters in `keep` stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ACTING and character not in JOINERS + keep
        else character
        for character in text
    )
