"""Sources -> batches. What training batch number `step` holds is a pure function of (seed, step).

So a resumed run sees the batches that it would have seen, and the number of workers changes nothing. An item that
cannot be read is left out of its batch and listed; `check_share_of_bad` is for whoever counts them.

Shape legend: B pairs, L tokens, S the side of the square picture that a model reads.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Generic, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinyclip.data import order
from tinyclip.data.sources import BadItem, Source, left_out
from tinyclip.data.texts import NO_CAPTION, draw
from tinyclip.distributed import ALONE, World, local_share
from tinyclip.preprocess import Preprocess, stack
from tinyclip.tokenizer import Tokenizer

ASPECTS = (3 / 4, 4 / 3)  # width / height of a random crop, as in torchvision's RandomResizedCrop
LOOK_EVERY_S = 0.5  # whether the main process is still there
MANY = 100  # items, of which a share of bad ones says something
Box = tuple[float, float, float, float]  # left, top, right, bottom in source pixels
Skipped = list[tuple[str, str]]  # (key, reason) of items that cannot be read
T = TypeVar("T")


class Reader(NamedTuple):
    """How one model sees a pair."""

    preprocess: Preprocess
    tokenizer: Callable[[Sequence[str]], Tensor]  # texts -> int64 [B, L]


@dataclass
class Inputs:
    pixels: Tensor  # uint8 [B, 3, S, S]
    tokens: Tensor  # int64 [B, L]; a tinyclip Tokenizer's are cut after the longest caption's end token
    seen: Tensor | None = None  # int64 [B, n]: the patches of each image that are not dropped

    def __getitem__(self, rows: slice) -> Inputs:
        return Inputs(self.pixels[rows], self.tokens[rows], None if self.seen is None else self.seen[rows])

    def __len__(self) -> int:
        return len(self.pixels)


class Visit(NamedTuple):
    """Which item of the source, crop of it (the epoch, where every visit has one of its own) and caption."""

    index: int
    view: int
    caption: int


@dataclass
class Batch:
    keys: list[str]
    captions: list[str]
    visits: list[Visit]
    inputs: tuple[Inputs, ...]  # one per reader; readers that agree hold the same tensor
    skipped: Skipped


class PairLoader:
    """Endless training batches: every epoch is a permutation of the source, without its last incomplete batch.

    A visit to an item draws one of its captions and one crop, the same for all readers: a share `crop_scale` of the
    picture's area, 3/4 to 4/3 wide. crop_scale=(1, 1) gives the evaluation view instead. With `views` there are so many
    crops of a picture, and epochs take turns: a crop is then a function of the picture's key and the view's number.
    Items, by number, that `may_show` denies are bad: a store's teacher could not read them.

    On several processes (`world`) each reads its share of every batch.

    Raises ValueError for a batch larger than the source or smaller than `world`; while iterating, for a batch with
    fewer than two readable pairs (a share with none).
    """

    def __init__(
        self,
        source: Source,
        readers: Sequence[Reader],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        views: int | None = None,
        may_show: Callable[[int], bool] | None = None,
        start_step: int = 0,
        world: World = ALONE,
    ) -> None:
        if not 2 <= batch_size <= len(source):
            raise ValueError(f"batch_size {batch_size}: expected 2 to {len(source)}, the images in {source.name}")
        if batch_size < world.size:
            raise ValueError(f"batch_size {batch_size}: expected a pair for each of {world.size} processes")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {crop_scale}: expected two shares of the area, 0 < smallest <= largest <= 1")
        self.source, self.readers, self.batch_size, self.seed = source, tuple(readers), batch_size, seed
        self.workers, self.crop_scale = workers, crop_scale
        self.views, self.may_show, self.start_step = views, may_show, start_step
        self.share = local_share(batch_size, world)
        self.least_pairs = 2 if world.size == 1 else 1
        self.steps_per_epoch = len(source) // batch_size
        # For every reader, the first one that sees the same pixels, and the first one that sees the same tokens.
        self._pixels_from = [
            next(i for i, first in enumerate(readers) if first.preprocess.same_pixels(reader.preprocess))
            for reader in readers
        ]
        self._tokens_from = [
            next(i for i, first in enumerate(readers) if first.tokenizer == reader.tokenizer) for reader in readers
        ]

    def __iter__(self) -> Iterator[Batch]:
        return in_order(self.batch, count(self.start_step), self.workers)

    def batch(self, step: int) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        items = order.visits(self.source, self.seed, epoch, start, start + self.batch_size)
        keys, visits, captions, pictures, skipped = [], [], [], [], []
        for index, turn in items[self.share]:
            key = self.source.key(index)
            try:
                visit, caption, picture = self._visit(index, turn)
            except BadItem as error:
                skipped.append((key, str(error)))
                continue
            keys.append(key)
            visits.append(visit)
            captions.append(caption)
            pictures.append(picture)
        if len(keys) < self.least_pairs:
            raise ValueError(
                f"{self.source.name}: {len(keys)} readable pairs in batch {step} of {self.batch_size}, "
                f"needs {self.least_pairs}{examples(skipped)}"
            )
        pixels = {i: stack([picture[i] for picture in pictures]) for i in set(self._pixels_from)}
        tokens = {i: _tokenize(self.readers[i].tokenizer, captions) for i in set(self._tokens_from)}
        inputs = tuple(Inputs(pixels[i], tokens[j]) for i, j in zip(self._pixels_from, self._tokens_from, strict=True))
        return Batch(keys, captions, visits, inputs, skipped)

    def _visit(self, index: int, epoch: int) -> tuple[Visit, str, dict[int, Tensor]]:
        """A caption, and the picture as each distinct reader sees it, uint8 [3, S, S]."""
        if self.may_show is not None and not self.may_show(index):
            raise BadItem("could not be read when the teacher was asked")
        random = Random(f"{self.seed}/{epoch}/{index}")
        captions = self.source.captions(index)
        if not captions:
            raise BadItem(NO_CAPTION)
        caption = draw(captions, random)
        if self.views is None:
            visit = Visit(index, epoch, caption)
        else:
            visit = Visit(index, epoch % self.views, caption)
            random = view_random(self.source.key(index), visit.view)
        return visit, captions[caption], self.picture(index, random)

    def picture(self, index: int, random: Random) -> dict[int, Tensor]:
        """The crop that `random` draws, as each distinct reader sees it, uint8 [3, S, S]. Raises BadItem."""
        image = self.source.image(index)
        if self.crop_scale == (1, 1):
            return {i: _whole(self.readers[i].preprocess, image) for i in set(self._pixels_from)}
        box = crop_box(image.size, self.crop_scale, random)
        return {i: self.readers[i].preprocess.crop(image, box) for i in set(self._pixels_from)}


def view_random(key: str, view: int) -> Random:
    """What draws crop number `view` of the picture named `key`: the same in every run."""
    return Random(f"{view}/{key}".encode(errors="surrogatepass"))  # a file's name may be no UTF-8


class EvalBatches:
    """(item indices, uint8 pixels [B, 3, S, S]) for every image of a source, in order, in the evaluation view.

    Images that cannot be read are left out; once iterated, `skipped` lists them.
    """

    def __init__(self, source: Source, preprocess: Preprocess, batch_size: int = 64, workers: int = 0) -> None:
        self.source, self.preprocess, self.batch_size, self.workers = source, preprocess, batch_size, workers
        self.skipped: Skipped = []

    def __iter__(self) -> Iterator[tuple[list[int], Tensor]]:
        self.skipped = []
        starts = range(0, len(self.source), self.batch_size)
        for indices, pixels, skipped in in_order(self._batch, starts, self.workers):
            self.skipped += skipped
            if indices:
                yield indices, stack(pixels)

    def _batch(self, start: int) -> tuple[list[int], list[Tensor], Skipped]:
        indices, pixels, skipped = [], [], []
        for index in range(start, min(start + self.batch_size, len(self.source))):
            try:
                pixels.append(_whole(self.preprocess, self.source.image(index)))
                indices.append(index)
            except BadItem as error:
                skipped.append((self.source.key(index), str(error)))
        return indices, pixels, skipped


def crop_box(size: tuple[int, int], scale: tuple[float, float], random: Random) -> Box:
    """A random box inside a picture of size (width, height): its share of the area, then an aspect made to fit."""
    width, height = size
    share = random.uniform(*scale)
    aspect = math.exp(random.uniform(*map(math.log, ASPECTS)))
    aspect = min(max(aspect, share * width / height), width / height / share)
    box_width, box_height = math.sqrt(share * width * height * aspect), math.sqrt(share * width * height / aspect)
    box_width, box_height = min(box_width, width), min(box_height, height)  # rounding can exceed them by an ulp
    left, top = random.random() * (width - box_width), random.random() * (height - box_height)
    return left, top, min(left + box_width, width), min(top + box_height, height)


def _whole(preprocess: Preprocess, image: Image.Image) -> Tensor:
    """The evaluation view, uint8 [3, S, S]. Raises BadItem for a picture that is hardly more than a line."""
    try:
        return preprocess(image)
    except ValueError as error:
        raise BadItem(str(error)) from None


def _tokenize(tokenizer: Callable[[Sequence[str]], Tensor], captions: list[str]) -> Tensor:
    """int64 [B, L]. Only our own tokenizer's padding is known to be dead: other towers may read it."""
    tokens_BL = tokenizer(captions)
    if isinstance(tokenizer, Tokenizer):
        return tokens_BL[:, : int(tokens_BL.argmax(dim=1).max()) + 1]  # the end token is the largest id
    return tokens_BL


def check_share_of_bad(name: str, num_bad: int, num_seen: int, enough: int, limit: float, skipped: Skipped) -> None:
    """Raises ValueError when more than a share `limit` of the items seen is bad, once `enough` or MANY were seen."""
    if num_seen >= min(enough, MANY) and num_bad > limit * num_seen:
        raise ValueError(f"{name}: {num_bad} of {num_seen} items are bad, the limit is {limit:.1%}{examples(skipped)}")


def examples(skipped: Skipped) -> str:
    """What follows a message: a colon, the first few as KEY: REASON, and what helps; nothing where none is bad."""
    lacks = any(reason == NO_CAPTION for _, reason in skipped)
    hint = "; the data's key min_caption_chars=1 leaves out what has no caption" * lacks
    return ": " * bool(skipped) + "; ".join(f"{key}: {reason}" for key, reason in skipped[:3]) + hint


class LeftOut:
    """What is left out of the sets that are read: how many items, by the set's name and by reason.

    `say` is told a line for each, once however often the set is read.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say
        self.counts: dict[str, dict[str, int]] = {}

    def opened(self, source: Source, name: str | None = None) -> None:
        """Counts what opening the set left out."""
        for reason, number in left_out(source).items():
            self.add(name or source.name, reason, number)

    def add(self, name: str, reason: str, number: int, skipped: Skipped | None = None) -> None:
        """`skipped` are some of the items, which are named."""
        counts = self.counts.setdefault(name, {}) if number else {}
        if number and counts.get(reason) != number:
            counts[reason] = number
            if self.say is not None:
                self.say(f"{name}: {number:,} left out: {reason}{examples(skipped or [])}")


class _Results(Dataset, Generic[T]):
    """function(number) for every number that the DataLoader's sampler gives."""

    def __init__(self, function: Callable[[int], T]) -> None:
        self.function = function

    def __getitem__(self, number: int) -> T | ValueError:
        try:
            return self.function(number)
        except ValueError as error:  # as a value: raised in a worker, it would come back as a page of traceback
            return error


def _obey(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, SIGTERM often every one of a job; the main one saves its state with
    what they read until then. It ends its workers, with a second SIGTERM if need be; where it is killed, they end too,
    with the commands that they run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(main: int) -> None:
    while os.getppid() == main:
        time.sleep(LOOK_EVERY_S)
    os._exit(1)


def in_order(function: Callable[[int], T], numbers: Iterable[int], workers: int) -> Iterator[T]:
    """map(function, numbers), ahead of time in worker processes if there are any."""
    loader = DataLoader(
        _Results(function),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_obey,
        generator=torch.Generator(),  # or the DataLoader would advance the global one
    )
    for result in loader:
        if isinstance(result, ValueError):
            raise result
        yield result
