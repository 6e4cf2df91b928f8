"""How sure a score is: bootstrap intervals of a mean, and of the difference of two models on the same items.

The percentile bootstrap (Efron 1979): draw as many items as there are, with replacement, `resamples` times, and report
the quantiles of the scores of these draws. Items that are not independent are drawn together: a picture's captions
(`ratio_interval`, `median_interval`). What it measures is the choice of items; another training seed is not in it.

Shape legend: N items, S sums, R resamples in a chunk, M members (such as captions) of the items, K distinct rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95
MIN_REPEATS = (
    8  # rows that repeat so often on average are drawn as counts: a yes-or-no score is one binomial a resample
)
DRAWS_PER_CHUNK = 2**22  # 34 MB of int64
BOUNDS = ("_low", "_high")
NOT_SHARES = ("median_rank", "_C")  # ends of the names of scores that no percent sign suits


class Interval(NamedTuple):
    """A score, and the interval that holds the middle `level` of its resamples."""

    value: float
    low: float
    high: float
    n: int  # items

    def scores(self, name: str) -> dict[str, float]:
        """`name`, `name_low` and `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


class Difference(NamedTuple):
    """One model's score less another's, on the same items."""

    value: float
    low: float
    high: float
    n: int

    @property
    def different(self) -> bool:
        """Whether 0 is outside the interval."""
        return not self.low <= 0 <= self.high

    def __str__(self) -> str:
        """In percentage points."""
        points = f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return points if self.different else f"not different: {points}"


def interval(
    value_N: Tensor, group_N: Tensor | None = None, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """The mean of N items; with `group_N`, the mean of the groups' (classes') means, drawn within each group.

    Raises ValueError for no items, for values that are not finite, and for another number of groups than of values.
    """
    value_N1 = _rows("values", value_N)
    rng = np.random.default_rng(seed)
    if group_N is None:
        mean, draws = value_N1.mean(), resampled_sums(value_N1, resamples, rng)[:, 0] / len(value_N1)
    else:
        groups = _groups(value_N1, group_N)
        mean = np.mean([group.mean() for group in groups])
        draws = np.mean([resampled_sums(group, resamples, rng)[:, 0] / len(group) for group in groups], axis=0)
    return Interval(float(mean), *_quantiles(draws, level), len(value_N1))


def paired_difference(
    a_N: Tensor,
    b_N: Tensor,
    group_N: Tensor | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Difference:
    """The mean of `a_N` less the mean of `b_N`; each resample draws the same items for both.

    Means are linear, so this is the interval of a - b. Raises ValueError as `interval` does, and for two lengths.
    """
    if a_N.shape != b_N.shape:
        raise ValueError(f"expected two models' values of the same items, got {tuple(a_N.shape)}, {tuple(b_N.shape)}")
    return Difference(*interval(a_N.double() - b_N.double(), group_N, resamples=resamples, seed=seed, level=level))


def ratio_interval(
    sum_N: Tensor, count_N: Tensor, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """sum(sum_N) / sum(count_N): the mean over members of items, such as captions of images, drawn item by item.

    An item's members stay together, since they are not independent.
    """
    table_N2 = np.concatenate([_rows("sums", sum_N), _rows("counts", count_N)], axis=1)
    if not (table_N2[:, 1] > 0).all():
        raise ValueError("expected at least one member of each item, got an item without any")
    top, bottom = table_N2.sum(0)
    draws_R2 = resampled_sums(table_N2, resamples, np.random.default_rng(seed))
    return Interval(float(top / bottom), *_quantiles(draws_R2[:, 0] / draws_R2[:, 1], level), len(table_N2))


def median_interval(
    value_M: Tensor, item_M: Tensor, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """The median over members, drawn item by item; `item_M` is the number of each member's item, 0 to N - 1.

    Of an even number of members it is the mean of the two in the middle.
    """
    value_M1 = _rows("values", value_M)
    order_M = np.argsort(value_M1[:, 0], kind="stable")
    sorted_M, item_of_sorted_M = value_M1[order_M, 0], item_M.cpu().numpy()[order_M]
    num_items = int(item_of_sorted_M.max()) + 1
    draws = [
        _weighted_median(sorted_M, counts_N[item_of_sorted_M])
        for counts_N in _resampled_counts(num_items, resamples, np.random.default_rng(seed))
    ]
    return Interval(float(np.median(sorted_M)), *_quantiles(np.array(draws), level), num_items)


def bootstrap(
    scores: Callable[[Tensor], Sequence[float]],
    n: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Interval]:
    """Intervals of scores that are no means: `scores` of the numbers [N] of the items that were drawn.

    A draw without a score (NaN), such as one without an item of some class, is left out.
    """
    rng = np.random.default_rng(seed)
    draws = [scores(torch.from_numpy(index_N)) for index_RN in _draws(n, resamples, rng) for index_N in index_RN]
    columns = zip(scores(torch.arange(n)), np.array(draws, dtype=np.float64).T, strict=True)
    return [Interval(float(value), *_quantiles(column[~np.isnan(column)], level), n) for value, column in columns]


def resampled_sums(table_NS: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples, S]: the column sums of N rows drawn with replacement.

    The number of times that each distinct row is drawn is multinomial, so where there are few of them no row is drawn.
    """
    N = len(table_NS)
    distinct_KS, count_K = _distinct(table_NS)
    if MIN_REPEATS * len(distinct_KS) <= N:
        return rng.multinomial(N, count_K / N, size=resamples) @ distinct_KS
    return np.concatenate([table_NS[index_RN].sum(1) for index_RN in _draws(N, resamples, rng)])


def with_interval(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Rows (name, what to show) for a table: a score and its interval in one cell, as in 45.0% [41.2, 48.9]."""

    def shown(name: str, value: float) -> str:
        bounds = [scores[name + bound] for bound in BOUNDS if name + bound in scores]
        if not isinstance(value, float):
            return f"{value:,}"
        if not is_share(name):
            return f"{value:,.4g}" + (f" [{bounds[0]:,.4g}, {bounds[1]:,.4g}]" if bounds else "")
        return f"{value:.1%}" + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else "")

    return [(name, shown(name, value)) for name, value in scores.items() if not is_bound(name, scores)]


def is_share(name: str) -> bool:
    """Whether the score is a share in [0, 1]; a median rank, for one, is not."""
    return not name.endswith(NOT_SHARES)


def is_bound(name: str, scores: Mapping[str, float]) -> bool:
    """Whether `name` is the lower or upper end of another score's interval."""
    return any(name.endswith(bound) and name.removesuffix(bound) in scores for bound in BOUNDS)


def _rows(what: str, value_N: Tensor) -> np.ndarray:
    """fp64 [N, 1]."""
    value_N1 = value_N.detach().cpu().double().reshape(-1, 1).numpy()
    if not len(value_N1):
        raise ValueError(f"expected {what} of at least one item, got none")
    if not np.isfinite(value_N1).all():
        raise ValueError(f"expected finite {what}, got {int((~np.isfinite(value_N1)).sum())} that are not")
    return value_N1


def _groups(value_N1: np.ndarray, group_N: Tensor) -> list[np.ndarray]:
    group_N = group_N.detach().cpu().reshape(-1)
    if len(group_N) != len(value_N1):
        raise ValueError(f"expected a group for each of {len(value_N1)} values, got {len(group_N)}")
    order_N = group_N.argsort(stable=True)
    sizes = group_N[order_N].unique_consecutive(return_counts=True)[1]
    return np.split(value_N1[order_N.numpy()], sizes.cumsum(0)[:-1].tolist())


def _distinct(table_NS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if table_NS.shape[1] > 1:
        return np.unique(table_NS, axis=0, return_counts=True)
    distinct_K, count_K = np.unique(table_NS[:, 0], return_counts=True)
    return distinct_K[:, None], count_K


def _draws(N: int, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers [R, N], `resamples` rows in all."""
    rows = max(1, DRAWS_PER_CHUNK // N)
    for start in range(0, resamples, rows):
        yield rng.integers(N, size=(min(rows, resamples - start), N))


def _resampled_counts(N: int, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each of N items was drawn, [N], `resamples` times."""
    for index_RN in _draws(N, resamples, rng):
        for index_N in index_RN:
            yield np.bincount(index_N, minlength=N)


def _weighted_median(sorted_M: np.ndarray, count_M: np.ndarray) -> float:
    """The median of `sorted_M`, each value repeated `count_M` times."""
    upto_M = count_M.cumsum()
    middle = (upto_M[-1] - 1) // 2, upto_M[-1] // 2
    return float(sorted_M[np.searchsorted(upto_M, middle, side="right")].mean())


def _quantiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level {level}: expected a share between 0 and 1, such as {LEVEL}")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
