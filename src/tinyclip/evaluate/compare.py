"""What was lost from teacher to student: by data set, by class, in single answers, in the geometry, per cost.

Both models answer the same questions, so every difference is paired: each resample draws the same items for both, and
a difference whose interval holds 0 is called "not different". paired.py and drift.py define the measures; here they
are taken and gathered into one value. compare_words.py makes sentences, tables and JSON of it.

Scores of a data set are shares in [0, 1] by these names; NAME_low and NAME_high bound the middle 95 % of resamples:

    teacher, student, difference, retention     top 1, or the mean over classes where that is the data set's metric
    agreement, agreement_teacher_right          equal answers; among the items that the teacher has right
    both_right, teacher_alone_right, student_alone_right, neither_right
    teacher_ece, student_ece, ece_difference    15 bins of equal width, each model at its own scale
    image_overlap@10 ..., class_cka ...         neighbours of images; geometry of image and class embeddings
    teacher_template_spread ...                 top 1 of single templates: largest less smallest, standard deviation,
                                                and what the ensemble of all gains over the best single one

Shape legend: I images, T texts, C classes, E embedding.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from tinyclip.config import MAX_WORKERS, Config
from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import BadItem, Source
from tinyclip.data.thumbnail import thumbnail
from tinyclip.distill.teacher import Teacher
from tinyclip.evaluate.confidence import Difference, interval, paired_difference
from tinyclip.evaluate.cost import cost, size_mb
from tinyclip.evaluate.datasets import Absent, LabelledSet, Names
from tinyclip.evaluate.drift import (
    ece,
    ece_difference,
    geometry,
    jaccard,
    neighbours,
    overlap,
    rank_biased_overlap,
    reliability,
)
from tinyclip.evaluate.embed import embed_images, embed_texts, texts_of, top_k
from tinyclip.evaluate.paired import (
    FALSE_DISCOVERIES,
    agreement,
    benjamini_hochberg,
    mcnemar,
    retention,
    right_and_wrong,
)
from tinyclip.evaluate.retrieval import ranks, recall_differences, scores_of
from tinyclip.evaluate.speed import pairs_per_s
from tinyclip.evaluate.zeroshot import Answers, alike_line, answers, classifier, top_k_accuracy

T = TypeVar("T")
NEITHER = "the labels are of several classes per image: there is no right or wrong answer to pair"


class Comparing(Config):
    """How closely two models are looked at."""

    worst: int = Field(default=5, ge=0, description="classes shown with examples")
    min_items: int = Field(default=5, gt=0, description="images that a class needs to be among the worst")
    examples: int = Field(default=4, ge=0, description="images of each of the worst classes")
    confusions: int = Field(default=10, ge=0, description="pairs of classes that the student confuses more often")
    neighbours: int = Field(default=10, gt=0, description="nearest others that are compared")
    max_neighbour_items: int = Field(default=10_000, gt=1, description="evenly drawn; all pairs of them are visited")
    picture_px: int = Field(default=96, gt=0, le=512, description="longest side of an example's thumbnail")
    picture_bytes: int = Field(default=60_000, ge=0, description="of all thumbnails; further examples have none")
    timing: bool = Field(default=True, description="measure ms per pair at batch 1")
    timing_repeats: int = Field(default=15, gt=0, description="interleaved runs; their median counts")
    batch_size: int = Field(default=64, gt=0, description="images that are embedded together")
    workers: int = Field(default=0, ge=0, le=MAX_WORKERS, description="processes that read images")


@dataclass(frozen=True, kw_only=True)
class ClassLoss:
    """`p` is McNemar's, `q` the same adjusted for the number of classes; the verdict is worse or better for q < 5 %."""

    name: str
    label: int
    n: int
    teacher: float
    student: float
    difference: float
    difference_low: float
    difference_high: float
    p: float
    q: float
    verdict: str  # worse, better or not different


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image that the teacher has right and the student wrong."""

    item: int
    key: str
    student_said: str
    teacher_confidence: float
    student_confidence: float
    picture: str | None  # a data URI


@dataclass(frozen=True, kw_only=True)
class WorstClass:
    name: str
    n: int
    difference: float
    lost: int  # images that the teacher alone has right
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Images of a class that were given another one's name."""

    label: str
    said: str
    teacher_n: int
    student_n: int


@dataclass(frozen=True, kw_only=True)
class SingleTemplate:
    template: str
    teacher: float
    student: float


@dataclass(frozen=True, kw_only=True)
class DataSetLoss:
    name: str
    score: str  # top1 or mean_per_class
    n: int
    classes: int
    verdict: str  # worse, better or not different
    scores: dict[str, float]
    multiple_comparisons: str
    per_class: tuple[ClassLoss, ...]  # the largest loss first
    worst_classes: tuple[WorstClass, ...]
    confusions_gained: tuple[Confusion, ...]
    templates: tuple[SingleTemplate, ...]
    teacher_reliability: tuple[dict[str, float | None], ...]
    student_reliability: tuple[dict[str, float | None], ...]


@dataclass(frozen=True, kw_only=True)
class RetrievalLoss:
    """Scores: teacher_NAME, student_NAME and difference_NAME of every recall; agreement: the same image at rank 1.

    Of an image's query that is the image which the first text belongs to.
    """

    name: str
    images: int
    texts: int
    verdicts: dict[str, str]  # by recall
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    teacher: str
    student: str
    settings: dict[str, Any]
    overall: dict[str, float]  # means over the data sets; none of one
    overall_verdict: str | None
    data_sets: tuple[DataSetLoss, ...]
    absent: tuple[dict[str, str], ...]
    retrieval: RetrievalLoss | None
    value: dict[str, float]  # cost of both, score per cost, and ratios student / teacher
    value_of: str  # the score that is divided by the cost
    not_measured: dict[str, str] = field(default_factory=dict)  # name: why
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)  # items, by set and reason


class Both(NamedTuple):
    """Of teacher and student."""

    teacher: Any
    student: Any

    def map(self, function: Callable[[Any], T]) -> Both:
        return Both(function(self.teacher), function(self.student))


def compare(
    teacher: Teacher,
    student: Teacher,
    sets: Sequence[LabelledSet] = (),
    pairs: Source | None = None,
    settings: Comparing = Comparing(),  # noqa: B008  immutable
    *,
    absent: Sequence[Absent] = (),
    say: Callable[[str], None] = print,
) -> Comparison:
    """Compare two models on labelled sets, on pairs, or on both.

    Raises ValueError where there is nothing to compare on, and what `answers` and `ranks` raise.
    """
    usable = [one for one in sets if one.label_sets is None]
    absent = [*absent, *(Absent(one.name, NEITHER) for one in sets if one.label_sets is not None)]
    if not usable and pairs is None:
        raise ValueError(f"compare: expected labelled images or pairs, got none{_reasons(absent)}")
    models, losses, rights, left_out = Both(teacher, student), [], [], LeftOut(say)
    for labelled in usable:
        say(f"comparing on {labelled.name}: {len(labelled)} images, {len(labelled.class_names)} classes")
        loss, right = _data_set(models, labelled, settings, settings.picture_bytes // len(usable), left_out, say)
        losses.append(loss)
        rights.append(right)
    if pairs is not None:
        say(f"comparing on {data_name(pairs)}: {len(pairs)} images with their texts")
    retrieved = None if pairs is None else _retrieval(models, pairs, settings, left_out)
    overall, verdict = _overall(rights)
    value, value_of, missing = _value(models, losses, retrieved, settings, say)
    if teacher.embed_dim != student.embed_dim:
        missing["cosine"] = f"not comparable: embeddings of {teacher.embed_dim} and {student.embed_dim} dimensions"
    return Comparison(
        teacher=teacher.name,
        student=student.name,
        settings=settings.model_dump(mode="json"),
        overall=overall,
        overall_verdict=verdict,
        data_sets=tuple(losses),
        absent=tuple(one._asdict() for one in absent),
        retrieval=retrieved,
        value=value,
        value_of=value_of,
        not_measured=missing,
        left_out=left_out.counts,
    )


def data_name(source: Source) -> str:
    """The end of a path: flickr30k/captions.tsv."""
    return "/".join(Path(source.name).parts[-2:])


def verdict_of(difference: Difference) -> str:
    """Of a model's score less the teacher's."""
    return "not different" if not difference.different else "worse" if difference.value < 0 else "better"


def _reasons(absent: Sequence[Absent]) -> str:
    return "".join(f"; {one.name}: {one.why}" for one in absent)


# One labelled set.


class Right(NamedTuple):
    """What the mean over data sets is made of: right answers, and the classes where their mean is wanted."""

    teacher_I: Tensor
    student_I: Tensor
    group_I: Tensor | None


def _data_set(
    models: Both,
    labelled: LabelledSet,
    settings: Comparing,
    picture_bytes: int,
    left_out: LeftOut,
    say: Callable[[str], None],
) -> tuple[DataSetLoss, Right]:
    reading = {"batch_size": settings.batch_size, "workers": settings.workers, "left_out": left_out}
    found = models.map(lambda model: answers(model, labelled, **reading))
    for line in set(found.map(lambda own: alike_line(own.class_CE, labelled.class_names))) - {None}:
        say(f"{labelled.name}: {line}")
    label_I = found.teacher.label_I
    assert torch.equal(found.teacher.item_I, found.student.item_I), "both read every image that can be read"
    right = found.map(lambda own: own.rank_I == 1)
    group_I = label_I if labelled.metric == "mean_per_class" else None
    templates = _templates(models, labelled, found)
    difference = paired_difference(right.student, right.teacher, group_I)
    per_class = class_losses(right.teacher, right.student, label_I, [names[0] for names in labelled.class_names])
    loss = DataSetLoss(
        name=labelled.name,
        score="top1" if group_I is None else "mean_per_class",
        n=len(label_I),
        classes=len(labelled.class_names),
        verdict=verdict_of(difference),
        scores={
            **interval(right.teacher, group_I).scores("teacher"),
            **interval(right.student, group_I).scores("student"),
            **_bounded("difference", difference),
            **_bounded("retention", retention(right.student, right.teacher, group_I)),
            **_agreement(found, right),
            **_calibration(found, right),
            **_neighbourhood("image", found.map(lambda own: own.image_IE), settings),
            **_geometry("image", found.map(lambda own: own.image_IE)),
            **_geometry("class", found.map(lambda own: own.class_CE)),
            **_template_scores(templates, right),
        },
        multiple_comparisons=_remark(len(per_class)),
        per_class=per_class,
        worst_classes=tuple(_worst(per_class, labelled, found, settings, picture_bytes)),
        confusions_gained=confusions_gained(found, labelled.class_names, settings.confusions),
        templates=templates,
        teacher_reliability=_bins(found.teacher, right.teacher),
        student_reliability=_bins(found.student, right.student),
    )
    return loss, Right(right.teacher, right.student, group_I)


def _bounded(name: str, found: Any) -> dict[str, float]:
    """An Interval or a Difference; nothing for None."""
    return {} if found is None else {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _some(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _agreement(found: Both, right: Both) -> dict[str, float]:
    teacher_I, student_I = found.map(lambda own: own.predicted_I)
    return {
        **interval(teacher_I == student_I).scores("agreement"),
        **_some(
            agreement_teacher_right=agreement(teacher_I, student_I, right.teacher),
            agreement_teacher_wrong=agreement(teacher_I, student_I, ~right.teacher),
        ),
        **right_and_wrong(*right),
    }


def _calibration(found: Both, right: Both) -> dict[str, float]:
    teacher, student = (found.teacher.confidence_I, right.teacher), (found.student.confidence_I, right.student)
    return {
        "teacher_ece": ece(*teacher),
        "student_ece": ece(*student),
        **_bounded("ece_difference", ece_difference(student, teacher)),
    }


def _bins(own: Answers, right_I: Tensor) -> tuple[dict[str, float | None], ...]:
    return tuple(one._asdict() for one in reliability(own.confidence_I, right_I))


def _neighbourhood(what: str, embeddings: Both, settings: Comparing) -> dict[str, float]:
    """Means over the items; `overlap_by_chance` is that of two random lists."""
    num = min(len(embeddings.teacher), settings.max_neighbour_items)
    rows = torch.linspace(0, len(embeddings.teacher) - 1, num).round().long()
    k = min(settings.neighbours, num - 1)
    if k < 1:
        return {}
    nearest = embeddings.map(lambda rows_NE: neighbours(rows_NE[rows], k))
    return {
        **interval(overlap(*nearest)).scores(f"{what}_overlap@{k}"),
        f"{what}_jaccard@{k}": jaccard(*nearest).mean().item(),
        f"{what}_rank_biased_overlap@{k}": rank_biased_overlap(*nearest).mean().item(),
        f"{what}_overlap@{k}_by_chance": k / (num - 1),
        f"{what}_neighbours_n": num,
    }


def _geometry(what: str, embeddings: Both) -> dict[str, float]:
    found = geometry(*embeddings)
    values = {f"{what}_{name}": value for name, value in found._asdict().items()}
    return _some(**values)


def class_losses(
    teacher_right_I: Tensor, student_right_I: Tensor, label_I: Tensor, names: Sequence[str]
) -> tuple[ClassLoss, ...]:
    """Of every class that occurs, the largest loss first."""
    classes: list[int] = label_I.unique().tolist()
    rights = [(teacher_right_I[label_I == c].bool(), student_right_I[label_I == c].bool()) for c in classes]
    p_C = [mcnemar(int((t & ~s).sum()), int((s & ~t).sum())) for t, s in rights]
    losses = [
        _class_loss((names[c], c), t, s, (p, q))
        for c, (t, s), p, q in zip(classes, rights, p_C, benjamini_hochberg(p_C), strict=True)
    ]
    return tuple(sorted(losses, key=lambda loss: (loss.difference, -loss.n)))


def _class_loss(
    named: tuple[str, int], teacher_right_I: Tensor, student_right_I: Tensor, p_and_q: tuple[float, float]
) -> ClassLoss:
    (name, label), (p, q) = named, p_and_q
    found = paired_difference(student_right_I, teacher_right_I)
    return ClassLoss(
        name=name,
        label=label,
        n=found.n,
        teacher=teacher_right_I.double().mean().item(),
        student=student_right_I.double().mean().item(),
        difference=found.value,
        difference_low=found.low,
        difference_high=found.high,
        p=p,
        q=q,
        verdict="not different" if q >= FALSE_DISCOVERIES else "worse" if found.value < 0 else "better",
    )


def _remark(num: int) -> str:
    return (
        f"{num} classes: each interval is of its class alone, and about 5 % of them ({0.05 * num:.1f}) miss by chance. "
        f"Verdicts are by McNemar's exact test, adjusted for {num} classes (Benjamini-Hochberg): about 5 % of the "
        "classes called worse or better are expected to be so by chance."
    )


def _worst(
    per_class: Sequence[ClassLoss], labelled: LabelledSet, found: Both, settings: Comparing, picture_bytes: int
) -> Iterator[WorstClass]:
    """Classes of at least `min_items` images that lost, the largest loss first."""
    lost_I = (found.teacher.rank_I == 1) & (found.student.rank_I > 1)
    losers = [loss for loss in per_class if loss.n >= settings.min_items and loss.difference < 0][: settings.worst]
    for loss in losers:
        rows = (lost_I & (found.teacher.label_I == loss.label)).nonzero().flatten()
        rows = rows[found.teacher.confidence_I[rows].argsort(descending=True, stable=True)].tolist()
        shown = []
        for row in rows[: settings.examples]:
            shown.append(_example(row, labelled, found, settings.picture_px, picture_bytes))
            picture_bytes -= len(shown[-1].picture or "")
        yield WorstClass(name=loss.name, n=loss.n, difference=loss.difference, lost=len(rows), examples=tuple(shown))


def _example(row: int, labelled: LabelledSet, found: Both, px: int, picture_bytes: int) -> Example:
    item = int(found.teacher.item_I[row])
    picture = _picture(labelled.source, item, px)
    return Example(
        item=item,
        key=labelled.source.key(item),
        student_said=labelled.class_names[int(found.student.predicted_I[row])][0],
        teacher_confidence=found.teacher.confidence_I[row].item(),
        student_confidence=found.student.confidence_I[row].item(),
        picture=picture if picture is not None and len(picture) <= picture_bytes else None,
    )


def _picture(source: Source, item: int, px: int) -> str | None:
    try:
        return thumbnail(source, item, side=px)
    except BadItem:  # it could be read before
        return None


def confusions_gained(found: Both, class_names: Names, at_most: int) -> tuple[Confusion, ...]:
    """Wrong answers that the student gives more often than the teacher, the largest gain first."""
    teacher, student = found.map(_confusions)
    gained = sorted((teacher[pair] - count, pair) for pair, count in student.items() if count > teacher[pair])
    return tuple(
        Confusion(
            label=class_names[label][0],
            said=class_names[said][0],
            teacher_n=teacher[label, said],
            student_n=student[label, said],
        )
        for _, (label, said) in gained[:at_most]
    )


def _confusions(own: Answers) -> Counter[tuple[int, int]]:
    wrong_I = own.rank_I > 1
    return Counter(zip(own.label_I[wrong_I].tolist(), own.predicted_I[wrong_I].tolist(), strict=True))


def _templates(models: Both, labelled: LabelledSet, found: Both) -> tuple[SingleTemplate, ...]:
    """top1 of each template on its own."""

    def top1(model: Teacher, own: Answers, template: str) -> float:
        class_CE = classifier(model, labelled.class_names, [template])
        return top_k_accuracy(own.image_IE, class_CE, own.label_I, (1,))["top1"]

    return tuple(
        SingleTemplate(
            template=template,
            teacher=top1(models.teacher, found.teacher, template),
            student=top1(models.student, found.student, template),
        )
        for template in labelled.templates
    )


def _template_scores(templates: Sequence[SingleTemplate], right: Both) -> dict[str, float]:
    scores = {}
    for side in ("teacher", "student"):
        single = [getattr(one, side) for one in templates]
        ensemble = getattr(right, side).double().mean().item()
        scores |= {
            f"{side}_template_spread": max(single) - min(single),
            f"{side}_template_std": statistics.pstdev(single),
            f"{side}_ensemble_less_best_template": ensemble - max(single),
        }
    return scores


def _overall(rights: Sequence[Right]) -> tuple[dict[str, float], str | None]:
    """Means over data sets, each counting alike; each resample draws within each data set."""
    if len(rights) < 2:
        return {}, None
    sides, weights = [], []
    for right in rights:
        weight_I = _weights(right)
        weights.append(torch.full((len(weight_I),), len(sides)))
        sides.append((weight_I * right.teacher_I.double(), weight_I * right.student_I.double()))
    (teacher, student), group = (torch.cat(column) for column in zip(*sides, strict=True)), torch.cat(weights)
    difference = paired_difference(student, teacher, group)
    scores = {
        **interval(teacher, group).scores("teacher"),
        **interval(student, group).scores("student"),
        **_bounded("difference", difference),
        **_bounded("retention", retention(student, teacher, group)),
        "data_sets": len(rights),
    }
    return scores, verdict_of(difference)


def _weights(right: Right) -> Tensor:
    """So that the mean over the images is the data set's score: 1, or N / (C n) in a class of n."""
    if right.group_I is None:
        return torch.ones(len(right.teacher_I), dtype=torch.float64)
    _, place_I, n_C = right.group_I.unique(return_inverse=True, return_counts=True)
    return len(right.group_I) / (len(n_C) * n_C[place_I].double())


# Pairs.


class Embedded(NamedTuple):
    image_IE: Tensor
    text_TE: Tensor
    image_of_text_T: Tensor


def _embedded(
    model: Teacher, source: Source, captions: Mapping[int, tuple[str, ...]], reading: Mapping[str, Any]
) -> Embedded:
    texts, image_IE = embed_images(model, source, captions, **reading)
    image_of_text_T = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in texts]))
    return Embedded(image_IE, embed_texts(model, [text for own in texts for text in own]), image_of_text_T)


def _retrieval(models: Both, source: Source, settings: Comparing, left_out: LeftOut) -> RetrievalLoss:
    name = data_name(source)
    captions = texts_of(source, source.captions, "captions", left_out, name)
    reading = {"batch_size": settings.batch_size, "workers": settings.workers, "left_out": left_out, "name": name}
    embedded = models.map(lambda model: _embedded(model, source, captions, reading))
    found = embedded.map(lambda own: ranks(*own))
    differences = recall_differences(found.student, found.teacher)
    images, texts = (embedded.map(lambda own, side=side: own[side]) for side in (0, 1))
    first = embedded.map(_first)
    scores = {f"{side}_{name}": v for side in Both._fields for name, v in scores_of(getattr(found, side)).items()}
    scores = {name: value for name, value in scores.items() if not name.endswith(("_images", "_texts"))}
    for name, difference in differences.items():
        scores |= _bounded(f"difference_{name}", difference)
    for way, teacher_Q, student_Q in zip(("image_to_text", "text_to_image"), *first, strict=True):
        scores |= interval(teacher_Q == student_Q).scores(f"{way}_agreement")
    return RetrievalLoss(
        name=name,
        images=len(images.teacher),
        texts=len(texts.teacher),
        verdicts={name: verdict_of(difference) for name, difference in differences.items()},
        scores={
            **scores,
            **_neighbourhood("image", images, settings),
            **_neighbourhood("text", texts, settings),
            **_geometry("image", images),
            **_geometry("text", texts),
        },
    )


def _first(own: Embedded) -> tuple[Tensor, Tensor]:
    """The image that each image's most similar text belongs to, and the most similar image of each text."""
    text_I = top_k(own.image_IE, own.text_TE, 1)[1][:, 0]
    return own.image_of_text_T[text_I], top_k(own.text_TE, own.image_IE, 1)[1][:, 0]


# Score per cost.


def _value(
    models: Both,
    losses: Sequence[DataSetLoss],
    retrieved: RetrievalLoss | None,
    settings: Comparing,
    say: Callable[[str], None],
) -> tuple[dict[str, float], str, dict[str, str]]:
    """Costs of one image and one text of full length; the score is a mean over the data sets, or a recall."""
    if losses:
        what = "zero-shot score" if len(losses) == 1 else f"mean zero-shot score of {len(losses)} data sets"
        score = {side: statistics.mean(loss.scores[side] for loss in losses) for side in Both._fields}
    else:
        assert retrieved is not None, "checked by compare"
        what = "image_to_text_recall@1"
        score = {side: retrieved.scores[f"{side}_{what}"] for side in Both._fields}
    if unknown := [model.name for model in models if model.clip is None]:
        return {}, what, {"cost": f"the layers of {', '.join(unknown)} are not tinyclip's: its cost is not counted"}
    costs = {side: _cost(getattr(models, side)) for side in Both._fields}
    missing = {} if settings.timing else {"ms": "left out"}
    if settings.timing:
        say(f"timing: {settings.timing_repeats} interleaved runs of each model at batch 1")
        speed = pairs_per_s(
            {side: getattr(models, side).clip.eval() for side in Both._fields},
            batch_size=1,
            repeats=settings.timing_repeats,
        )
        for side in Both._fields:
            costs[side]["ms"] = 1000 / speed[side]
    return per_cost(score, costs), what, missing


def _cost(model: Teacher) -> dict[str, float]:
    assert model.clip is not None, "checked by the caller"
    counted = cost(model.clip.config)
    return {"mb": size_mb(model.clip.config), "gmac": (counted.image_macs + counted.text_macs) / 1e9}


def per_cost(score: Mapping[str, float], costs: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """SIDE_UNIT, the cost; SIDE_score_per_UNIT; and both as ratios student / teacher."""
    values: dict[str, float] = {}
    for unit in costs["teacher"]:
        for side in ("teacher", "student"):
            values[f"{side}_{unit}"] = costs[side][unit]
            values[f"{side}_score_per_{unit}"] = score[side] / costs[side][unit]
        values[f"{unit}_ratio"] = costs["student"][unit] / costs["teacher"][unit]
        if score["teacher"] > 0:
            values[f"score_per_{unit}_ratio"] = (
                values[f"student_score_per_{unit}"] / values[f"teacher_score_per_{unit}"]
            )
    return values
