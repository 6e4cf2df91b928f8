"""Two models' answers to the same questions: what is kept, who is right where, and which classes differ.

A class has few items, and there are many classes. Whether a class differs is therefore decided by McNemar's exact test
and not by its interval, and the p-values of all classes are adjusted together (Benjamini and Hochberg 1995): among the
classes that are called different, about 5 % are expected to be so by chance.

Shape legend: N items, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tinyclip.evaluate.confidence import LEVEL, RESAMPLES, Interval, resampled_sums

FALSE_DISCOVERIES = 0.05


def retention(student_N: Tensor, teacher_N: Tensor, group_N: Tensor | None = None) -> Interval | None:
    """The student's mean over the teacher's, with a paired bootstrap; None where resamples find a teacher's mean of 0.

    With `group_N` both are means of the groups' means, drawn within each group.
    """
    table_N2 = np.stack([values.double().numpy() for values in (student_N, teacher_N)], axis=1)
    group = np.zeros(len(table_N2)) if group_N is None else group_N.numpy()
    parts, rng = [table_N2[group == one] for one in np.unique(group)], np.random.default_rng(0)
    draws_R2 = np.mean([resampled_sums(part_N2, RESAMPLES, rng) / len(part_N2) for part_N2 in parts], axis=0)
    if not (draws_R2[:, 1] > 0).all():
        return None
    ours, theirs = np.mean([part_N2.mean(0) for part_N2 in parts], axis=0)
    low, high = np.quantile(draws_R2[:, 0] / draws_R2[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(ours / theirs), float(low), float(high), len(table_N2))


def right_and_wrong(teacher_right_N: Tensor, student_right_N: Tensor) -> dict[str, float]:
    """Shares of the items, which sum to 1."""
    t_N, s_N = teacher_right_N.bool(), student_right_N.bool()
    shares = {
        "both_right": t_N & s_N,
        "teacher_alone_right": t_N & ~s_N,
        "student_alone_right": ~t_N & s_N,
        "neither_right": ~t_N & ~s_N,
    }
    return {name: found_N.double().mean().item() for name, found_N in shares.items()}


def agreement(teacher_N: Tensor, student_N: Tensor, among_N: Tensor | None = None) -> float | None:
    """Share of equal answers, right or wrong; with `among_N`, of those items. None where there is none."""
    same_N = (teacher_N == student_N) if among_N is None else (teacher_N == student_N)[among_N.bool()]
    return same_N.double().mean().item() if len(same_N) else None


def mcnemar(teacher_alone: int, student_alone: int) -> float:
    """p of as uneven a split of the items that only one model has right, were both equally good: two-sided, exact.

    McNemar 1947, in the exact (binomial) form.
    """
    num, ways, tail = teacher_alone + student_alone, 1, 1  # ways to choose 0, 1, 2 ... of num, and their sum
    for count in range(min(teacher_alone, student_alone)):
        ways = ways * (num - count) // (count + 1)
        tail += ways
    return min(1.0, 2 * (tail / 2**num))


def benjamini_hochberg(p_C: Sequence[float]) -> list[float]:
    """Adjusted p-values: the smallest share of false discoveries at which each would be called different."""
    order, adjusted, smallest = sorted(range(len(p_C)), key=lambda c: p_C[c]), [1.0] * len(p_C), 1.0
    for place in range(len(p_C), 0, -1):
        number = order[place - 1]
        smallest = adjusted[number] = min(smallest, p_C[number] * len(p_C) / place)
    return adjusted
