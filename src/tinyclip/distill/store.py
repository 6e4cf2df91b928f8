"""Teachers asked once: embeddings of every caption and of some crops (`views`) of every image, on disk.

A caption's embedding is exact, since the teacher is deterministic. A crop is a function of its image's key and the
view's number (`tinyclip.data.loader`), so the student is shown later what the teacher saw.

    STORE/store.json            what it holds: the teacher, its preprocessing and tokenizer, the crops, the precision
    STORE/000000.safetensors    the first ITEMS items of the data, memory-mapped; 000001.safetensors the next, ...

A part is replaced whole, when it is done and now and then before, so building goes on where it was cut off, and where
data has grown; processes take turns with parts and need not talk. Hashes of keys and captions are stored too, and
compared when looked up. A part holds the sha256 of its tensors: one that is damaged is told of, and embedded again.

Shape legend: n items of a part, v views, m captions of a part, T teacher embedding.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock, Timeout
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tinyclip.config import Config, changes
from tinyclip.data.loader import (
    Batch,
    PairLoader,
    Skipped,
    Visit,
    check_share_of_bad,
    examples,
    in_order,
    view_random,
)
from tinyclip.data.sources import BadItem, Source, jpeg_sides
from tinyclip.distill.teacher import Teacher
from tinyclip.distributed import ALONE, World
from tinyclip.formats import weights
from tinyclip.formats.files import make_directory, read_record, sync, write_record, writing
from tinyclip.model import unit
from tinyclip.progress import Display
from tinyclip.redact import redacted
from tinyclip.stopping import Interrupted, stop_requests
from tinyclip.tokenizer import Tokenizer

ITEMS = 4096  # of a part
READ_AT_ONCE = 64  # items
UNWRITTEN_S = 60.0  # seconds of work that a kill -9 can lose
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class StoreConfig(Config):
    """Where the teacher's embeddings are kept, and how many of them."""

    path: str | None = Field(default=None, description="a directory, which runs may share; default: in the run")
    views: int = Field(default=1, gt=0, description="crops of each image, which epochs take in turn")
    dtype: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp16", description="on disk; of 16 bits, fp16 is the more precise for unit vectors"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the teacher's products")
    batch_size: int = Field(default=256, gt=0, description="crops or captions that the teacher embeds at once")


class Stored:
    """A teacher's embeddings instead of the teacher. `views` is the number of crops of each image."""

    def __init__(self, directory: Path, teacher: Teacher, config: StoreConfig):
        self.directory, self.views = directory, config.views
        self._layout = _Layout(config.views, teacher.embed_dim, DTYPES[config.dtype])
        self.name, self.embed_dim, self.scale = teacher.name, teacher.embed_dim, teacher.scale
        self._parts: dict[int, _Part] = {}

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit fp32 embeddings [B, T] of the batch's crops and captions, on the CPU.

        Raises ValueError for an item or a caption that is not the one that was stored, or could not be read then.
        """
        pairs = zip(batch.keys, batch.captions, batch.visits, strict=True)
        found = [self._part(visit.index // ITEMS).find(key, caption, visit) for key, caption, visit in pairs]
        image_BT, text_BT = (torch.stack(side) for side in zip(*found, strict=True))
        if image_BT.dtype == torch.float32:
            return image_BT, text_BT
        return unit(image_BT.float()), unit(text_BT.float())

    def has(self, index: int) -> bool:
        """Whether the item could be read when the teacher was asked."""
        return self._part(index // ITEMS).key(index % ITEMS) != UNREADABLE

    def _part(self, number: int) -> _Part:
        if number not in self._parts:
            self._parts[number] = _Part(self.directory / _name(number), self._layout)
        return self._parts[number]


def in_all(stores: Sequence[Stored], index: int) -> bool:
    """Whether every store has the item."""
    return all(store.has(index) for store in stores)


class _Layout(NamedTuple):
    """What every part of a store is like."""

    views: int
    embed_dim: int
    dtype: torch.dtype


class _Part:
    """One file: `key` [n], `first` [n + 1] (where an item's captions begin), `caption` [m], `image` [n, v, T], `text`
    [m, T]. Keys and captions are hashes."""

    def __init__(self, path: Path, layout: _Layout):
        """Raises ValueError for anything else."""
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self._noted = file.metadata() or {}
            self.tensors: Mapping[str, Tensor] = load_file(path)  # maps the file; rows are read when they are used
        except (OSError, SafetensorError, ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{path}: not a part of a teacher store, or damaged ({error})") from None
        self._check_layout(layout)

    def _check_layout(self, layout: _Layout) -> None:
        n, m = (len(self.tensors[name]) if _is_list(self.tensors.get(name)) else 0 for name in ("key", "caption"))
        floats = {"image": (n, layout.views, layout.embed_dim), "text": (m, layout.embed_dim)}
        expected = {name: (layout.dtype, shape) for name, shape in floats.items()}
        expected |= {"key": (torch.int64, (n,)), "first": (torch.int64, (n + 1,)), "caption": (torch.int64, (m,))}
        got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        if changed := changes({k: str(v) for k, v in expected.items()}, {k: str(v) for k, v in got.items()}):
            raise ValueError(f"{self.path}: not a part of this teacher store, or damaged ({changed})")
        first = self.tensors["first"]
        if not 0 < n <= ITEMS or first[0] != 0 or first[-1] != m or (first.diff() < 0).any():
            raise ValueError(f"{self.path}: damaged, {n} items and {m} captions do not belong together")

    def check(self) -> None:
        """Raises ValueError where it is not as it was written; of a part without a sha256, where it cannot be."""
        if not self._noted.keys() <= {"format", "sha256"}:
            raise ValueError(f"{self.path}: damaged, expected the sha256 of its tensors, got other notes")
        if "sha256" in self._noted:
            if self._noted["sha256"] != _sha256(self.tensors):
                raise ValueError(f"{self.path}: damaged, its tensors have not the sha256 that it notes")
            return
        could_be_read = self.tensors["key"] != UNREADABLE
        if not (_are_unit(self.tensors["image"][could_be_read]).all() and _are_unit(self.tensors["text"]).all()):
            raise ValueError(f"{self.path}: damaged, it holds embeddings that are no unit vectors")

    def find(self, key: str, caption: str, visit: Visit) -> tuple[Tensor, Tensor]:
        """The embeddings [T] of one crop and one caption."""
        row, first = visit.index % ITEMS, self.tensors["first"]
        stored = self.key(row)
        if stored != hash_of(key):
            why = "could not be read when it was built" if stored == UNREADABLE else "is not the one it was built with"
            raise ValueError(f"{self.path}: {key} {why}; use another store, or delete this part to build it anew")
        place, end = int(first[row]) + visit.caption, int(first[row + 1])
        if place >= end or int(self.tensors["caption"][place]) != hash_of(caption):
            raise ValueError(f"{self.path}: {key} did not have the caption {caption!r} when it was built")
        return self.tensors["image"][row, visit.view], self.tensors["text"][place]

    def key(self, row: int) -> int | None:
        return int(self.tensors["key"][row]) if row < len(self) else None

    def embedded(self) -> _Embedded:
        """All of it, to be continued."""
        keys, captions, counts = (self.tensors[name].tolist() for name in ("key", "caption", "first"))
        num_captions = [end - start for start, end in itertools.pairwise(counts)]
        return _Embedded(keys, num_captions, captions, self.tensors["image"].float(), self.tensors["text"].float())

    def __len__(self) -> int:
        return len(self.tensors["key"])


UNREADABLE = 0  # as an item's key
NORM_TOLERANCE = 0.05  # of unit vectors of any dtype


def _is_list(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 1


def _are_unit(rows: Tensor) -> Tensor:
    """Of each row whether it is finite and of length one."""
    return (rows.float().norm(dim=-1) - 1).abs() <= NORM_TOLERANCE


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Over names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_of(text: str) -> int:
    """63 bits, never UNREADABLE."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return 1 + int.from_bytes(digest) % (2**63 - 1)


def _name(part: int) -> str:
    return f"{part:06d}.safetensors"


def store_teacher(
    teacher: Teacher,
    source: Source,
    config: StoreConfig,
    directory: Path,
    *,
    crop_scale: tuple[float, float],
    max_bad_share: float = 0.01,
    workers: int = 0,
    world: World = ALONE,
    say: Callable[[str], None] = print,
) -> Stored:
    """Embed what `directory` does not hold yet; what is there is used.

    Items that cannot be read are counted; parts that are damaged are told of, and embedded again. Raises ValueError
    where more than `max_bad_share` of the items cannot be read, where the teacher gives no unit vector, and where the
    directory holds another teacher's embeddings, other crops or other data; Interrupted after Ctrl-C or SIGTERM, once
    what was embedded is written.
    """
    asked = _Asked(teacher, source, config, crop_scale, max_bad_share, say)
    is_new = world.on_main(_is_new, directory)
    with _alone(directory, world, say) if is_new else nullcontext():  # of two runs that begin it, one after the other
        world.on_main(_claim, directory, asked.holds())
    if world.on_main(asked.missing, directory):
        with _alone(directory, world, say):
            _complete(asked, directory, workers, world, say)
    return Stored(directory, teacher, config)


def _complete(asked: _Asked, directory: Path, workers: int, world: World, say: Callable[[str], None]) -> None:
    """Embed what is missing; processes take turns with parts."""
    teacher = asked.teacher
    missing = world.on_main(asked.missing, directory)
    asked.count_bad(world.on_main(asked.num_unreadable, directory))
    started = time.perf_counter()
    mine = [part for part in missing if teacher.sharded or part % world.size == world.rank]  # or all of them at once
    with stop_requests() as requests, ExitStack() as shown:
        display = None
        if world.is_main and mine:
            display = Display(f"asking {teacher.name}", 0, sum(missing[part] for part in mine), unit="images")
            shown.callback(display.close)
        for part in mine:
            path = directory / _name(part)
            embedded, written_at, unwritten = asked.begun(part, path, missing[part]), time.perf_counter(), 0
            for few in asked.embed(part, missing[part], workers):
                embedded.append(few)
                unwritten += len(few.keys)
                if display is not None:
                    display.advance(asked.num_done, asked.num_done / (time.perf_counter() - started))
                stop = any(world.sums(len(requests))) if teacher.sharded else bool(requests)
                if stop or time.perf_counter() - written_at > UNWRITTEN_S:
                    asked.write(path, embedded, world)
                    written_at, unwritten = time.perf_counter(), 0
                if stop:
                    stopped = f"stopped after asking {teacher.name} about {asked.num_done:,} images"
                    raise Interrupted(f"{stopped}, kept in {directory}", requests[0] if requests else signal.SIGTERM)
            if unwritten:
                asked.write(path, embedded, world)
    world.barrier()
    if missing:
        _tell(asked, directory, sum(missing.values()) / (time.perf_counter() - started), world, say)


def _tell(asked: _Asked, directory: Path, images_per_s: float, world: World, say: Callable[[str], None]) -> None:
    """What was stored, what could not be, and what it saves."""
    num_processes = 1 if asked.teacher.sharded else world.size  # that took turns
    skipped = asked.skipped if num_processes == 1 else world.concatenated(asked.skipped)
    if num_bad := world.on_main(asked.num_unreadable, directory):
        say(
            f"teacher store: {num_bad:,} images could not be read, and will not be asked about again unless their "
            f"part of {directory} is deleted{examples(skipped)}"
        )
    num_images, size = len(asked.source), sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    line = f"teacher store: {num_images:,} images, {size / 1e6:,.1f} MB, {size / num_images:,.0f} bytes each; "
    line += f"{images_per_s:,.1f} images/s"
    if asked.num_done:
        an_epoch = asked.seconds_a_view * num_images / asked.num_done / num_processes
        line += f"; every epoch saves about {an_epoch:,.1f} s"
    say(line)


@contextmanager
def _alone(directory: Path, world: World, say: Callable[[str], None]) -> Iterator[None]:
    """Runs may share a store: while another call adds to it, wait."""
    lock = FileLock(directory / ".lock")

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{directory}: waiting for another process that adds to this store")
            lock.acquire()

    world.on_main(acquire)
    try:
        yield
    finally:
        lock.release()


class _Holds(Config):
    """What tells one store from another: store.json."""

    format: int
    teacher: str
    weights: str
    preprocess: str
    tokenizer: str
    captions_are_cut: bool
    crop_scale: tuple[float, float]
    jpeg_side: Any = None
    views: int
    dtype: str
    precision: str
    items_per_part: int


def _is_new(directory: Path) -> bool:
    """Whether it holds no store yet; then it is a directory. Raises ValueError for parts of nobody knows what."""
    if (directory / "store.json").exists():
        return False
    if directory.exists() and any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory}: expected a new directory or a teacher store, found parts without store.json")
    make_directory(directory)
    return True


def _claim(directory: Path, holds: _Holds) -> None:
    path = directory / "store.json"
    if not path.exists():
        write_record(path, holds.model_dump_json(indent=2))
        return
    try:
        before = read_record(_Holds, path)
    except ValueError as error:
        raise ValueError(f"{error}; delete {directory} to ask the teacher again") from None
    then, now = (each.model_dump(mode="json", exclude={"teacher"}) for each in (before, holds))  # its name may differ
    if changed := changes(then, now):
        raise ValueError(f"{directory} holds other embeddings; changed: {changed}; use another store.path")


class _Items(NamedTuple):
    """What is embedded of a few items: those that can be read."""

    start: int  # the first item's number
    keys: list[int]
    num_captions: list[int]
    pixels: Tensor | None  # uint8 [readable items * v, 3, S, S]
    captions: list[str]
    skipped: Skipped


class _Embedded(NamedTuple):
    keys: list[int]
    num_captions: list[int]
    captions: list[int]
    image_nvT: Tensor
    text_mT: Tensor


class _Asked:
    """One teacher, one data set, one way to crop."""

    def __init__(
        self,
        teacher: Teacher,
        source: Source,
        config: StoreConfig,
        crop_scale: tuple[float, float],
        max_bad_share: float,
        say: Callable[[str], None],
    ):
        self.teacher, self.source, self.config, self.max_bad_share = teacher, source, config, max_bad_share
        self.say, self.layout = say, _Layout(config.views, teacher.embed_dim, DTYPES[config.dtype])
        self._seen: dict[Path, tuple[tuple[int, int, int], _Part | None]] = {}  # parts, as they were when checked
        self.num_done = 0  # items embedded by this process
        self.num_bad = 0  # of all items, as far as this process knows
        self.skipped: Skipped = []  # by this process
        self.loader = PairLoader(source, [teacher.reader], batch_size=2, seed=0, crop_scale=crop_scale)
        self.num_parts = math.ceil(len(source) / ITEMS)
        self.seconds_a_view = 0.0  # of the teacher alone, for one crop and one caption of each item so far

    def holds(self) -> _Holds:
        tokenizer = self.teacher.tokenizer
        texts = ["a photo of a cat", "Zwölf Boxkämpfer jagen Viktor.", "10 $ & ...", "long " * 100]
        ids = tokenizer(texts)
        return _Holds(
            format=1,
            teacher=redacted(self.teacher.name),
            weights=self.teacher.weights_sha256,
            preprocess=repr(self.teacher.preprocess),
            tokenizer=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
            captions_are_cut=isinstance(tokenizer, Tokenizer),
            crop_scale=self.loader.crop_scale,
            jpeg_side=jpeg_sides(self.source),
            views=self.config.views,
            dtype=self.config.dtype,
            precision=self.config.precision,
            items_per_part=ITEMS,
        )

    def items(self, part: int) -> range:
        return range(part * ITEMS, min((part + 1) * ITEMS, len(self.source)))

    def missing(self, directory: Path) -> dict[int, int]:
        """How many items each part lacks that is not whole. Raises ValueError where one is of other data."""
        stored = {part: self._stored(directory, part) for part in range(self.num_parts)}
        lacks = {part: len(self.items(part)) - len(found or ()) for part, found in stored.items()}
        return {part: num_items for part, num_items in lacks.items() if num_items > 0}

    def _stored(self, directory: Path, part: int) -> _Part | None:
        """A part that is there and whole; a damaged one is told of. Each is checked once, as long as it stays."""
        path = directory / _name(part)
        if not path.exists():
            return None
        if not path.is_file():
            raise ValueError(f"{path}: expected a part of a teacher store, got no file")
        stat = path.stat()
        version = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if path not in self._seen or self._seen[path][0] != version:
            self._seen[path] = version, self._checked(path, part)
        return self._seen[path][1]

    def _checked(self, path: Path, part: int) -> _Part | None:
        try:
            stored = _Part(path, self.layout)
            stored.check()
        except ValueError as error:
            self.say(f"{error}; the teacher is asked again")
            return None
        items = self.items(part)
        for row in {0, min(len(stored), len(items)) - 1}:
            key = self.source.key(items[row])
            if stored.key(row) not in (hash_of(key), UNREADABLE):
                raise ValueError(f"{path}: built with other data: item {items[row]} was not {key}; use another store")
        if part == 0 and stored.key(0) != UNREADABLE and self._captions_differ(stored):
            raise ValueError(f"{path}: built with other data: item 0 had other captions; use another store")
        return stored

    def _captions_differ(self, first: _Part) -> bool:
        """Of the first item; those of others would have to be read."""
        stored = first.tensors["caption"][: int(first.tensors["first"][1])].tolist()
        try:
            return stored != [hash_of(caption) for caption in self.source.captions(0)]
        except BadItem:
            return False

    def num_unreadable(self, directory: Path) -> int:
        """Items of the parts that are there."""
        stored = [found for part in range(self.num_parts) if (found := self._stored(directory, part)) is not None]
        return sum(int((found.tensors["key"] == UNREADABLE).sum()) for found in stored)

    def count_bad(self, num_bad: int) -> None:
        """Raises ValueError where too many of all items cannot be read."""
        self.num_bad += num_bad
        check_share_of_bad(self.source.name, self.num_bad, len(self.source), 0, self.max_bad_share, self.skipped)

    def begun(self, part: int, path: Path, num_missing: int) -> list[_Embedded]:
        """What there is of a part that lacks so many items."""
        return [_Part(path, self.layout).embedded()] if num_missing < len(self.items(part)) else []

    def embed(self, part: int, num_items: int, workers: int) -> Iterator[_Embedded]:
        """The part's last `num_items`, a few at a time. Raises as `count_bad` does."""
        end = self.items(part).stop
        starts = range(end - num_items, end, READ_AT_ONCE)
        for read in in_order(partial(_read, self.loader, self.config.views), starts, workers):
            captions = [hash_of(caption) for caption in read.captions]
            started = time.perf_counter()
            images = self._images(read)
            seen = time.perf_counter()
            texts = self._texts(read.captions)
            self._require_unit(read, images, texts)
            self.seconds_a_view += (seen - started) / self.config.views
            self.seconds_a_view += (time.perf_counter() - seen) * len(read.keys) / max(1, len(captions))
            self.num_done += len(read.keys)
            self.skipped += read.skipped
            self.count_bad(len(read.skipped))
            yield _Embedded(read.keys, read.num_captions, captions, images, texts)

    def write(self, path: Path, embedded: Sequence[_Embedded], world: World) -> None:
        if self.teacher.sharded and not world.is_main:  # which has the same
            return
        dtype = DTYPES[self.config.dtype]
        counts = [count for few in embedded for count in few.num_captions]
        tensors = {
            "key": torch.tensor([key for few in embedded for key in few.keys]),
            "first": torch.tensor([0, *counts]).cumsum(0),
            "caption": torch.tensor([caption for few in embedded for caption in few.captions], dtype=torch.int64),
            "image": torch.cat([few.image_nvT for few in embedded]).to(dtype),
            "text": torch.cat([few.text_mT for few in embedded]).to(dtype),
        }
        unfinished = path.with_suffix(".tmp")
        with writing(path):
            weights.write(tensors, unfinished, {"sha256": _sha256(tensors)})  # for whoever shares the store
            sync(unfinished)
            unfinished.replace(path)
        sync(path.parent)

    def _require_unit(self, read: _Items, images: Tensor, texts: Tensor) -> None:
        """Raises ValueError where the teacher has no answer, as one whose products overflow."""
        is_readable = torch.tensor(read.keys) != UNREADABLE
        is_bad = is_readable & ~_are_unit(images).all(dim=-1)
        names = [self.source.key(read.start + row) for row in is_bad.nonzero().flatten().tolist()]
        names += [repr(read.captions[row]) for row in (~_are_unit(texts)).nonzero().flatten().tolist()]
        if names:
            raise ValueError(
                f"{self.teacher.name}: expected unit vectors, got none for {len(names)} of {len(images) + len(texts)} "
                f"images and captions, the first is {names[0]}; is it the teacher, or its precision?"
            )

    def _images(self, read: _Items) -> Tensor:
        """[items, v, T]; zeros for those that cannot be read."""
        embedded = torch.zeros(len(read.keys), self.config.views, self.teacher.embed_dim)
        if read.pixels is not None:
            parts = read.pixels.split(self.config.batch_size)
            with self._precision():
                rows = [self.teacher.embed_images(x.to(self.teacher.device)).cpu() for x in parts]
            embedded[torch.tensor(read.keys) != UNREADABLE] = torch.cat(rows).unflatten(0, (-1, self.config.views))
        return embedded

    def _texts(self, captions: list[str]) -> Tensor:
        """[captions, T]."""
        size = self.config.batch_size
        chunks = [captions[start : start + size] for start in range(0, len(captions), size)]
        with self._precision():
            rows = [self.teacher.embed_texts(chunk).cpu() for chunk in chunks]
        return torch.cat([torch.zeros(0, self.teacher.embed_dim), *rows])

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.teacher.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")


def _read(loader: PairLoader, views: int, start: int) -> _Items:
    """A few items of one part, from number `start` on."""
    source = loader.source
    keys, num_captions, pixels, captions, skipped = [], [], [], [], []
    for index in range(start, min(start + READ_AT_ONCE, (start // ITEMS + 1) * ITEMS, len(source))):
        key = source.key(index)
        try:
            texts = list(source.captions(index))
            crops = [loader.picture(index, view_random(key, view))[0] for view in range(views)]
        except BadItem as error:
            skipped.append((key, str(error)))
            keys.append(UNREADABLE)
            num_captions.append(0)
            continue
        keys.append(hash_of(key))
        num_captions.append(len(texts))
        pixels += crops
        captions += texts
    return _Items(start, keys, num_captions, torch.stack(pixels) if pixels else None, captions, skipped)
