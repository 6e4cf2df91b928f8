"""What a user writes to name a data set: one string, or a mapping with the same names.

The string is PATH[?key=value&key=value]. Values may hold '='; URL escapes such as %26 (&) are decoded in them, and %3F
(?) in the path; a file that has the whole string for its name is that file. Examples:

    flickr8k/captions.tsv?images=images.zip&where=split=dev
    emoji/pairs.tsv?images=images.zip&caption=an emoji of {keywords}&sep=|
    tiny-imagenet/labels.tsv?images=images.zip&label=names&sep=,
    cc3m/train-{000..575}.parquet?captions=original:0.3|synthetic:0.7
    shards/{000..003}.tar            on disk; or s3://, gs://, https://, hf:// ...
    a/{00..31}.tar::b/{00..07}.tar   several patterns
    pipe:ssh store cat {000..003}.tar
    imagenet/val?templates=a photo of a {}.|a drawing of a {}.      a folder (or .zip) of class folders
    huggingface:nlphuji/flickr30k?split=test                        or a directory that `datasets` saved
    scenes?split=train&count=4000    the built-in generator
    mixture?2=cc3m/train.parquet&1=scenes?count=4000                or a .yaml file, see `Member`

`KEYS` says which keys go with which kind of data. A spec that a user typed or a program passes is as trusted as a
command line: `pipe:` runs a program. One that stood in a file (`FromFile`) runs none, unless that is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from tinyclip.config import Config
from tinyclip.data.scenes import Split
from tinyclip.formats.files import read_yaml
from tinyclip.redact import redacted

Kind = Literal["table", "parquet", "shards", "folders", "huggingface", "scenes", "mixture"]

_TEXTS = ("caption", "captions", "templates", "sep")
_FILTERS = ("limit", "min_side", "min_caption_chars", "dedup")
_IMAGES = ("jpeg_side",)
_REMOTE = ("window", "cache_gb", "timeout_s", "retries")
KEYS: dict[Kind, tuple[str, ...]] = {  # which keys, beside path, mean something for which kind of data
    "table": ("images", "image", "label", *_TEXTS, "delimiter", "quotes", "where", *_FILTERS, *_IMAGES),
    "parquet": ("images", "image", "label", *_TEXTS, "where", *_FILTERS, *_IMAGES, *_REMOTE),
    "shards": ("label", *_TEXTS, "lines", *_FILTERS, *_IMAGES, *_REMOTE),
    "folders": (*_TEXTS, "where", *_FILTERS, *_IMAGES),
    "huggingface": (
        *("split", "config", "streaming", "image", "label", *_TEXTS, "lines", "where"),
        *(*_FILTERS, *_IMAGES, *_REMOTE),
    ),
    "scenes": ("split", "count", "seed"),
    "mixture": ("mixture",),
}
Quotes = Literal["csv", "none"]
HUGGINGFACE = "huggingface:"
PIPE = "pipe:"
ESCAPED = re.compile(r"%(?:25)*3F")  # in a string: %3F is a ?, %253F is %3F, and so on
REFUSED = "a command (pipe:) runs where it is typed (--data, --set), or from a file with --allow-remote"
ALLOW_REMOTE = {"allow_remote": True}  # pydantic's context: commands from files are run


class FromFile(str):
    """Text that stood in a file: another may have written it."""


def from_file(value: Any) -> Any:
    """A value read from a file, with all of its text marked as such, in place."""
    waiting, seen = [value], set[int]()  # YAML's aliases may stand in several places, or in themselves
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, dict | list) and id(holder) not in seen:
            seen.add(id(holder))
            for key, own in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                holder[key] = FromFile(own) if isinstance(own, str) else own
                waiting.append(own)
    return FromFile(value) if isinstance(value, str) else value


class DataSpec(BaseModel):
    """A data set. Only `path` is needed; a key that means nothing for the kind of data is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        min_length=1,
        description="table.tsv, .csv or .parquet; shards.tar, braces and :: allowed; a URL or pipe:COMMAND of such; a "
        "folder or .zip of class folders; huggingface:ID or :DIRECTORY; 'scenes'; 'mixture', or its .yaml",
    )
    images: str | None = Field(None, description="folder or .zip of images, relative to the table; default: its folder")
    image: str | None = Field(None, description="column of the image or its path; default: file, filepath, image, ...")
    caption: str | None = Field(None, description="column, or a template: 'a {style} drawing of {name}'")
    captions: str | None = Field(
        None, description="several of them, and how often each is drawn: 'original:0.3|synthetic:0.7'"
    )
    label: str | None = Field(None, description="column (JSON field in shards) or template of the class name")
    templates: str | None = Field(
        None, description="captions made of the label: 'a photo of a {}.|a drawing of a {}.', or a file with one a line"
    )
    sep: str | None = Field(None, min_length=1, description="splits a cell into several captions, or class synonyms")
    lines: bool | None = Field(
        None, description="whether each line of a .txt in a tar is a caption of its own, or all are one; default: true"
    )
    delimiter: str | None = Field(
        None, pattern=r'^[^"\r\n]$', description="between cells; default: the one of tab , ; | that the header has"
    )
    quotes: Quotes | None = Field(
        None, description="of cells: as in CSV, or none; default: as in CSV, but in a .tsv none over several lines"
    )
    where: str | None = Field(None, description="keep the rows where all hold: 'split=train;style!=noto'")
    limit: int | None = Field(None, gt=0, description="the first so many images, before the three keys that follow")
    min_side: int | None = Field(None, gt=0, description="pixels; images with a shorter side are left out")
    min_caption_chars: int | None = Field(None, gt=0, description="shorter captions are left out")
    dedup: bool | None = Field(None, description="leave out images whose file equals an earlier one's, bit for bit")
    jpeg_side: int | None = Field(
        None, gt=0, description="decode larger JPEGs to n/8 of their size, at least so many pixels a side; not exact"
    )
    window: int | None = Field(None, gt=0, description="remote shards whose samples are mixed at a time; default: 8")
    cache_gb: float | None = Field(None, gt=0, description="of remote shards on disk (1e9 bytes); default: 50")
    timeout_s: float | None = Field(None, gt=0, description="for 4 MiB of a transfer, or it is retried; default: 60")
    retries: int | None = Field(None, ge=0, description="of a transfer, after pauses of 1, 2, 4 ... s; default: 4")
    config: str | None = Field(None, description="of a set on the Hugging Face hub that has several")
    streaming: bool | None = Field(None, description="read its Parquet or tar files as remote shards")
    split: str = Field("train", description="of the hub's set; or which pictures the generator draws")
    count: int = Field(4000, gt=0, description="how many pictures the generator draws")
    seed: int = Field(0, description="the generator's seed")
    mixture: tuple[Member, ...] | None = Field(None, min_length=1, description="sets, each with its weight")

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any] | DataSpec, *, allow_remote: bool = False) -> DataSpec:
        """Raises ValueError, one line that quotes the spec, and FileNotFoundError for a .yaml that is not there.

        Commands that stand in files, such as that .yaml, are refused unless `allow_remote`.
        """
        try:
            return cls.model_validate(spec, context=ALLOW_REMOTE if allow_remote else None)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"data {redacted(spec)!r}: {where + ': ' if where else ''}{reason}") from None

    def __str__(self) -> str:
        """What `parse` takes."""
        fields = self.model_dump(exclude={"path", "mixture"}, exclude_defaults=True)
        parts = [(f"{member.weight!r}", member.data) for member in self.mixture or ()] or fields.items()
        query = "&".join(f"{key}={_as_value(str(value))}" for key, value in parts)
        path = ESCAPED.sub(lambda match: match[0].replace("%", "%25", 1), self.path).replace("?", "%3F")
        return f"{path}?{query}" if query else path

    @property
    def name(self) -> str:
        """Of the set, for people: its path, or those that :: joins, without secrets."""
        return _without_secrets(self.path)

    @property
    def public(self) -> str:
        """The whole spec, for other eyes: without secrets."""
        if self.mixture is not None:
            return "mixture?" + "&".join(f"{own.weight!r}={_as_value(own.data.public)}" for own in self.mixture)
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return str(self.model_copy(update={**redacted(fields), "path": self.name}))

    def paths(self) -> list[str]:
        """Its own, or those of its members."""
        return [self.path] if self.mixture is None else [member.data.path for member in self.mixture]

    @property
    def kind(self) -> Kind:
        if self.path in ("scenes", "mixture"):
            return "scenes" if self.path == "scenes" else "mixture"
        if self.path.startswith(HUGGINGFACE):
            return "huggingface"
        return _kind_of(joined_paths(self.path)[-1])

    @property
    def scenes_split(self) -> Split:
        assert self.split in get_args(Split), f"checked when parsed: {self.split}"
        return cast(Split, self.split)

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any, info: ValidationInfo) -> Any:
        """Strings are specs too, so that a recipe can hold either form. Names unknown keys with the known ones."""
        fields = _split(value) if isinstance(value, str) else value
        if isinstance(value, FromFile):
            fields = from_file(fields)
        if not isinstance(fields, Mapping):
            return fields
        path = fields.get("path")
        if isinstance(path, FromFile) and commands_in(path) and info.context != ALLOW_REMOTE:
            raise ValueError(REFUSED)
        if isinstance(path, str) and path.endswith((".yaml", ".yml")):
            fields = {**fields, "path": "mixture", **_read_mixture(path)}
        if unknown := [key for key in fields if key not in cls.model_fields]:
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(cls.model_fields)}")
        return {"path": "mixture", **fields} if "mixture" in fields and path is None else fields

    @model_validator(mode="after")
    def _keys_fit_kind(self) -> Self:
        for key, field in type(self).model_fields.items():
            if key not in ("path", *KEYS[self.kind]) and getattr(self, key) != field.default:
                raise ValueError(f"key {key!r} means nothing for {self.kind}, which take {', '.join(KEYS[self.kind])}")
        own = joined_paths(self.path)
        if len(own) > 1 and (others := [part for part in own if _kind_of(part) != self.kind]):
            raise ValueError(f"expected files of one kind between ::, got {others[0]!r} beside {self.kind}")
        if any(not command.strip() for command in commands_in(self.path)):
            raise ValueError("expected a command behind pipe:, such as pipe:cat {000..003}.tar")
        if is_remote(self.path) and self.kind in ("table", "folders"):
            raise ValueError("expected .tar or .parquet behind a URL; tables and folders are read from disk")
        return self

    @model_validator(mode="after")
    def _keys_fit_each_other(self) -> Self:
        if self.kind == "scenes" and self.split not in get_args(Split):
            *others, last = map(repr, get_args(Split))
            raise ValueError(f"split: expected {', '.join(others)} or {last}, got {self.split!r}")
        given = [key for key in ("caption", "captions", "templates") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one of caption, captions and templates, got {' and '.join(given)}")
        if self.templates is not None and self.label is None and self.kind != "folders":
            raise ValueError("templates are filled with the label: expected label=COLUMN too")
        if self.kind == "mixture":
            if self.mixture is None:
                raise ValueError("path mixture: expected the key mixture too, its members")
            if any(member.data.kind == "mixture" for member in self.mixture):
                raise ValueError("a mixture inside a mixture: give its members weights of their own")
        return self


class Member(Config):
    """A set in a mixture. `{mixture: [{data: SPEC, weight: 2}, {data: SPEC}]}` is what a .yaml file holds."""

    data: DataSpec = Field(description="a path or a spec; paths are relative to the working directory")
    weight: float = Field(default=1.0, gt=0, description="its share of the pairs, relative to the others' weights")


DataSpec.model_rebuild()


def is_remote(path: str) -> bool:
    """A URL, or a command whose output is the file; or a list, joined by ::, that has one."""
    return bool(commands_in(path)) or any(re.match(r"[a-z][a-z0-9+.-]+://", part) for part in path.split("::"))


def commands_in(path: str) -> list[str]:
    """What follows pipe:, in a list joined by :: too."""
    return [part.removeprefix(PIPE) for part in path.split("::") if part.startswith(PIPE)]


def joined_paths(path: str) -> list[str]:
    """Those that are joined by :: where they are shards or Parquet files; a file whose name has a :: is one."""
    found = path.split("::")
    is_list = len(found) > 1 and _kind_of(found[-1]) in ("shards", "parquet") and not os.path.exists(path)
    return found if is_list else [path]


def _kind_of(path: str) -> Kind:
    if path.startswith(PIPE):
        return "shards"
    file = (path.partition("?")[0] if is_remote(path) else path).lower()  # a URL may have a query
    if file.endswith((".tsv", ".csv")):
        return "table"
    if file.endswith(".parquet"):
        return "parquet"
    return "shards" if file.endswith(".tar") else "folders"


def _without_secrets(path: str) -> str:
    return "::".join(map(redacted, path.split("::")))


def _as_value(text: str) -> str:
    """A value of a spec, whose own separators do not count."""
    return text.replace("%", "%25").replace("&", "%26")


def _split(text: str) -> dict[str, Any]:
    path, _, query = text.partition("?")
    if query and not is_remote(path) and os.path.exists(text):
        return {"path": text}
    pairs = []
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"expected key=value after '?', got {part!r}")
        pairs.append((key, unquote(value)))
    if path == "mixture":
        if not pairs:
            raise ValueError("a mixture has members: mixture?WEIGHT=SPEC&WEIGHT=SPEC")
        return {"path": path, "mixture": [{"weight": weight, "data": data} for weight, data in pairs]}
    fields = {"path": ESCAPED.sub(lambda match: "?" if match[0] == "%3F" else "%" + match[0][3:], path)}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"key {key!r} is given twice")
        fields[key] = value
    return fields


def _read_mixture(path: str) -> dict[str, Any]:
    """A .yaml file's fields, resolved when it is named, so that a recipe records what was mixed."""
    found = read_yaml(Path(path))
    if not isinstance(found, dict) or list(found) != ["mixture"]:
        raise ValueError(f"{path}: expected mixture: and a list of data and weight")
    members = found["mixture"] if isinstance(found["mixture"], list) else []
    specs = [member["data"] for member in members if isinstance(member, dict) and "data" in member]
    specs = [spec.get("path") if isinstance(spec, dict) else spec for spec in specs]
    if any(isinstance(spec, str) and spec.partition("?")[0].endswith((".yaml", ".yml")) for spec in specs):
        raise ValueError(f"{path}: a mixture inside a mixture: give its members weights of their own")  # or of itself
    return from_file(found)
