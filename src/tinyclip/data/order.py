"""In which order an epoch visits the items: a pure function of (seed, epoch, position), sought without reading.

What lies on a disk is visited in a permutation of all items. What is fetched in groups (remote shards: a source that is
`Grouped`) is visited in `Windows`: groups are permuted, then the items inside windows of a few groups. A mixture has a
method `visits` of its own, like the function here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tinyclip.data.sources import Source


class Grouped(Protocol):
    """What a source has beside its items when neighbours are fetched together."""

    groups: np.ndarray | None  # the first item of each group, and the number of items; None: nothing is fetched
    window: int  # groups that are mixed at a time

    def expect(self, groups: Sequence[int]) -> None:
        """Begin to fetch these, in this order, in the background."""
        ...


Visits = list[tuple[int, int]]  # (item, how often it was visited before): for most sources the second is the epoch


def visits(source: Source, seed: int, epoch: int, start: int, stop: int) -> Visits:
    """The items at positions start to stop - 1 of an epoch."""
    if (own := getattr(source, "visits", None)) is not None:
        return own(seed, epoch, start, stop)
    if getattr(source, "groups", None) is not None:
        return _grouped(cast(Grouped, source), seed, epoch, start, stop)
    return permuted(len(source), seed, epoch, start, stop)


def _grouped(source: Grouped, seed: int, epoch: int, start: int, stop: int) -> Visits:
    assert source.groups is not None, "asked before"
    windows = Windows(np.diff(source.groups), source.window, seed, epoch)
    source.expect(windows.near(start, stop))
    return windows.visits(start, stop)


def permuted(size: int, seed: int, epoch: int, start: int, stop: int) -> Visits:
    held = _held(size, seed)
    if epoch not in held:
        held.clear()
        held[epoch] = epoch_order(size, seed, epoch)
    return [(index, epoch) for index in held[epoch][start:stop].tolist()]


@lru_cache(maxsize=16)  # sources of a mixture, each with its own seed
def _held(size: int, seed: int) -> dict[int, Tensor]:
    """The permutation of the epoch that was last asked for."""
    return {}


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The permutation of range(size) in which an epoch visits the items, int64."""
    return _permutation(size, f"{seed}/{epoch}")


def _permutation(size: int, seed: str) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(Random(seed).getrandbits(63)))


class Windows:
    """One epoch over neighbours that are fetched together, group g holding sizes[g] items.

    An item's window is that of its group, so the items of positions start to stop lie in the groups of the windows
    there, and nothing before them needs to be read.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, groups_per_window: int, seed: int, epoch: int) -> None:
        self.seed, self.epoch, self.per_window = seed, epoch, groups_per_window
        self.groups = epoch_order(len(sizes), seed, epoch).numpy()
        self.first = np.concatenate([[0], np.cumsum(sizes)])  # item of each group
        ends = np.cumsum(np.asarray(sizes)[self.groups])
        self.ends = ends[np.minimum(np.arange(1, self._count() + 1) * groups_per_window, len(sizes)) - 1]

    def _count(self) -> int:
        return -(-len(self.groups) // self.per_window)

    def near(self, start: int, stop: int) -> list[int]:
        """The groups of the windows of positions start to stop - 1, and of the next, as they come."""
        first, last = self._window_of(start), self._window_of(stop - 1)
        return self.groups[first * self.per_window : (last + 2) * self.per_window].tolist()

    def visits(self, start: int, stop: int) -> Visits:
        found = []
        for window in range(self._window_of(start), self._window_of(stop - 1) + 1):
            begin = int(self.ends[window - 1]) if window else 0
            items = self._items(window)[max(start - begin, 0) : max(stop - begin, 0)]
            found += [(index, self.epoch) for index in items.tolist()]
        return found

    def _window_of(self, position: int) -> int:
        return int(np.searchsorted(self.ends, position, side="right"))

    def _items(self, window: int) -> np.ndarray:
        groups = self.groups[window * self.per_window : (window + 1) * self.per_window]
        bounds = [(int(self.first[group]), int(self.first[group + 1])) for group in groups]
        items = np.concatenate([np.arange(*bound) for bound in bounds])
        return items[_permutation(len(items), f"{self.seed}/{self.epoch}/window {window}").numpy()]
