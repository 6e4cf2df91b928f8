"""A comparison for people, the whole in words first; and as the JSON object that the report reads.

Sentences and tables fit 100 columns. A difference whose interval holds 0 is "not different".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from tinyclip.evaluate.compare import ClassLoss, Comparison, DataSetLoss, RetrievalLoss
from tinyclip.redact import redacted
from tinyclip.terminal import Table

NUM_CLASSES = 10  # of the table
MEASURE_COLUMNS = ("measure", "teacher", "student", "difference, both")
VALUE_COLUMNS = ("", "teacher", "student", "student / teacher")
UNITS = {"mb": ("MB of fp32 weights", "per MB"), "gmac": ("GMAC", "per GMAC"), "ms": ("ms, batch 1", "per ms")}


def to_json(comparison: Comparison) -> str:
    found = {"words": list(words(comparison)), **asdict(comparison)}
    return json.dumps(redacted(found), indent=2, allow_nan=False)


# Sentences.


def words(comparison: Comparison) -> Iterator[str]:
    """A sentence for the mean of several data sets, each data set, the pairs, and the score per cost."""
    if comparison.overall:
        scores, num = comparison.overall, len(comparison.data_sets)
        yield f"mean of {num} data sets: {_scores(scores, '', comparison.overall_verdict)}; {_kept(scores)}"
    for loss in comparison.data_sets:
        yield f"{loss.name}: {'; '.join(_data_set(loss))}"
    if comparison.retrieval is not None:
        yield f"{comparison.retrieval.name}: {'; '.join(_pairs(comparison.retrieval))}"
    if ratios := _ratios(comparison.value):
        yield f"{comparison.value_of} per cost, student / teacher: {ratios}"
    for name, why in comparison.not_measured.items():
        yield f"{name}: {why}"
    for one in comparison.absent:
        yield f"absent: {one['name']}: {one['why']}"
    for name, reasons in comparison.left_out.items():
        yield f"left out of {name}: {', '.join(f'{number:,} {reason}' for reason, number in reasons.items())}"


def _scores(scores: Mapping[str, float], name: str, verdict: str | None) -> str:
    sides = (f"{side} {share(scores, f'{side}{name}')}" for side in ("student", "teacher"))
    return f"{' vs '.join(sides)}: {difference(scores, f'difference{name}')} ({_verdict(verdict)})"


def _verdict(verdict: str | None) -> str:
    return "not different" if verdict == "not different" else f"different: {verdict}"


def _kept(scores: Mapping[str, float]) -> str:
    if "retention" not in scores:
        return "the share kept has no interval: the teacher is right too rarely"
    return f"keeps {share(scores, 'retention')} of the teacher's"


def _data_set(loss: DataSetLoss) -> Iterator[str]:
    scores = loss.scores
    yield _scores(scores, "", loss.verdict)
    yield _kept(scores)
    right = scores.get("agreement_teacher_right")
    yield f"agrees on {scores['agreement']:.0%}" + (f", on {right:.0%} of what the teacher has right" if right else "")
    yield f"ECE {scores['student_ece']:.3f} vs {scores['teacher_ece']:.3f}"
    worse, better = (sum(one.verdict == verdict for one in loss.per_class) for verdict in ("worse", "better"))
    yield f"of {len(loss.per_class)} classes {worse} are worse, {better} better, adjusted for their number"
    worst = [f"{one.name} {100 * one.difference:+.0f}" for one in loss.worst_classes]
    yield f"worst classes: {', '.join(worst)} points" if worst else "no class of enough images lost"


def _pairs(loss: RetrievalLoss) -> Iterator[str]:
    for name, verdict in loss.verdicts.items():
        if name.endswith("@1"):
            yield f"{_readable(name)}: {_scores(loss.scores, f'_{name}', verdict)}"
    agreements = (loss.scores[f"{way}_agreement"] for way in ("image_to_text", "text_to_image"))
    yield "the same image comes first for {:.0%} of the images and {:.0%} of the texts".format(*agreements)


def _ratios(value: Mapping[str, float]) -> str:
    ratios = ((per, value.get(f"score_per_{unit}_ratio")) for unit, (_, per) in UNITS.items())
    return ", ".join(f"{ratio:.2f} {per}" for per, ratio in ratios if ratio is not None)


def share(scores: Mapping[str, float], name: str) -> str:
    """57.2% [54.0, 60.1], or the value alone."""
    return f"{scores[name]:.1%}{_interval(scores, name, '.1f')}"


def difference(scores: Mapping[str, float], name: str) -> str:
    """-8.4 points [-11.0, -6.0]."""
    return f"{100 * scores[name]:+.1f} points{_interval(scores, name, '+.1f')}"


def _interval(scores: Mapping[str, float], name: str, form: str) -> str:
    if f"{name}_low" not in scores:
        return ""
    return f" [{100 * scores[f'{name}_low']:{form}}, {100 * scores[f'{name}_high']:{form}}]"


def _readable(name: str) -> str:
    name = name.replace("_to_", " to ").replace("_", " ")
    return name.replace("cka", "CKA").replace("ece", "ECE").replace("neighbours n", "items with neighbours")


# Tables.


def tables(comparison: Comparison) -> Iterator[Table | str]:
    """What rich prints: sentences, and for each data set its classes and its measures; then the cost."""
    yield from words(comparison)
    for loss in comparison.data_sets:
        yield _measures_table(loss.name, loss.scores)
        yield _classes_table(loss)
        yield loss.multiple_comparisons
    if comparison.retrieval is not None:
        yield _measures_table(comparison.retrieval.name, comparison.retrieval.scores)
    if comparison.value:
        yield _value_table(comparison.value, comparison.value_of)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _classes_table(loss: DataSetLoss) -> Table:
    table = _table(f"{loss.name}: classes", "class", "images", "teacher", "student", "difference, points", "verdict")
    for one in loss.per_class[:NUM_CLASSES]:
        table.add_row(one.name, str(one.n), f"{one.teacher:.0%}", f"{one.student:.0%}", _points(one), one.verdict)
    if len(loss.per_class) > NUM_CLASSES:
        table.caption = f"the {NUM_CLASSES} largest losses of {len(loss.per_class)} classes; --json has all"
    return table


def _points(one: ClassLoss) -> str:
    return f"{100 * one.difference:+.0f} [{100 * one.difference_low:+.0f}, {100 * one.difference_high:+.0f}]"


def _measures_table(name: str, scores: Mapping[str, float]) -> Table:
    table = _table(name, *MEASURE_COLUMNS)
    for row in measures(scores):
        table.add_row(*row)
    return table


def measures(scores: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """Rows of MEASURE_COLUMNS: scores in %, differences in points; what is of both together has no side's value."""
    bounds = {f"{other}{end}" for other in scores for end in ("_low", "_high")}
    for key in scores:
        side, _, measure = key.partition("_")
        if key in bounds or side == "student" or key.startswith("difference"):
            continue
        if side == "teacher" and f"student{key.removeprefix('teacher')}" in scores:
            both = (_cell(scores, key), _cell(scores, f"student{key.removeprefix('teacher')}"))
            yield _readable(measure) or "score", *both, _difference_cell(scores, measure)
        elif key != "ece_difference":
            yield _readable(key), "", "", _cell(scores, key)


def _difference_cell(scores: Mapping[str, float], measure: str) -> str:
    for name in (f"difference_{measure}" if measure else "difference", f"{measure}_difference"):
        if name in scores:
            return difference(scores, name).replace(" points", "")
    return ""


def _cell(scores: Mapping[str, float], name: str) -> str:
    if name.endswith("_n"):
        return f"{scores[name]:,.0f}"
    if name.endswith("median_rank"):
        return f"{scores[name]:g}"
    if "cka" in name or "cosine" in name or name.endswith("ece"):
        return f"{scores[name]:.3f}"
    return share(scores, name)


def _value_table(value: Mapping[str, float], value_of: str) -> Table:
    table = _table(f"cost of one image and one full text, and {value_of} per cost", *VALUE_COLUMNS)
    for row in values(value):
        table.add_row(*row)
    return table


def values(value: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """Rows of VALUE_COLUMNS: each cost, and the score per unit of it."""
    for unit, (cost_name, per) in UNITS.items():
        for name, key in ((cost_name, unit), (per, f"score_per_{unit}")):
            if f"teacher_{key}" in value:
                sides = (f"{value[f'{side}_{key}']:.3g}" for side in ("teacher", "student"))
                yield name, *sides, f"{value[f'{key}_ratio']:.2f}" if f"{key}_ratio" in value else ""
