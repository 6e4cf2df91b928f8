"""Where a model comes from, and under which licences: written when it is compressed, and it travels with the weights.

Nothing is guessed: a licence is what the user said, or what the hub card of a published model says, or "unknown".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tinyclip.formats.files import validated
from tinyclip.redact import redacted

UNKNOWN = "unknown"
CARDS = {  # the licence on the hub's cards, by the model's name there; only what was read there
    "laion/CLIP-*-laion2B-*": "mit",
    "facebook/metaclip-*": "cc-by-nc-4.0",
    "timm/*.metaclip_*": "cc-by-nc-4.0",
}
RESTRICTIONS = {  # what is in a licence's name
    r"\bnc\b|non-?commercial": "non-commercial use only",
    r"\bnd\b|no-?deriv": "no derivatives",
    r"\bresearch\b|\bamlr\b": "research only",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Licenses(_Frozen):
    """What the user knows of the licences; SPDX names where there is one."""

    teacher: str | None = Field(default=None, min_length=1, description="else from the card of a published model")
    more_teachers: tuple[Annotated[str, Field(min_length=1)] | None, ...] | None = Field(
        default=None, description="one for each of the recipe's more_teachers; where null, likewise"
    )
    start: str | None = Field(
        default=None, min_length=1, description="of the weights that are inherited; else likewise"
    )
    data: str | None = Field(default=None, min_length=1, description="of the training data")


class Origin(_Frozen):
    """Something that went into a model, and its licence."""

    name: str
    license: str = UNKNOWN

    @property
    def restriction(self) -> str | None:
        """What the licence's name forbids, in words; None where it says nothing of the kind."""
        words = self.license.lower().replace("_", "-").replace(" ", "-")
        return ", ".join(said for pattern, said in RESTRICTIONS.items() if re.search(pattern, words)) or None


class Provenance(_Frozen):
    """One compression. `start` gave the weights where the teacher did not; ancestors are earlier ones, oldest first."""

    teacher: Origin | None = None
    more_teachers: tuple[Origin, ...] | None = Field(default=None, description="of an ensemble, those after `teacher`")
    start: Origin | None = None
    data: Origin
    recipe: str | None = Field(default=None, description="preset or file, with the settings that were changed")
    code: Origin
    ancestors: tuple[Provenance, ...] = ()

    @property
    def parts(self) -> dict[str, Origin]:
        """What went in, of this compression alone."""
        more = {f"teacher {number}": origin for number, origin in enumerate(self.more_teachers or (), 2)}
        parts = {"teacher": self.teacher, **more, "start": self.start, "data": self.data, "code": self.code}
        return {part: origin for part, origin in parts.items() if origin is not None}

    @property
    def line(self) -> Iterator[Provenance]:
        """The ancestors, oldest first, then this one; each without its own ancestors."""
        yield from self.ancestors
        yield self.model_copy(update={"ancestors": ()})


def ancestors(parents: Iterable[Provenance | None]) -> tuple[Provenance, ...]:
    """The lines of all parents in one, each compression once."""
    return tuple(dict.fromkeys(earlier for parent in parents if parent is not None for earlier in parent.line))


def model_origin(spec: str, license: str | None = None) -> Origin:
    """A model as a recipe names it."""
    return Origin(name=public(spec), license=license or _on_its_card(spec))


def hub_name(spec: str) -> str | None:
    """The model's name on the Hugging Face hub, where its spec has one: laion/CLIP-ViT-B-32-laion2B-s34B-b79K."""
    kind, colon, name = spec.partition(":")
    if not colon:
        return None
    if kind == "tinyclip":
        return f"wkcn/TinyCLIP-{name.removeprefix('TinyCLIP-').partition('/')[0].partition('?')[0]}"
    if kind == "open_clip":
        from tinyclip.formats.open_clip import on_the_hub

        return on_the_hub(name)
    return name if kind in ("hf", "hf-hub") else None


def public(spec: str) -> str:
    """A spec for other eyes: without secrets, and of where it lies on a disk the last two parts are left."""
    return re.sub(r"(^|[:=])(?:~|[A-Za-z]:)?/(?!/)(?:[^/?&]*/)*(?=[^/?&]+/[^/?&]+)", r"\1", redacted(spec))


def read_provenance(settings: Mapping[str, Any], where: str) -> Provenance | None:
    """What `entry` wrote, or None. Raises ValueError, with `where`, for something else under its name."""
    return validated(Provenance, settings["provenance"], f"{where}: provenance") if "provenance" in settings else None


def entry(provenance: Provenance | None) -> dict[str, Any]:
    """What a config.json says of it."""
    return {} if provenance is None else {"provenance": redacted(provenance.model_dump(mode="json", exclude_none=True))}


def license_line(provenance: Provenance | None) -> str:
    """One line for whoever passes the model on: the licences, and a warning where one restricts that."""
    if provenance is None:
        return "licences: unknown; the model does not say where it comes from"
    origins = {f"{part} {origin.name}": origin for one in provenance.line for part, origin in one.parts.items()}
    said = [
        f"{what}: {origin.license}{f' ({origin.restriction})' if origin.restriction else ''}"
        for what, origin in origins.items()
    ]
    restricted = any(origin.restriction for origin in origins.values())
    return f"{'warning: ' if restricted else ''}licences: {redacted('; '.join(said))}"


def _on_its_card(spec: str) -> str:
    name = hub_name(spec) or ""
    return next((license for pattern, license in CARDS.items() if fnmatch(name, pattern)), UNKNOWN)
