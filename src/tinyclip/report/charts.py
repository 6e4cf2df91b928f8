"""Values -> SVG that stands in the page: lines, points with labels that do not collide, maps of what was kept.

A figure is drawn 340 px wide, so that its 11 px labels stay legible on a phone. Colours are the page's CSS variables
(light, dark, print), and no series is told apart by its colour alone. Every figure has a description for those who
do not see it, and the table of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from tinyclip.redact import redacted, visible

WIDTH = 340
LEFT, RIGHT = 46, 10  # of the plot
CHAR_PX = 6.1  # mean width of a character at 11 px
LINE_PX = 13
MAX_LABELS = 5
MAX_POINTS = 400  # of a drawn line; the table has every step that was logged, up to the same number


class Table(NamedTuple):
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Figure(NamedTuple):
    title: str
    description: str
    svg: Markup
    table: Table


class Series(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]  # a y that is not finite breaks the line


class Point(NamedTuple):
    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    role: str = "stage"


class Scale(NamedTuple):
    """Values in [low, high] -> pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    if not high - low > 1e-300:  # a step of it would be no number
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; powers of ten alone where those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1,)):
        found = [multiple * 10.0**power for power in powers for multiple in multiples]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= at_most:
            return found
    return found[:: math.ceil(len(found) / at_most)]


UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def si(number: float, *, like: float | None = None) -> str:
    """Three significant digits: 730 k, 2.11 M, 17.4 G. The unit is that of `like`, where it leaves two digits."""
    unit, factor = next((u for u in UNITS if abs(number) >= u[1] * 0.9995), UNITS[-1])
    if like is not None and abs(like) >= 1 and abs(number) >= abs(like) / 100:
        other, larger = next(u for u in UNITS if abs(like) >= u[1] * 0.9995)
        unit, factor = (other, larger) if abs(number) >= larger / 10 else (unit, factor)
    return f"{_three(number / factor)}\N{NO-BREAK SPACE}{unit}".rstrip()


def _three(number: float) -> str:
    return f"{number:.{0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2}f}"


def _tick(number: float) -> str:
    """1 k, 50 M: without the zeros that fill three digits."""
    figure, space, unit = si(number).partition("\N{NO-BREAK SPACE}")
    return f"{float(figure):g}{space}{unit}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    shares: bool = False,
    height: int = 210,
) -> Figure:
    """Lines over steps, told apart by colour and dashes, named above the plot. `marks` are named borders of phases."""
    finite = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    form = (lambda y: f"{100 * y:.0f}%") if shares else (lambda y: f"{y:g}")
    top = 14 + LINE_PX * _legend_lines(series) + (LINE_PX if marks else 0)
    x, y = _scales(finite, (LEFT, WIDTH - RIGHT), (height - 34, top), shares)
    parts = [
        _axes(x, y, ticks(x.low, x.high, 5), ticks(y.low, y.high, 4), _tick, form, x_label, height),
        _legend(series),
    ]
    for at, name in marks:
        parts.append(_mark(x(at), top, y.start, name))
    for number, one in enumerate(series):
        parts.append(_path(_thin(one.points), x, y, number))
    said = "; ".join(_said(one, form) for one in series)
    return Figure(title, f"{said}.", _svg(title, said, height, parts), _line_table(series, x_label))


def _said(one: Series, form) -> str:
    """First, last, lowest and highest of a line, in words."""
    values = [y for _, y in one.points if math.isfinite(y)]
    if not values:
        return f"{one.name}: no finite value"
    known = f"from {form(values[0])} to {form(values[-1])}"
    return f"{one.name} {known}, between {form(min(values))} and {form(max(values))}"


def _scales(
    points: Sequence[tuple[float, float]], across: tuple[float, float], up: tuple[float, float], shares: bool
) -> tuple[Scale, Scale]:
    xs, ys = [x for x, _ in points] or [0.0, 1.0], [y for _, y in points] or [0.0, 1.0]
    low, high = (min(0.0, *ys), max(ys)) if shares or min(ys) >= 0 else (min(ys), max(ys))
    margin = (high - low or abs(high) or 1.0) * 0.05
    top = high + margin if not shares else min(1.0, high + margin)
    return (
        Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, *across),
        Scale(low if low == 0 else low - margin, top if top > low else low + 1, *up),
    )


def _axes(x: Scale, y: Scale, x_ticks, y_ticks, x_form, y_form, x_label: str, height: int) -> Markup:
    parts = []
    for tick in y_ticks:
        at = y(tick)
        parts.append(_line(x.start, at, x.end, at, "grid"))
        parts.append(_text(x.start - 6, at + 4, y_form(tick), "tick end"))
    for tick in x_ticks:
        at = x(tick)
        parts.append(_line(at, y.start, at, y.start + 4, "axis"))
        parts.append(_text(at, y.start + 16, x_form(tick), "tick middle"))
    parts.append(_line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(_text((x.start + x.end) / 2, height - 3, x_label, "name middle"))
    return Markup("").join(parts)


def _legend_rows(series: Sequence[Series]) -> list[list[tuple[int, float]]]:
    """Rows of (number of the series, x), wrapped at the right edge."""
    rows: list[list[tuple[int, float]]] = [[]]
    at = float(LEFT)
    for number, one in enumerate(series):
        width = 30 + CHAR_PX * len(one.name)
        if rows[-1] and at + width > WIDTH:
            rows.append([])
            at = float(LEFT)
        rows[-1].append((number, at))
        at += width
    return rows


def _legend_lines(series: Sequence[Series]) -> int:
    return len(_legend_rows(series))


def _legend(series: Sequence[Series]) -> Markup:
    parts = []
    for row, entries in enumerate(_legend_rows(series)):
        y = 12 + LINE_PX * row
        for number, x in entries:
            parts.append(_line(x, y - 4, x + 16, y - 4, f"line s{number % 4}"))
            parts.append(_text(x + 20, y, series[number].name, "name"))
    return Markup("").join(parts)


def _mark(x: float, top: float, bottom: float, name: str) -> Markup:
    """The start of a phase: a fine line with its name above the plot."""
    return _line(x, top, x, bottom, "mark") + _text(x + 2, top - 3, name, "tick")


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most about MAX_POINTS, evenly chosen, the last one among them."""
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    return [point for index, point in enumerate(points) if index % stride == 0 or index == len(points) - 1]


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale, number: int) -> Markup:
    """A line that is broken where a value is not finite; a value alone is a dot."""
    pieces: list[list[str]] = [[]]
    for at, value in points:
        if math.isfinite(value):
            pieces[-1].append(f"{x(at):.1f} {y(value):.1f}")
        elif pieces[-1]:
            pieces.append([])
    lines = " ".join("M" + "L".join(piece) + ("h0.1" if len(piece) == 1 else "") for piece in pieces if piece)
    return Markup('<path class="line s{}" d="{}"/>').format(number % 4, lines)


def _line_table(series: Sequence[Series], x_label: str) -> Table:
    steps = sorted({x for one in series for x, _ in one.points})
    steps = [x for x, _ in _thin([(step, 0.0) for step in steps])]
    by_step = [dict(one.points) for one in series]
    rows = [[f"{x:g}", *(f"{values[x]:.4g}" if x in values else "" for values in by_step)] for x in steps]
    return Table([x_label, *(one.name for one in series)], rows)


def scatter(title: str, points: Sequence[Point], *, x_label: str, y_label: str, height: int = 250) -> Figure:
    """Points over a logarithmic x, their intervals, and the front: those that nothing smaller equals or beats.

    Where there are more than MAX_LABELS, stages on the way to a student are named in the table alone.
    """
    xs = [point.x for point in points]
    ys = [y for p in points for y in (p.y, p.low, p.high) if y is not None]
    x = Scale(min(xs) / 1.35, max(xs) * 1.35, LEFT, WIDTH - RIGHT, log=True)
    margin = (max(ys) - min(ys) or 0.1) * 0.12
    y = Scale(max(0.0, min(ys) - margin), min(1.0, max(ys) + margin), height - 34, 10)
    y = y if y.high > y.low else y._replace(low=0.0, high=1.0)
    front = pareto(points)
    axes = _axes(
        x, y, log_ticks(x.low, x.high), ticks(y.low, y.high, 5), _tick, lambda v: f"{100 * v:.0f}%", x_label, height
    )
    parts = [axes]
    corners = [(x(point.x), y(point.y)) for point in front]
    if len(corners) > 1:
        d = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in corners)
        parts.append(Markup('<path class="front" d="{}"/>').format(d))
    for point in points:
        if point.low is not None and point.high is not None:
            parts.append(_line(x(point.x), y(max(point.low, y.low)), x(point.x), y(min(point.high, y.high)), "whisker"))
    parts += [_symbol(x(point.x), y(point.y), point.role) for point in points]
    anchors = [(x(point.x), y(point.y)) for point in points]
    few = len(points) <= MAX_LABELS
    parts += _labels(anchors, [p.label if few or p.role != "stage" else "" for p in points], (LEFT, 4, WIDTH, y.start))
    said = "; ".join(f"{p.label}: {si(p.x)}, {percent(p.y)}" for p in sorted(points, key=lambda p: p.x))
    best = f"On the front: {', '.join(point.label for point in front)}"
    rows = [[p.label, p.role, si(p.x), percent(p.y), "yes" if p in front else "no"] for p in points]
    table = Table(["model", "role", x_label, y_label, "on the front"], rows)
    return Figure(title, f"{said}. {best}.", _svg(title, f"{said}. {best}", height, parts), table)


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other one with as small an x equals or beats, by rising x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _symbol(x: float, y: float, role: str) -> Markup:
    """Teacher: a square; students and their stages: discs; baselines: a diamond."""
    if role == "teacher":
        return Markup('<rect class="point teacher" x="{:.1f}" y="{:.1f}" width="9" height="9"/>').format(
            x - 4.5, y - 4.5
        )
    if role == "baseline":
        d = f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"
        return Markup('<path class="point baseline" d="{}"/>').format(d)
    return Markup('<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(role, x, y, 5)


def shown(text: str, keep: str = "") -> str:
    """As the page may show it: without secrets, and with what would act escaped."""
    return visible(redacted(text), keep)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def place_labels(anchors: Sequence[tuple[float, float]], texts: Sequence[str], inside: Box) -> list[Box]:
    """A box for each text beside its anchor, inside the plot, on no point and on no other text where there is room."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
    placed = []
    for (x, y), text in zip(anchors, texts, strict=True):
        width = CHAR_PX * len(text) + 2
        boxes = [_pushed(_box(x + dx, y + dy, width, side), inside) for dx, dy, side in _offsets()]
        placed.append(min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken)))  # the first of equals
        taken += [placed[-1]] if text else []
    return placed


def _offsets() -> list[tuple[float, float, str]]:
    near = [(9, 0, "left"), (-9, 0, "right"), (0, -14, "middle"), (0, 14, "middle")]
    around = [(dx, dy, side) for far in (1, 2, 3, 4) for dy in (-13 * far, 13 * far) for dx, side in _SIDES]
    return [*near, *around]


_SIDES = ((9, "left"), (-9, "right"), (0, "middle"), (30, "left"), (-30, "right"))


def _box(x: float, y: float, width: float, side: str) -> Box:
    left = {"left": x, "right": x - width, "middle": x - width / 2}[side]
    return left, y - LINE_PX / 2, left + width, y + LINE_PX / 2


def _pushed(box: Box, inside: Box) -> Box:
    dx = max(0.0, inside[0] - box[0]) or min(0.0, inside[2] - box[2])
    dy = max(0.0, inside[1] - box[1]) or min(0.0, inside[3] - box[3])
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _labels(anchors: Sequence[tuple[float, float]], texts: Sequence[str], inside: Box) -> list[Markup]:
    shown = [text if len(text) <= 26 else f"…{text[-25:]}" for text in texts]
    parts = []
    for (x, y), text, box in zip(anchors, shown, place_labels(anchors, shown, inside), strict=True):
        near_x, near_y = min(max(x, box[0]), box[2]), (box[1] + box[3]) / 2
        if text and math.hypot(near_x - x, near_y - y) > 18:
            parts.append(_line(x, y, near_x, near_y, "leader"))
        parts += [_text(box[0] + 1, box[3] - 3, text, "name halo")] if text else []
    return parts


def heat_map(title: str, columns: Sequence[str], totals: Sequence[int], counts: Sequence[Sequence[int]]) -> Figure:
    """One row per layer, one column per stage: how many of `totals[layer]` are left, the shade their share."""
    cell = min(64.0, (WIDTH - LEFT - RIGHT) / len(columns))
    parts = [_text(0, 13, "layer", "tick")]
    for column, name in enumerate(columns):
        parts.append(_text(LEFT + cell * (column + 0.5), 13, _fit(name, cell), "tick middle"))
    for row, (total, of_layer) in enumerate(zip(totals, counts, strict=True)):
        top = 20 + 18 * row
        parts.append(_text(0, top + 13, str(row), "tick"))
        for column, count in enumerate(of_layer):
            parts.append(_cell(LEFT + cell * column, top, cell, count, count / total if total else 0.0))
    lines = [
        f"Layer {row}: {', '.join(map(str, of_layer))} of {total}"
        for row, (total, of_layer) in enumerate(zip(totals, counts, strict=True))
    ]
    said = f"{'; '.join(columns)}. {'. '.join(lines)}"
    rows = [[str(row), str(total), *map(str, own)] for row, (total, own) in enumerate(zip(totals, counts, strict=True))]
    return Figure(
        title, f"{said}.", _svg(title, said, 24 + 18 * len(totals), parts), Table(["layer", "of", *columns], rows)
    )


def _cell(x: float, y: float, width: float, count: int, share: float) -> Markup:
    rect = Markup(
        '<rect class="cell" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="16" rx="2" style="--share:{:.3f}"/>'
    ).format(x + 1, y, width - 2, share)
    return rect + _text(x + width / 2, y + 12, f"{count:,}", "middle")


def head_map(title: str, totals: Sequence[int], left_after: Sequence[Sequence[int]], stages: Sequence[str]) -> Figure:
    """One row per layer, one square per head: full where it is left; else the number of the stage that cut it.

    `left_after[layer][head]` is the number of stages, from the first, that the head survived.
    """
    most = max([*totals, 1])
    cell = min(18.0, (WIDTH - LEFT - RIGHT) / most)
    parts = [_text(0, 13, "layer", "tick"), _text(LEFT, 13, "head 0, 1, 2, ...", "tick")]
    rows, said = [], []
    for row, survived in enumerate(left_after):
        top = 20 + 20 * row
        parts.append(_text(0, top + 13, str(row), "tick"))
        for head, number in enumerate(survived):
            parts.append(_head(LEFT + cell * head, top, cell, number, len(stages)))
        left = [str(head) for head, number in enumerate(survived) if number == len(stages)]
        parts.append(_text(LEFT + cell * most + 6, top + 13, f"{len(left)} of {totals[row]}", "tick"))
        rows.append([str(row), str(totals[row]), str(len(left)), " ".join(left) or "none"])
        said.append(f"Layer {row}: {len(left)} of {totals[row]}")
    svg = _svg(title, ". ".join(said), 24 + 20 * len(totals), parts)
    return Figure(title, f"{'. '.join(said)}.", svg, Table(["layer", "of", "heads left", "which"], rows))


def _head(x: float, y: float, cell: float, survived: int, stages: int) -> Markup:
    left = survived == stages
    rect = Markup('<rect class="head {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2"/>').format(
        "left" if left else "cut", x + 1, y + 1, cell - 2, cell - 2
    )
    number = (
        Markup("") if left or cell < 10 else _text(x + cell / 2, y + cell / 2 + 4, str(survived + 1), "tick middle")
    )
    return rect + number


def _fit(text: str, width: float) -> str:
    room = max(2, int(width / CHAR_PX))
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _svg(title: str, description: str, height: float, parts: Iterable[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(WIDTH, height, shown(f"{title}. {description}."), shown(title), shown(description), Markup("").join(parts))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, shown(text))
