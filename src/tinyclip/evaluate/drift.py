"""How far two models are apart on the same items, whatever their embedding sizes: agreement, neighbours, calibration,
and the geometry of the embeddings.

Every measure is a function of matrices, and none needs labels but those of calibration.

Shape legend: N items, K nearest items, E and F the two models' embedding sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyclip.evaluate.confidence import LEVEL, RESAMPLES, Difference
from tinyclip.evaluate.embed import top_k

NEIGHBOURS = 10
BINS = 15  # Guo et al. 2017
PERSISTENCE = 0.9  # of rank-biased overlap: how much each further rank weighs, relative to the one before


# Neighbours.


def neighbours(embedding_NE: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The rows of the k most similar other items of each, best first, [N, min(k, N - 1)].

    Visits the N x N similarities in tiles. Raises ValueError for fewer than two items.
    """
    num = len(embedding_NE)
    if num < 2:
        raise ValueError(f"neighbours: expected at least 2 items, got {num}")
    nearest_NK = top_k(embedding_NE, embedding_NE, k + 1)[1]
    other_NK = nearest_NK != torch.arange(num, device=nearest_NK.device)[:, None]
    other_NK[other_NK.all(1), -1] = False  # so many others are equal to it that it is not among the k + 1
    return nearest_NK[other_NK].view(num, -1)


def overlap(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """overlap@K of each row: the share of K neighbours that both lists hold, whatever their order. [N]"""
    return _common(first_NK, second_NK).sum((1, 2)).double() / first_NK.shape[1]


def jaccard(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """Neighbours in both lists over neighbours in either. [N]"""
    common_N = _common(first_NK, second_NK).sum((1, 2)).double()
    return common_N / (2 * first_NK.shape[1] - common_N)


def rank_biased_overlap(first_NK: Tensor, second_NK: Tensor, persistence: float = PERSISTENCE) -> Tensor:
    """The overlap at every depth, weighted towards the top: Webber et al. 2010, equation 32, extrapolated beyond K. [N]

    1 for equal lists in equal order, 0 for lists without a common item.
    """
    depth_K = torch.arange(1, first_NK.shape[1] + 1, device=first_NK.device).double()
    common_NK = _common(first_NK, second_NK).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)  # among the first d of both
    share_NK = common_NK / depth_K
    weights_K = (1 - persistence) * persistence ** (depth_K - 1)
    return (share_NK * weights_K).sum(1) + share_NK[:, -1] * persistence ** len(depth_K)


def _common(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """[N, K, K]: 1 where the i-th of the first list is the j-th of the second."""
    if first_NK.shape != second_NK.shape:
        raise ValueError(f"expected lists of one size, got {tuple(first_NK.shape)} and {tuple(second_NK.shape)}")
    return (first_NK[:, :, None] == second_NK[:, None, :]).long()


# Geometry.


class Geometry(NamedTuple):
    """cosine is None where the embedding sizes differ: then no cosine of the two is defined."""

    cka: float
    cka_debiased: float | None  # None for fewer than 4 items
    cosine: float | None


def geometry(first_NE: Tensor, second_NF: Tensor) -> Geometry:
    first_NE, second_NF = first_NE.double(), second_NF.double()
    same_size = first_NE.shape == second_NF.shape
    return Geometry(
        cka(first_NE, second_NF),
        cka_debiased(first_NE, second_NF) if len(first_NE) > 3 else None,
        torch.cosine_similarity(first_NE, second_NF, dim=-1).mean().item() if same_size else None,
    )


def cka(first_NE: Tensor, second_NF: Tensor) -> float:
    """Linear centred kernel alignment in [0, 1]: Kornblith et al. 2019, equation 3. 1 up to rotation, scale and shift.

    |Y' X|^2 / (|X' X| |Y' Y|) of the centred columns, in fp64: equal to that of the centred Gram matrices. Few items of
    many dimensions look alike: with N random items it nears 1 as E / N grows. Raises ValueError where all are equal.
    """
    x_NE, y_NF = (_centred(rows_NE) for rows_NE in (first_NE, second_NF))
    scale = (x_NE.T @ x_NE).norm() * (y_NF.T @ y_NF).norm()
    if not scale > 0:
        raise ValueError("cka: expected items that differ, all embeddings of a model are equal")
    return min(1.0, ((y_NF.T @ x_NE).square().sum() / scale).item())


def cka_debiased(first_NE: Tensor, second_NF: Tensor) -> float:
    """Linear CKA of the unbiased estimate of HSIC, about 0 for unrelated embeddings of any N and E.

    Song et al. 2012, equation 5; as in Nguyen et al. 2021, equation 3. Needs N > 3. It can be slightly below 0.
    """
    x_NE, y_NF = (_centred(rows_NE) for rows_NE in (first_NE, second_NF))
    own, other = _hsic(x_NE, x_NE), _hsic(y_NF, y_NF)
    return min(1.0, _hsic(x_NE, y_NF) / (own * other) ** 0.5) if min(own, other) > 0 else 0.0


def _hsic(x_NE: Tensor, y_NF: Tensor) -> float:
    """Without an N x N matrix: K = x x' and L = y y', each with a diagonal of 0."""
    num, k_N, l_N = len(x_NE), x_NE.square().sum(1), y_NF.square().sum(1)
    trace = (y_NF.T @ x_NE).square().sum() - (k_N * l_N).sum()
    row_k_N, row_l_N = x_NE @ x_NE.sum(0) - k_N, y_NF @ y_NF.sum(0) - l_N
    total = trace + row_k_N.sum() * row_l_N.sum() / ((num - 1) * (num - 2)) - 2 * (row_k_N @ row_l_N) / (num - 2)
    return (total / (num * (num - 3))).item()


def _centred(rows_NE: Tensor) -> Tensor:
    rows_NE = rows_NE.double()
    return rows_NE - rows_NE.mean(0)


# Calibration.


class Bin(NamedTuple):
    """Answers whose confidence is in (low, high]; the first bin holds 0 too."""

    low: float
    high: float
    n: int
    confidence: float | None  # mean; None in an empty bin
    accuracy: float | None


def reliability(confidence_N: Tensor, right_N: Tensor, bins: int = BINS) -> list[Bin]:
    """Equal-width bins of the confidence in the answer, a share in [0, 1]. Raises ValueError for one outside."""
    place_N = _bin(confidence_N, bins)
    found = []
    for number in range(bins):
        inside_N = place_N == number
        n = int(inside_N.sum())
        means = [values_N[inside_N].double().mean().item() if n else None for values_N in (confidence_N, right_N)]
        found.append(Bin(number / bins, (number + 1) / bins, n, *means))
    return found


def ece(confidence_N: Tensor, right_N: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: |accuracy - mean confidence| of each bin, weighted by its items (Guo et al. 2017)."""
    return _ece(_bin(confidence_N, bins), _gap(confidence_N, right_N), bins)


def ece_difference(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], bins: int = BINS, *, resamples: int = RESAMPLES
) -> Difference:
    """One model's `ece` less another's of (confidence_N, right_N) of the same items, by a paired bootstrap."""
    sides = [(_bin(confidence_N, bins), _gap(confidence_N, right_N)) for confidence_N, right_N in (first, second)]
    num, rng, draws = len(first[0]), np.random.default_rng(0), []
    for _ in range(resamples):
        index_N = rng.integers(num, size=num)
        ours, theirs = (_ece(place_N[index_N], gap_N[index_N], bins) for place_N, gap_N in sides)
        draws.append(ours - theirs)
    ours, theirs = (_ece(place_N, gap_N, bins) for place_N, gap_N in sides)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(ours - theirs, float(low), float(high), num)


def _bin(confidence_N: Tensor, bins: int) -> np.ndarray:
    if not len(confidence_N) or not ((confidence_N >= 0) & (confidence_N <= 1)).all():
        raise ValueError("expected confidences in [0, 1] of at least one answer")
    return (confidence_N.double() * bins).ceil().long().sub(1).clamp(0, bins - 1).numpy()


def _gap(confidence_N: Tensor, right_N: Tensor) -> np.ndarray:
    return (right_N.double() - confidence_N.double()).numpy()


def _ece(place_N: np.ndarray, gap_N: np.ndarray, bins: int) -> float:
    return float(np.abs(np.bincount(place_N, weights=gap_N, minlength=bins)).sum() / len(place_N))
