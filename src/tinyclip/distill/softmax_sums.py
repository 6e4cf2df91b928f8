"""The row and the column softmax of scores that are seen tile by tile: their sums, and tiles of their gradient.

Scores are scale * cosine. `ShiftedSums` takes one constant off every score before the exponential: right where no score
is above the scale and none of the sums vanishes; `merge` says whether that was so. `RunningSums` takes off the largest
score of every row and column so far: right for any scores, at two exponentials per score.

A scale is a number, or a tensor that nobody reads: then known to be at most MAX_SCALE.

Shape legend: B rows (of this rank), N columns, r x k a tile, M the sum and the sums weighted by each model's cosines.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinyclip.distill.tiles import LONGEST_UNIT, Pairs, Scratch, Tile
from tinyclip.distributed import World
from tinyclip.model import MAX_SCALE


class SoftmaxSums:
    """What both kinds share: sums of exponentials of the scores of `model` (its place in `Tile.cosines`).

    With `means`, the cosines of all models are summed too, weighted by these exponentials.
    """

    def __init__(self, pairs: Pairs, model: int, scale: Tensor | float, *, means: bool = False):
        B, N = pairs.shape
        M = 1 + (len(pairs.models) if means else 0)
        self.model, self.scale = model, scale
        self.scratch: Scratch = pairs.scratch
        self.rows_MB, self.columns_MN = pairs.image.new_zeros(M, B), pairs.image.new_zeros(M, N)

    def add(self, tile: Tile) -> None:
        raise NotImplementedError

    def merge(self, world: World) -> bool:
        """Adds the columns of all ranks. Returns whether the sums can be trusted: the same on every rank."""
        raise NotImplementedError

    def weigh(self, tile: Tile, weight: Tensor, out: str) -> Tensor:
        """weight * (row softmax + column softmax) of a tile, written to the scratch tile `out`."""
        raise NotImplementedError

    def softmaxes(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """(row softmax, column softmax) of a tile, freshly allocated."""
        raise NotImplementedError

    def shifts(self) -> tuple[Tensor | float, Tensor | float]:
        """What was taken off the scores of rows and of columns."""
        raise NotImplementedError

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """log sum exp of the scores over rows [B] and columns [N], in fp64: numbers near 50 are 4e-6 apart in fp32."""
        row_shift, column_shift = self.shifts()
        return self.rows_MB[0].double().log() + row_shift, self.columns_MN[0].double().log() + column_shift

    def means(self, model: int) -> tuple[Tensor, Tensor]:
        """The mean cosine of `model` under the softmax of each row [B] and each column [N], in fp64."""
        rows, columns = self.rows_MB.double(), self.columns_MN.double()
        return rows[1 + model] / rows[0], columns[1 + model] / columns[0]

    def _tile(self, name: str, tile: Tile) -> Tensor:
        return self.scratch.tile(name, *tile.cosines[0].shape)

    def _exponential(self, tile: Tile, shift: Tensor | float, name: str) -> Tensor:
        e_rk = torch.mul(tile.cosines[self.model], self.scale, out=self._tile(name, tile))
        if isinstance(shift, Tensor) or shift:
            e_rk.sub_(shift)
        return e_rk.exp_()

    def _with_weighted(self, tile: Tile, e_rk: Tensor):
        """(place in the sums, matrix to sum), of which the next overwrites the last."""
        yield 0, e_rk
        for m in range(1, len(self.rows_MB)):
            yield m, torch.mul(e_rk, tile.cosines[m - 1], out=self._tile("weighted", tile))


class ShiftedSums(SoftmaxSums):
    """One shift for all scores, no larger than keeps a sum of N exponentials finite.

    Of `trusted` inputs nobody looks whether a sum vanished: it is NaN then. Scales above MAX_SCALE are not trusted.
    """

    def __init__(self, pairs: Pairs, model: int, scale: Tensor | float, *, means: bool = False, trusted: bool = False):
        super().__init__(pairs, model, scale, means=means)
        at_most = MAX_SCALE if isinstance(scale, Tensor) else scale
        largest_exponent = math.log(torch.finfo(pairs.image.dtype).max / max(1, pairs.shape[1])) - 1
        self.shift = max(0.0, LONGEST_UNIT**2 * at_most - largest_exponent)
        self.can_vanish = -(LONGEST_UNIT**2) * at_most - self.shift < math.log(self._floor)  # a sum's least term
        self.trusted = trusted and at_most <= MAX_SCALE

    def shifts(self) -> tuple[float, float]:
        return self.shift, self.shift

    def add(self, tile: Tile) -> None:
        for m, matrix_rk in self._with_weighted(tile, self._exponential(tile, self.shift, "e")):
            self.rows_MB[m, tile.rows] += matrix_rk.sum(1)
            self.columns_MN[m, tile.columns] += matrix_rk.sum(0)

    def merge(self, world: World) -> bool:
        if self.trusted or not self.can_vanish:  # nothing to wait for; what is not finite stays so in the loss
            world.sum_(self.columns_MN)
            if self.can_vanish:
                for sums in (self.rows_MB[0], self.columns_MN[0]):
                    sums.masked_fill_(sums <= self._floor, math.nan)
            return True
        packed = torch.cat([self._doubtful(self.rows_MB[0]), self.columns_MN.flatten()])
        world.sum_(packed)
        self.columns_MN = packed[1:].view_as(self.columns_MN)
        return not bool(packed[0] + self._doubtful(self.columns_MN[0]) > 0)

    def _doubtful(self, sums: Tensor) -> Tensor:
        """How many sums, [1], are not finite or too small."""
        return (~((sums > self._floor) & (sums < math.inf))).sum(dtype=sums.dtype)[None]

    @property
    def _floor(self) -> float:
        """Of smaller sums, N terms that were rounded to 0 would show."""
        finfo = torch.finfo(self.columns_MN.dtype)
        return max(1, self.columns_MN.shape[1]) * finfo.tiny / finfo.eps

    def weigh(self, tile: Tile, weight: Tensor, out: str) -> Tensor:
        a_r, b_k = weight / self.rows_MB[0, tile.rows], weight / self.columns_MN[0, tile.columns]
        e_rk = self._exponential(tile, self.shift, out)
        return e_rk.mul_(torch.add(a_r[:, None], b_k, out=self._tile("weighted", tile)))

    def softmaxes(self, tile: Tile) -> tuple[Tensor, Tensor]:
        e_rk = self._exponential(tile, self.shift, "e")
        return e_rk / self.rows_MB[0, tile.rows, None], e_rk / self.columns_MN[0, tile.columns]


class RunningSums(SoftmaxSums):
    """The shifts are the largest scores of each row and column so far; sums follow when a larger one comes."""

    def __init__(self, pairs: Pairs, model: int, scale: Tensor | float, *, means: bool = False):
        super().__init__(pairs, model, scale, means=means)
        self.largest_B, self.largest_N = (pairs.image.new_full((size,), -math.inf) for size in pairs.shape)

    def shifts(self) -> tuple[Tensor, Tensor]:
        return self.largest_B, self.largest_N

    def add(self, tile: Tile) -> None:
        scores_rk = tile.cosines[self.model] * self.scale
        rows_Mr, columns_Mk = self.rows_MB[:, tile.rows], self.columns_MN[:, tile.columns]
        largest_r, largest_k = self.largest_B[tile.rows], self.largest_N[tile.columns]
        _raise(rows_Mr, largest_r, scores_rk.amax(1))
        _raise(columns_Mk, largest_k, scores_rk.amax(0))
        for m, matrix_rk in self._with_weighted(tile, self._exponential(tile, largest_r[:, None], "e")):
            rows_Mr[m] += matrix_rk.sum(1)
        for m, matrix_rk in self._with_weighted(tile, self._exponential(tile, largest_k, "e")):
            columns_Mk[m] += matrix_rk.sum(0)

    def merge(self, world: World) -> bool:
        _raise(self.columns_MN, self.largest_N, world.max_(self.largest_N.clone()))
        world.sum_(self.columns_MN)
        return True

    def weigh(self, tile: Tile, weight: Tensor, out: str) -> Tensor:
        a_r, b_k = weight / self.rows_MB[0, tile.rows], weight / self.columns_MN[0, tile.columns]
        by_column_rk = self._exponential(tile, self.largest_N[tile.columns], "weighted").mul_(b_k)
        by_row_rk = self._exponential(tile, self.largest_B[tile.rows, None], out).mul_(a_r[:, None])
        return by_row_rk.add_(by_column_rk)

    def softmaxes(self, tile: Tile) -> tuple[Tensor, Tensor]:
        by_row_rk = self._exponential(tile, self.largest_B[tile.rows, None], "e") / self.rows_MB[0, tile.rows, None]
        by_column_rk = self._exponential(tile, self.largest_N[tile.columns], "e") / self.columns_MN[0, tile.columns]
        return by_row_rk, by_column_rk


def _raise(sums_M: Tensor, shift: Tensor, largest: Tensor) -> None:
    """In place: `shift` becomes the larger of both, and the sums those of exponentials at that shift."""
    before = shift.clone()
    torch.maximum(shift, largest, out=shift)
    sums_M *= (before - shift).exp()
