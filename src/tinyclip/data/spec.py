"""What a user writes to name a data set: one string, or a mapping with the same names.

The string is PATH[?key=value&key=value]. Values may hold '='; URL escapes such as %26 (&) are decoded. Examples:

    flickr8k/captions.tsv?images=images.zip&where=split=dev
    emoji/pairs.tsv?images=images.zip&caption=an emoji of {keywords}&sep=|
    tiny-imagenet/labels.tsv?images=images.zip&label=names&sep=,
    shards/{000..003}.tar
    imagenet/val                     a folder (or .zip) of class folders
    scenes?split=train&count=4000    the built-in generator

`KEYS` says which keys go with which kind of data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinyclip.data.scenes import Split

Kind = Literal["table", "shards", "folders", "scenes"]

KEYS: dict[Kind, tuple[str, ...]] = {  # which keys, beside path, mean something for which kind of data
    "table": ("images", "image", "caption", "label", "sep", "where", "limit"),
    "shards": ("caption", "label", "sep", "limit"),
    "folders": ("caption", "sep", "where", "limit"),
    "scenes": ("split", "count", "seed"),
}


class DataSpec(BaseModel):
    """A data set. Only `path` is needed; a key that means nothing for the kind of data is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        min_length=1,
        description="table.tsv or .csv; shards.tar, braces allowed; a folder or .zip of class folders; or 'scenes'",
    )
    images: str | None = Field(None, description="folder or .zip of images, relative to the table; default: its folder")
    image: str | None = Field(None, description="column with the image's path; default: file, filepath, image, ...")
    caption: str | None = Field(None, description="column, or a template: 'a {style} drawing of {name}'")
    label: str | None = Field(None, description="column (JSON field in shards) or template of the class name")
    sep: str | None = Field(None, min_length=1, description="splits a cell into several captions, or class synonyms")
    where: str | None = Field(None, description="keep the rows where all hold: 'split=train;style!=noto'")
    limit: int | None = Field(None, gt=0, description="the first so many images")
    split: Split = Field("train", description="which pictures the generator draws")
    count: int = Field(4000, gt=0, description="how many pictures the generator draws")
    seed: int = Field(0, description="the generator's seed")

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any] | DataSpec) -> DataSpec:
        """Raises ValueError, one line that quotes the spec."""
        try:
            return cls.model_validate(spec)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"data {spec!r}: {where + ': ' if where else ''}{reason}") from None

    def __str__(self) -> str:
        """What `parse` takes."""
        fields = self.model_dump(exclude={"path"}, exclude_defaults=True)
        query = "&".join(f"{key}={str(value).replace('%', '%25').replace('&', '%26')}" for key, value in fields.items())
        return f"{self.path}?{query}" if query else self.path

    @property
    def kind(self) -> Kind:
        if self.path == "scenes":
            return "scenes"
        if self.path.endswith((".tsv", ".csv")):
            return "table"
        return "shards" if self.path.endswith(".tar") else "folders"

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        """Strings are specs too, so that a recipe can hold either form. Names unknown keys with the known ones."""
        fields = _split(value) if isinstance(value, str) else value
        if isinstance(fields, Mapping) and (unknown := [key for key in fields if key not in cls.model_fields]):
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(cls.model_fields)}")
        return fields

    @model_validator(mode="after")
    def _keys_fit_kind(self) -> Self:
        for key, field in type(self).model_fields.items():
            if key not in ("path", *KEYS[self.kind]) and getattr(self, key) != field.default:
                raise ValueError(f"key {key!r} means nothing for {self.kind}, which take {', '.join(KEYS[self.kind])}")
        return self


def _split(text: str) -> dict[str, str]:
    path, _, query = text.partition("?")
    fields = {"path": path}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"expected key=value after '?', got {part!r}")
        if key in fields:
            raise ValueError(f"key {key!r} is given twice")
        fields[key] = unquote(value)
    return fields
