"""From timed rounds to numbers: percentiles of latency, throughput at the best batch size, ratios with their spread.

A latency is of batch 1. NAME_low and NAME_high are the smallest and the largest of the rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOWERS = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one contender did in one round."""

    latency_ms: Mapping[str, Sequence[float]]  # per tower, of each call at batch 1
    per_s: Mapping[str, Mapping[int, float]]  # per tower and batch size, embeddings per second


def best_batch(rounds: Sequence[Round], tower: str) -> int:
    """The batch size of the highest median throughput."""
    sizes = rounds[0].per_s[tower]
    return max(sizes, key=lambda batch: statistics.median(one.per_s[tower][batch] for one in rounds))


def pairs_per_s(image_per_s: float, text_per_s: float) -> float:
    """1 / (1 / images per s + 1 / texts per s): the paper's measure of a pair."""
    return 1 / (1 / image_per_s + 1 / text_per_s)


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """Latency percentiles over all calls, throughputs as medians over rounds with their extremes."""
    values: dict[str, float] = {}
    for tower in TOWERS:
        calls = [call for one in rounds for call in one.latency_ms[tower]]
        values |= {f"{tower}_latency_p{p}_ms": percentile(calls, p) for p in (50, 95)}
        values[f"{tower}_batch"] = best_batch(rounds, tower)
    for name, rates in _rates(rounds).items():
        values |= _spread(name, rates)
    return values


def ratios(rounds: Sequence[Round], reference: Sequence[Round]) -> dict[str, float]:
    """How many times as fast as the reference, round by round; each side at its own best batch size."""
    values: dict[str, float] = {}
    for name, rates in _rates(reference).items():
        own = _rates(rounds)[name]
        values |= _spread(f"{name}_ratio", [a / b for a, b in zip(own, rates, strict=True)])
    for tower in TOWERS:
        own, theirs = ([statistics.median(one.latency_ms[tower]) for one in side] for side in (rounds, reference))
        values |= _spread(f"{tower}_latency_ratio", [b / a for a, b in zip(own, theirs, strict=True)])
    return values


def _rates(rounds: Sequence[Round]) -> dict[str, list[float]]:
    """Throughputs of every round, at the best batch size of all of them."""
    batches = {tower: best_batch(rounds, tower) for tower in TOWERS}
    rates = {f"{tower}_per_s": [one.per_s[tower][batches[tower]] for one in rounds] for tower in TOWERS}
    return {**rates, "pairs_per_s": [pairs_per_s(*both) for both in zip(*rates.values(), strict=True)]}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def percentile(values: Sequence[float], p: float) -> float:
    """Linear between the nearest two of the sorted values, as numpy's."""
    ordered, place = sorted(values), (len(values) - 1) * p / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))
