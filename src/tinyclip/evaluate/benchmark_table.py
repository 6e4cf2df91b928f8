"""A report of the benchmark for people, 100 columns wide: a table per backend, a row per model."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from tinyclip.evaluate.benchmark import Report, Row
from tinyclip.evaluate.timings import TOWERS
from tinyclip.terminal import Table

BUSY = 0.5  # processes that compute beside these threads before a measurement is not quiet
MIN_WIDTH = 100  # columns


def tables(report: Report) -> Iterator[Table | str]:
    """What rich prints: a table per backend with a row per model, and what has to be known to read it."""
    largest = max(report.settings["batch_sizes"])
    for backend in report.settings["backends"]:
        table = Table(title=backend, title_justify="left", title_style="bold", show_lines=True, padding=(0, 1, 0, 0))
        table.add_column("model", overflow="fold", min_width=14)
        for column in ("image ms\np50 / p95", "text ms\np50 / p95", "images/s\nat batch", "texts/s\nat batch"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("pairs/s", justify="right", no_wrap=True)
        if report.settings["memory"]:
            table.add_column(f"peak MB\nB 1, {largest}", justify="right", no_wrap=True)
        for row in report.rows:
            if row.backend == backend:
                cells = map(Text, _cells(row, row.model == report.reference))  # ours, of several lines
                table.add_row(row.model, *list(cells)[: len(table.columns) - 1])
        yield table
    yield from _notes(report)


def _cells(row: Row, is_reference: bool) -> Iterator[str]:
    v = row.values
    if not v:
        yield "not measured"
        return

    def ratio(name: str) -> str:
        """Two more lines."""
        if is_reference or f"{name}_ratio" not in v:
            return ""
        middle, low, high = (_short(v[f"{name}_ratio{end}"]) for end in ("", "_low", "_high"))
        return f"\nx {middle}\n{low}-{high}"

    for tower in TOWERS:
        p50, p95 = (_short(v[f"{tower}_latency_{p}_ms"]) for p in ("p50", "p95"))
        yield f"{p50} / {p95}{ratio(f'{tower}_latency')}"
    for tower in TOWERS:
        yield f"{_short(v[f'{tower}_per_s'])} at {v[f'{tower}_batch']}{ratio(f'{tower}_per_s')}"
    yield _short(v["pairs_per_s"]) + ratio("pairs_per_s")
    peaks = [v.get(name) for name in ("peak_memory_mb", "peak_memory_largest_batch_mb")]
    yield "\n".join(f"{peak:.0f}" for peak in peaks if peak is not None) or "not\nmeasured"


def _short(value: float) -> str:
    """Three digits, or all of a larger number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(report: Report) -> Iterator[str]:
    place, rounds = report.environment, report.settings["rounds"]
    versions = ", ".join(f"{name} {number}" for name, number in place["versions"].items() if number)
    yield f"{place['device']}; threads of torch and onnxruntime: {place['threads']}, of {place['cores']} cores"
    yield versions
    yield f"x: times as fast as {report.reference} in the same round, median of {rounds} rounds and their range"
    yield "latency at batch 1; throughput at the best batch tried; pairs/s = 1 / (1 / images/s + 1 / texts/s)"
    yield f"memory: {place['peak_memory']}; fp32 products: {place['fp32_products']}"
    if (place["load_before"] or 0) + place["threads"] > place["cores"] + BUSY:
        yield f"others were computing here too (load {place['load_before']:.1f} before): not a quiet measurement"
    for row in report.rows:
        for what, reason in (("", row.not_measured), (" memory", row.memory_not_measured)):
            if reason is not None:
                yield f"{row.model}, {row.backend}:{what} not measured: {reason}"
