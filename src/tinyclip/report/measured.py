"""Tables of what other commands measured: RUN/evaluation.json and RUN/benchmark.json.

None for a file of another layout, which the page then shows as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinyclip.evaluate.confidence import with_interval
from tinyclip.evaluate.timings import TOWERS
from tinyclip.report.charts import Table

Named = list[tuple[str, Table]]


def suite_tables(content: Any) -> Named | None:
    """A row for each data set of a suite; what is absent; other scores as they are."""
    try:
        return list(_suite_tables(content))
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _suite_tables(content: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    mean, rows = content["mean"], []
    for name, scores in content["datasets"].items():
        shown = dict(with_interval(scores))
        probes = [score for score in shown if score.endswith("probe_top1")]
        for score in [content["in_mean"][name], *probes]:
            rows.append([name, score.replace("_", " "), shown[score], shown["n"]])
    title = f"{Path(str(content['suite'])).name}: mean of {mean['of']} of {mean['n_datasets']} data sets"
    yield f"{title}, {100 * mean['value']:.1f}%", Table(["data set", "score", "value", "images"], rows)
    absent = [[name, str(why)] for part in ("absent", "probe_absent") for name, why in content.get(part, {}).items()]
    if absent:
        yield "absent", Table(["data set", "why"], absent)


def latency_tables(content: Any) -> Named | None:
    """A table for each backend, with a row for each model, and one of where it was measured."""
    try:
        return list(_latency_tables(content))
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _latency_tables(content: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    columns = ["model", "image ms, p50 / p95", "text ms, p50 / p95", "images/s", "texts/s", "pairs/s", "times as fast"]
    for backend in content["settings"]["backends"]:
        rows = [_latencies(row, content["reference"]) for row in content["rows"] if row["backend"] == backend]
        yield backend, Table([*columns, "peak MB"], rows)
    place = content["environment"]
    facts = {
        "device": f"{place['device']}, {place['threads']} of {place['cores']} cores",
        "versions": ", ".join(f"{name} {number}" for name, number in place["versions"].items() if number),
        "latency": "at batch 1; throughput at the best batch tried",
        "pairs/s": "1 / (1 / images/s + 1 / texts/s)",
        "times as fast": f"pairs/s, median and range of {content['settings']['rounds']} rounds, against "
        f"{_short_name(content['reference'])} in the same round",
        "peak MB": str(place["peak_memory"]),
    }
    yield "how", Table(["", ""], [[name, said] for name, said in facts.items()])


def _latencies(row: Mapping[str, Any], reference: str) -> list[str]:
    v, name = row["values"], _short_name(row["model"])
    if not v:
        return [name, f"not measured: {row['not_measured']}", *[""] * 6]
    times = [f"{_short(v[f'{tower}_latency_p50_ms'])} / {_short(v[f'{tower}_latency_p95_ms'])}" for tower in TOWERS]
    rates = [_short(v[key]) for key in ("image_per_s", "text_per_s", "pairs_per_s")]
    ratio = "1"
    if row["model"] != reference:
        middle, low, high = (_short(v[f"pairs_per_s_ratio{end}"]) for end in ("", "_low", "_high"))
        ratio = f"{middle} ({low} to {high})"
    peak = v.get("peak_memory_mb")
    return [name, *times, *rates, ratio, "" if peak is None else f"{peak:,.0f}"]


def _short(value: float) -> str:
    """Three digits, or all of a larger number, with a comma in it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _short_name(model: str) -> str:
    return model if ":" in model else "/".join(Path(model).parts[-2:])
