"""Where pairs come from: tables, shards, class folders, the hub and the built-in scenes, behind one small interface.

An item is one image with all its captions: rows of a table that name the same image are one item. A broken item
raises BadItem when it is read; a broken data set raises ValueError when it is opened. No file of an archive is
unpacked to disk: what is fetched is kept whole, under a name of ours (cache.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

from PIL import Image

from tinyclip.config import Config
from tinyclip.data.decode import BadItem
from tinyclip.data.filters import Filtered, Readable, asks_for_filters
from tinyclip.data.hub import is_on_disk, open_hub
from tinyclip.data.mixture import Mixture
from tinyclip.data.parquet import open_parquet
from tinyclip.data.scenes import Scenes
from tinyclip.data.shards import Shards
from tinyclip.data.spec import HUGGINGFACE, DataSpec, is_remote
from tinyclip.data.tables import open_folders, open_table

__all__ = ["BadItem", "Evidence", "Source", "evidence", "is_local", "jpeg_sides", "left_out", "open_source"]

OPENERS = {
    "table": open_table,
    "parquet": open_parquet,
    "shards": Shards,
    "folders": open_folders,
    "huggingface": open_hub,
}


class Source(Protocol):
    """Random access to items. Picklable, and safe to use in forked workers."""

    name: str

    def __len__(self) -> int: ...
    def key(self, index: int) -> str:
        """Names the item for people: a file, a member of a shard."""
        ...

    def image(self, index: int) -> Image.Image:
        """Fully decoded, any mode that converts to RGB. Raises BadItem."""
        ...

    def captions(self, index: int) -> Sequence[str]:
        """Empty where the item has none; texts.Weighted where some are drawn more often. Raises BadItem."""
        ...

    def label(self, index: int) -> tuple[str, ...] | None:
        """The class's name, then its synonyms. Raises BadItem."""
        ...


def open_source(spec: str | Mapping[str, Any] | DataSpec, *, allow_remote: bool = False) -> Source:
    """Opens and checks a data set. What `spec` says itself is trusted; commands in a .yaml need `allow_remote`.

    Raises ValueError or FileNotFoundError, one line, for a missing file, column or image, a damaged archive, and a
    set without images.
    """
    spec = DataSpec.parse(spec, allow_remote=allow_remote)
    if spec.kind == "scenes":
        return Scenes(spec.scenes_split, spec.count, spec.seed)
    if spec.mixture is not None:
        return Mixture([open_source(member.data) for member in spec.mixture], [own.weight for own in spec.mixture])
    source = OPENERS[spec.kind](spec)
    source.jpeg_side = spec.jpeg_side
    return Filtered(cast(Readable, source), spec) if asks_for_filters(spec) else source


def is_local(spec: DataSpec) -> bool:
    """Whether reading it starts no process and opens no address."""
    return not any(is_remote(path) or (path.startswith(HUGGINGFACE) and not is_on_disk(path)) for path in spec.paths())


def jpeg_sides(source: Source) -> Any:
    """The spec's jpeg_side, on which pixels depend; of a mixture a list, where a member has one."""
    members: Sequence[Source] | None = getattr(source, "members", None)
    if members is not None:
        sides = [jpeg_sides(member) for member in members]
        return sides if any(sides) else None
    return getattr(getattr(source, "source", source), "jpeg_side", None)


def left_out(source: Source) -> dict[str, int]:
    """What opening the set ignored and filtered out, by reason."""
    return getattr(source, "left_out", {})


class Evidence(Config):
    """What tells whether a set is still the one that it was, without reading its images."""

    content: str  # sha256 of what changes with the content: sizes, checksums of archives, captions of tables
    times: str  # sha256 of when files were last written, which changes with every copy too

    def since(self, before: Evidence) -> str:
        """What has changed, for people; empty where nothing has."""
        if self.content != before.content:
            return (
                "THE DATA HAS CHANGED since the run began (sizes, checksums or captions differ): what is trained now "
                "is not what was trained before"
            )
        if self.times != before.times:
            return "files of the data were written or copied since the run began; their sizes have not changed"
        return ""


def evidence(source: Source) -> Evidence:
    content, times = hashlib.sha256(), hashlib.sha256()
    for what, when in _traces(source):
        content.update(f"{what!r}\n".encode())
        times.update(f"{when!r}\n".encode())
    return Evidence(content=content.hexdigest(), times=times.hexdigest())


def _traces(source: Source) -> Iterator[tuple[object, object]]:
    """What tells the content of each file, and when it was written; of sets that are not files, nothing."""
    for member in getattr(source, "members", ()):
        yield from _traces(member)
    files: Any = getattr(source, "source", source)  # Filtered
    if hasattr(files, "traces"):
        yield from files.traces()
