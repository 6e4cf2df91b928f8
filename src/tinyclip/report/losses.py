"""compare.json of a run -> what the page shows of it: classes with bars, examples of the worst, calibration, costs.

What is not of the layout of evaluate/compare.py gives nothing here, and is shown as plain tables instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from tinyclip.evaluate.compare_words import MEASURE_COLUMNS, VALUE_COLUMNS, measures, values
from tinyclip.report import charts
from tinyclip.report.charts import Figure, Series, Table

BAR_PX, BAR_HEIGHT_PX = 120, 14
SHOWN = 12  # classes; the others are folded
MAX_CLASSES = 1000


class ClassRow(NamedTuple):
    name: str
    n: int
    teacher: str
    student: str
    difference: str  # in points
    bar: Markup
    verdict: str


class Picture(NamedTuple):
    key: str
    said: str
    text: str  # for those who do not see it
    uri: str | None


class Worst(NamedTuple):
    name: str
    what: str
    pictures: list[Picture]


class SetLosses(NamedTuple):
    name: str
    shown: list[ClassRow]
    folded: list[ClassRow]
    remark: str
    worst: list[Worst]
    tables: list[tuple[str, Table]]
    figures: list[Figure]


class Losses(NamedTuple):
    words: list[str]
    sets: list[SetLosses]
    tables: list[tuple[str, Table]]


def is_picture(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"data:image/(png|jpeg|webp);base64,", value) is not None


def losses(content: Any) -> Losses | None:
    """None for anything that `tinyclip compare` does not write."""
    try:
        return Losses(
            words=[str(line) for line in content["words"]],
            sets=[_set(one) for one in content["data_sets"]],
            tables=list(_tables(content)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _tables(content: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    if content["retrieval"] is not None:
        name = str(content["retrieval"]["name"])
        yield f"{name}: retrieval", Table(MEASURE_COLUMNS, list(measures(content["retrieval"]["scores"])))
    if content["value"]:
        title = f"Cost of one image and one full text, and {content['value_of']} per cost"
        yield title, Table(VALUE_COLUMNS, list(values(content["value"])))


def _set(one: Mapping[str, Any]) -> SetLosses:
    name, classes = str(one["name"]), one["per_class"][:MAX_CLASSES]
    widest = max((max(abs(c["difference_low"]), abs(c["difference_high"])) for c in classes), default=0) or 1
    rows = [_row(own, widest) for own in classes]
    return SetLosses(
        name=name,
        shown=rows[:SHOWN],
        folded=rows[SHOWN:],
        remark=str(one["multiple_comparisons"]),
        worst=[_worst(own) for own in one["worst_classes"]],
        tables=[
            (f"{name}: measures", Table(MEASURE_COLUMNS, list(measures(one["scores"])))),
            (f"{name}: confusions that the student makes more often", _confusions(one["confusions_gained"])),
            (f"{name}: top 1 of single templates", _templates(one["templates"])),
        ],
        figures=[_reliability(name, one)],
    )


def _row(own: Mapping[str, Any], widest: float) -> ClassRow:
    value, low, high = (float(own[key]) for key in ("difference", "difference_low", "difference_high"))
    return ClassRow(
        name=str(own["name"]),
        n=int(own["n"]),
        teacher=f"{own['teacher']:.0%}",
        student=f"{own['student']:.0%}",
        difference=f"{100 * value:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]",
        bar=bar(value, low, high, widest),
        verdict=str(own["verdict"]),
    )


def bar(value: float, low: float, high: float, widest: float) -> Markup:
    """From 0 in the middle to the value, with a whisker from low to high; hidden from those to whom it is read."""
    if not all(map(math.isfinite, (value, low, high, widest))):
        raise ValueError(f"expected numbers for a bar, got {value}, {low}, {high} of {widest}")
    x = charts.Scale(-widest, widest, 2, BAR_PX - 2)
    left, right, middle = min(x(0), x(value)), max(x(0), x(value)), BAR_HEIGHT_PX / 2
    kind = "lost" if value < 0 else "won"
    return Markup(
        f'<svg class="bar" viewBox="0 0 {BAR_PX} {BAR_HEIGHT_PX}" width="{BAR_PX}" height="{BAR_HEIGHT_PX}" '
        f'aria-hidden="true"><rect class="{kind}" x="{left:.1f}" y="2" width="{right - left:.1f}" '
        f'height="{BAR_HEIGHT_PX - 4}"/><line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle:g}" '
        f'y2="{middle:g}"/><line class="axis" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{BAR_HEIGHT_PX}"/></svg>'
    )


def _worst(own: Mapping[str, Any]) -> Worst:
    name, lost, n = str(own["name"]), int(own["lost"]), int(own["n"])
    pictures = [
        Picture(
            key=str(example["key"]),
            said=str(example["student_said"]),
            text=f"{name}, which the student called {example['student_said']}",
            uri=example["picture"] if is_picture(example["picture"]) else None,
        )
        for example in own["examples"]
    ]
    return Worst(name, f"{100 * own['difference']:+.0f} points; the teacher alone has {lost} of {n} right", pictures)


def _confusions(gained: Any) -> Table:
    rows = [[str(own["label"]), str(own["said"]), f"{own['teacher_n']:,}", f"{own['student_n']:,}"] for own in gained]
    return Table(("class", "said", "teacher", "student"), rows)


def _templates(templates: Any) -> Table:
    rows = [[str(own["template"]), f"{own['teacher']:.1%}", f"{own['student']:.1%}"] for own in templates]
    return Table(("template", "teacher", "student"), rows)


def _reliability(name: str, one: Mapping[str, Any]) -> Figure:
    """Accuracy over confidence of the bins that hold an answer."""
    series = [
        Series(side, [(own["confidence"], own["accuracy"]) for own in one[f"{side}_reliability"] if own["n"]])
        for side in ("teacher", "student")
    ]
    whole = Series("calibrated", [(0.0, 0.0), (1.0, 1.0)])
    return charts.line_chart(
        f"{name}: accuracy over confidence", [*series, whole], x_label="mean confidence", shares=True
    )
