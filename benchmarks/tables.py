"""Markdown tables of what the benchmarks printed, kept in `results/`; docs/generate.py writes them into RESULTS.md.

A ratio is another's time over ours, measured in turns in one process: above 1, ours is faster. Where rounds were kept
it is their median, with the least and the largest. Goals were set before, for two cores; they are printed, met or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
STEP_GOALS = {  # (case, precision): least ratio
    "official/stored": {
        ("40M/32 from B/32", "fp32"): 3.0,
        ("40M/32 from B/32", "bf16"): 2.5,
        ("8M/16 from B/16", "fp32"): 5.3,
        ("8M/16 from B/16", "bf16"): 3.7,
    },
    "official/live": {("40M/32 from B/32", "fp32"): 1.75, ("40M/32 from B/32", "bf16"): 1.75},
    "open_clip/live": {("40M/32 from B/32", "fp32"): 1.75, ("40M/32 from B/32", "bf16"): 1.75},
}
INFERENCE_GOALS = {  # (the first word of what, contender): what the ratio should be
    ("classifier", "ours"): "5",
    ("classifier", "ours, bf16"): "17",
    ("32", "ours, bf16"): "3.9",
    ("mask-learning", "dense"): "at most 1.1",
}


def machine(name: str) -> str:
    """Where a benchmark ran, one sentence."""
    here, *_ = _lines(name)
    libraries = ", ".join(f"{key} {here[key]}" for key in ("torch", "open_clip") if key in here)
    setting = f"fp32 products by {here['fp32 products']}, freed memory {here['freed memory']}"
    return f"{here['threads']} threads, {here['machine']}, {libraries}, {setting}."


def step() -> Iterator[list[str]]:
    ours = ["ours, stored: s", "ratio", "ours, live: s", "ratio", "live / stored", "gradient's error: official / ours"]
    yield ["case", "precision", "pairs", "official: s", *ours]
    yield ["---", "---", *["---:"] * 8]
    for row in _lines("step")[1:]:
        seconds = row["seconds"]
        times = (f"{seconds[name]:.2f}" for name in ("official", "stored", "live"))
        official, stored, live = times
        ratios = (_step_ratio(row, f"official/{name}") for name in ("stored", "live"))
        numbers = [official, stored, next(ratios), live, next(ratios), f"{seconds['live'] / seconds['stored']:.1f}"]
        yield [
            row["case"],
            row["precision"],
            str(row["pairs"]),
            *numbers,
            " / ".join(_short(row["gradient_error"][name]) for name in ("official", "stored")),
        ]


def step_open_clip() -> Iterator[list[str]]:
    yield ["case", "precision", "open_clip: s", "ratio to ours, stored", "ratio to ours, live"]
    yield ["---", "---", *["---:"] * 3]
    for row in _lines("step")[1:]:
        ratios = (_step_ratio(row, f"open_clip/{name}") for name in ("stored", "live"))
        yield [row["case"], row["precision"], f"{row['seconds']['open_clip']:.2f}", *ratios]


def _short(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def _step_ratio(row: dict[str, Any], name: str) -> str:
    return _spread(row[name], STEP_GOALS.get(name, {}).get((row["case"], row["precision"])))


def loss() -> Iterator[list[str]]:
    yield ["pairs", "loss", "s", "ratio", "peak MB", "ratio", "gradient's error"]
    yield ["---:", "---", *["---:"] * 5]
    for row in _lines("loss")[1:]:
        if "seconds" not in row:  # the largest size, of which the memory alone was measured
            continue
        numbers = (
            f"{row['seconds']:.2f}",
            f"{row['time_ratio']:.1f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['memory_ratio']:.0f}",
        )
        yield [f"{row['pairs']:,}", row["contender"], *numbers, f"{row['gradient_error']:.0e}"]


def inference() -> Iterator[list[str]]:
    yield ["what", "contender", "s", "ratio of the first to it", "smallest cosine to the first"]
    yield ["---", "---", *["---:"] * 3]
    for row in _lines("inference")[1:]:
        first, *others = row["seconds"]
        yield [row["what"], first, f"{row['seconds'][first]:.3g}", "1", ""]
        for other in others:
            cosine = row.get(f"cosine of {other}", "")
            ratio = _spread(row[f"{first}/{other}"], INFERENCE_GOALS.get((row["what"].split()[0], other)))
            yield ["", other, f"{row['seconds'][other]:.3g}", ratio, str(cosine)]


def data() -> Iterator[list[str]]:
    """One picture at a time; how far ours are from Pillow's, in levels of 255."""
    ours, scaled = ("ratio", "levels: largest, mean"), ("`jpeg_side=224`: ratio", "levels: largest, mean")
    yield ["JPEGs", "open_clip: a second", "ours: a second", *ours, *scaled]
    yield ["---", *["---:"] * 6]
    for row in _lines("data")[1:]:
        if not row["what"].startswith("images of "):
            continue
        cells = [row["what"].removeprefix("images of "), *(f"{row['per_s'][name]:,}" for name in ("open_clip", "ours"))]
        for name in ("ours", "ours, scaled"):
            apart = row[f"{name}: levels from Pillow"]
            cells += [_spread(row[f"open_clip/{name}"]), f"{apart['largest']}, {apart['mean']:.2g}"]
        yield cells


def data_batches() -> Iterator[list[str]]:
    """Everything else that is read: each contender against the first of its row."""
    yield ["what", "contender", "a second", "ratio to the first"]
    yield ["---", "---", "---:", "---:"]
    for row in _lines("data")[1:]:
        first, *others = row["per_s"]
        if row["what"].startswith("images of "):
            continue
        yield [row["what"], first, f"{row['per_s'][first]:,}", "1"]
        for other in others:
            yield ["", other, f"{row['per_s'][other]:,}", _spread(row[f"{first}/{other}"])]


def _spread(ratio: list[float], goal: float | str | None = None) -> str:
    median, least, largest = ratio
    return f"{median:.2f} ({least:.2f} to {largest:.2f})" + ("" if goal is None else f", goal {goal}")


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
