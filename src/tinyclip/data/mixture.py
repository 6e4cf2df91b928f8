"""Several sources as one, each with its share of the pairs.

Positions are dealt out in blocks of BLOCK: inside a block each member has its share, in a random order, and over
blocks the shares are exact to one pair. A member that is dealt its k-th pair shows the k-th of its own endless
order: so it shows all its items once before it shows any again, whatever the others do. Which member stands at a
position, and how many pairs it was dealt before, are sums of rounded shares: nothing is counted up from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from tinyclip.data.flags import flags_of
from tinyclip.data.order import Visits, visits

if TYPE_CHECKING:
    from tinyclip.data.sources import Source

BLOCK = 1000  # positions
LEAST_PER_BLOCK = 2  # pairs: rounding moves a block's count by less


class Mixture:
    """An epoch has as many positions as the members have items. Raises ValueError for a share below 0.2 %."""

    def __init__(self, members: Sequence[Source], weights: Sequence[float]) -> None:
        self.members = tuple(members)
        shares = np.asarray(weights, float) / sum(weights)
        if shares.min() * BLOCK < LEAST_PER_BLOCK:
            small = self.members[int(shares.argmin())].name
            raise ValueError(f"mixture: {small} has {shares.min():.3%} of the weight, expected at least 0.2%")
        self.name = "mixture of " + ", ".join(
            f"{share:.3g} {member.name}" for share, member in zip(shares, members, strict=True)
        )
        self.shares_to = np.concatenate([[0.0], np.cumsum(shares)[:-1], [1.0]])  # cumulative, one more than members
        self.first = np.concatenate([[0], np.cumsum([len(member) for member in members])])  # item of each member

    @property
    def left_out(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for member in self.members:
            for reason, count in getattr(member, "left_out", {}).items():
                counts[reason] = counts.get(reason, 0) + count
        return counts

    def __len__(self) -> int:
        return int(self.first[-1])

    def key(self, index: int) -> str:
        """The member's number, from 1, and its own key: members may name their items alike."""
        member, own = self._at(index)
        return f"{np.searchsorted(self.first, index, side='right')}/{member.key(own)}"

    def image(self, index: int) -> Image.Image:
        member, own = self._at(index)
        return member.image(own)

    def captions(self, index: int) -> Sequence[str]:
        member, own = self._at(index)
        return member.captions(own)

    def label(self, index: int) -> tuple[str, ...] | None:
        member, own = self._at(index)
        return member.label(own)

    def flags(self, index: int) -> Mapping[str, Any]:
        return flags_of(*self._at(index))

    def _at(self, index: int) -> tuple[Source, int]:
        member = int(np.searchsorted(self.first, index, side="right")) - 1
        return self.members[member], index - int(self.first[member])

    def visits(self, seed: int, epoch: int, start: int, stop: int) -> Visits:
        """The items at positions start to stop - 1 of an epoch, and how often each was visited before."""
        offset = epoch * len(self)
        turns = self._members_at(seed, offset + start, offset + stop)  # which member, at each position
        before = self._dealt(seed, offset + start)
        found: Visits = [(0, 0)] * len(turns)
        for member in np.unique(turns).tolist():
            places = np.flatnonzero(turns == member)
            own = self._own_visits(member, seed, int(before[member]), int(before[member]) + len(places))
            for place, (index, visit) in zip(places.tolist(), own, strict=True):
                found[place] = (index + int(self.first[member]), visit)
        return found

    def _own_visits(self, member: int, seed: int, start: int, stop: int) -> Visits:
        """Pairs number start to stop - 1 of all that the member is dealt."""
        source, own_seed, found = self.members[member], Random(f"{seed}/member {member}").getrandbits(63), []
        while start < stop:
            epoch, position = divmod(start, len(source))
            end = min(len(source), position + stop - start)
            found += visits(source, own_seed, epoch, position, end)
            start += end - position
        return found

    def _dealt(self, seed: int, position: int) -> np.ndarray:
        """How many pairs each member was dealt before a position, int64."""
        block = position // BLOCK
        pattern = self._pattern(seed, block)[: position - block * BLOCK]
        return self._before_block(block) + np.bincount(pattern, minlength=len(self.members))

    def _before_block(self, block: int) -> np.ndarray:
        return np.diff(np.floor(block * BLOCK * self.shares_to + 0.5).astype(np.int64))

    def _members_at(self, seed: int, start: int, stop: int) -> np.ndarray:
        first = start // BLOCK
        blocks = [self._pattern(seed, block) for block in range(first, (stop - 1) // BLOCK + 1)]
        return np.concatenate(blocks)[start - first * BLOCK : stop - first * BLOCK]

    def _pattern(self, seed: int, block: int) -> np.ndarray:
        """Which member stands at each position of a block."""
        counts = self._before_block(block + 1) - self._before_block(block)
        generator = torch.Generator().manual_seed(Random(f"{seed}/block {block}").getrandbits(63))
        return np.repeat(np.arange(len(self.members)), counts)[torch.randperm(BLOCK, generator=generator).numpy()]
