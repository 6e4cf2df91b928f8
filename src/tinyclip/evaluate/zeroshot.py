"""Zero-shot classification: the class whose description is most similar to the picture.

A class is described by every synonym in every template; the mean of these unit vectors, renormalised, is its
row of the classifier (Radford et al. 2021, section 3.1.4). Of classes that are equally similar the first wins, as
argmax has it in open_clip and CLIP_benchmark. Classes that the model reads as the same tokens are one row, bit for bit:
ImageNet's two "missile", or "Cat" and "cat", of which the later is never predicted (`alike_line`).

`answers` keeps what the model said of each image; `answer_scores` makes scores of it:

    top1, top5          share of images whose class is the most similar, among the five most similar
    mean_per_class      mean over the classes that occur of their share of right answers
    roc_auc             of two classes: the chance that an image of the second is more like it than one of the first
    map, map_11point    where images have several classes: mean over classes of the average precision, exact and
                        interpolated at recalls 0, 0.1 ... 1 (Everingham et al., "The PASCAL VOC Challenge", 2010)

Shape legend: I images, C classes, T texts, R images in a chunk, E embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import nan
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import Source
from tinyclip.evaluate.confidence import bootstrap, interval
from tinyclip.evaluate.embed import (
    QUERIES_PER_CHUNK,
    Model,
    check_finite,
    embed_images,
    embed_texts,
    share_within,
    texts_of,
)

if TYPE_CHECKING:
    from tinyclip.evaluate.datasets import LabelledSet

DEFAULT_TEMPLATES = (
    "{}.",
    "a {}.",
    "a photo of a {}.",
    "a picture of a {}.",
    "a photo of the {}.",
    "a close-up of a {}.",
    "a drawing of a {}.",
)

SCORE_OF_METRIC = {  # the score that stands for a data set in the mean of a suite
    "accuracy": "top1",
    "mean_per_class": "mean_per_class",
    "mean_top1_top5": "mean_top1_top5",
    "roc_auc": "roc_auc",
    "map_11point": "map_11point",
}
PRECISION_RESAMPLES = 200  # each sorts the images anew for every class
RECALLS = torch.linspace(0, 1, 11, dtype=torch.float64)
NUM_NAMED = 5  # groups of classes that `alike_line` names


class Answers(NamedTuple):
    """What a model said of each image that could be read."""

    item_I: Tensor  # number of the image in the source
    image_IE: Tensor  # unit
    class_CE: Tensor  # unit
    label_I: Tensor
    predicted_I: Tensor  # of equally similar classes the first
    rank_I: Tensor  # of the right class, from 1: among equally similar ones the first comes first
    confidence_I: Tensor  # softmax probability of the predicted class at the model's scale
    is_class_IC: Tensor | None = None  # bool, where images have several classes: label_I is then one of them


def classifier(model: Model, class_names: Sequence[str | Sequence[str]], templates: Sequence[str]) -> Tensor:
    """Unit vectors [C, E], one for each class given by its name or as its synonyms.

    Classes whose texts are the same tokens to the model have the same row, bit for bit. Raises ValueError for a model
    without a text tower, fewer than two classes, a class without a name, no template, or a template without {}.
    """
    if not callable(getattr(model, "encode_text", None)):
        raise ValueError("zero-shot: expected a model with a text tower, got one without")
    check_templates(templates, "zero-shot")
    synonyms = [[names] if isinstance(names, str) else names for names in class_names]
    if len(synonyms) < 2:
        raise ValueError(f"zero-shot: expected at least 2 classes, got {len(synonyms)}: {synonyms}")
    nameless = [number for number, names in enumerate(synonyms) if not names or not all(map(str.strip, names))]
    if nameless:
        raise ValueError(f"zero-shot: expected a name for each class, class {nameless[0]} has {synonyms[nameless[0]]}")
    texts_C = [[template.replace("{}", name) for name in names for template in templates] for names in synonyms]
    brief_C = [_as_read(model, texts[:: len(templates)]) for texts in texts_C]  # in the first template
    times = Counter(brief_C)
    read_C = [_as_read(model, t) if times[brief] > 1 else brief for t, brief in zip(texts_C, brief_C, strict=True)]
    rows: dict[tuple[object, ...], int] = {}
    row_C = torch.tensor([rows.setdefault(read, len(rows)) for read in read_C])
    texts_of_row = {row: texts for row, texts in zip(row_C.tolist(), texts_C, strict=True)}
    row_of_text_T = torch.tensor([row for row, texts in texts_of_row.items() for _ in texts])
    text_TE = embed_texts(model, [text for texts in texts_of_row.values() for text in texts])
    sum_E = text_TE.new_zeros(len(rows), text_TE.shape[1]).index_add_(0, row_of_text_T, text_TE)
    return F.normalize(sum_E, dim=-1)[row_C]


def check_templates(templates: Sequence[str], where: str) -> None:
    """Raises ValueError where there is none, or one without {}."""
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f'{where}: expected templates like "a photo of a {{}}.", got {list(templates)}')


def _as_read(model: Model, texts: Sequence[str]) -> tuple[object, ...]:
    """The token ids of the texts, in any order; the texts themselves where the model does not show its tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    tokens_TL = tokenizer(list(texts)) if callable(tokenizer) else None
    if not isinstance(tokens_TL, Tensor):
        return tuple(sorted(texts))
    return tuple(sorted(row_L.tobytes().rstrip(b"\0") for row_L in tokens_TL.cpu().numpy()))  # without the padding


def first_alike(class_CE: Tensor) -> Tensor:
    """[C]: the number of the first class that has the same row."""
    first: dict[bytes, int] = {}
    rows = class_CE.detach().cpu().double().numpy()
    return torch.tensor([first.setdefault(row.tobytes(), number) for number, row in enumerate(rows)])


def alike_line(class_CE: Tensor, names: Sequence[Sequence[str]]) -> str | None:
    """One line that names the classes which share a row with another; None where every class has its own."""
    first_C = first_alike(class_CE).tolist()
    shared = [first for first, count in Counter(first_C).items() if count > 1]
    if not shared:
        return None
    groups = [
        ", ".join(f"{names[number][0]!r} ({number})" for number, own in enumerate(first_C) if own == first)
        for first in shared[:NUM_NAMED]
    ]
    more = [f"and {len(shared) - NUM_NAMED} more"] if len(shared) > NUM_NAMED else []
    what = "classes that read the same to the model, of which only the first can be predicted"
    return f"{what}: {'; '.join([*groups, *more])}"


def top_k_accuracy(image_IE: Tensor, class_CE: Tensor, label_I: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Fraction in [0, 1] of images whose class is among the k most similar, as top1, top5: for every k <= C.

    Of equally similar classes the first is the most similar. Raises ValueError for embeddings that are not finite.
    """
    rank_I = class_ranks(image_IE, class_CE, label_I)
    return {f"top{k}": share_within(rank_I, k) for k in ks if k <= len(class_CE)}


def class_ranks(image_IE: Tensor, class_CE: Tensor, label_I: Tensor) -> Tensor:
    """Rank [I], from 1, of each image's class: among equally similar ones the first comes first.

    Raises ValueError for embeddings that are not finite.
    """
    ranks = [image_IE.new_empty(0, dtype=torch.int64)]
    for similarity_RC, label_R in _tiles(image_IE, class_CE, label_I):
        own_R1 = similarity_RC.gather(1, label_R[:, None])
        is_before_RC = torch.arange(len(class_CE), device=label_R.device) < label_R[:, None]
        ahead_RC = (similarity_RC > own_R1) | ((similarity_RC == own_R1) & is_before_RC)
        ranks.append(1 + ahead_RC.sum(-1))
    return torch.cat(ranks)


def _tiles(image_IE: Tensor, class_CE: Tensor, label_I: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities [R, C] in fp64, and the labels of the R images; classes of the same row are equally similar.

    They would not always be: a matrix product may sum the last columns in another order.
    """
    check_finite(image_IE)
    check_finite(class_CE)
    first_C = first_alike(class_CE).to(class_CE.device)
    for image_RE, label_R in zip(image_IE.split(QUERIES_PER_CHUNK), label_I.split(QUERIES_PER_CHUNK), strict=True):
        yield (image_RE.double() @ class_CE.double().T)[:, first_C], label_R


def zeroshot(
    model: Model,
    source: Source,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    batch_size: int = 64,
    workers: int = 0,
    say: Callable[[str], None] | None = None,
    left_out: LeftOut | None = None,
) -> dict[str, float]:
    """top1 and top5 over a labelled source, with intervals, `n` images and its number of `classes`.

    The classes are the labels that occur in the source; `say` is told which of them read the same to the model, and
    `alike_classes` is their number. Items whose image or label cannot be read, or that have no label, are left out, and
    counted in `left_out`. Raises ValueError for a source without labels and for fewer than two classes.
    """
    labels = texts_of(source, source.label, "labels", left_out)
    classes = {names: number for number, names in enumerate(sorted(set(labels.values())))}
    class_CE = classifier(model, list(classes), templates)
    if say is not None and (line := alike_line(class_CE, list(classes))):
        say(f"{source.name}: {line}")
    reading = {"batch_size": batch_size, "workers": workers, "left_out": left_out}
    names, image_IE = embed_images(model, source, labels, **reading)
    label_I = torch.tensor([classes[own] for own in names])
    rank_I = class_ranks(image_IE, class_CE, label_I)
    return _top_scores(rank_I, len(classes)) | _counts(len(image_IE), class_CE)


def _counts(num_images: int, class_CE: Tensor) -> dict[str, int]:
    """`n` images, `classes`, and, where there are any, `alike_classes`: those that share a row with another."""
    sharing = first_alike(class_CE).bincount()
    alike = int(sharing[sharing > 1].sum())
    return {"n": num_images, "classes": len(class_CE)} | ({"alike_classes": alike} if alike else {})


def answers(
    model: Model,
    labelled: LabelledSet,
    *,
    batch_size: int = 64,
    workers: int = 0,
    left_out: LeftOut | None = None,
) -> Answers:
    """Of every image that can be read; `left_out` counts the others, and what opening the set left out.

    Raises ValueError for a model without a text tower, and where no image can be read.
    """
    if left_out is not None:
        left_out.opened(labelled.source, labelled.name)
    class_CE = classifier(model, labelled.class_names, labelled.templates)
    items = {index: (str(index),) for index in range(len(labelled.source))}
    reading = {"batch_size": batch_size, "workers": workers, "left_out": left_out, "name": labelled.name}
    names, image_IE = embed_images(model, labelled.source, items, **reading)
    item_I = torch.tensor([int(own[0]) for own in names])
    label_I = torch.tensor(labelled.labels)[item_I]
    rank_I = class_ranks(image_IE, class_CE, label_I)
    predicted_I, confidence_I = _predicted(image_IE, class_CE, label_I, torch.as_tensor(model.scale).item())
    is_class_IC = None if labelled.label_sets is None else _flags(labelled.label_sets, len(class_CE))[item_I]
    return Answers(item_I, image_IE, class_CE, label_I, predicted_I, rank_I, confidence_I, is_class_IC)


def _predicted(image_IE: Tensor, class_CE: Tensor, label_I: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The most similar class, of equal ones the first, and its probability."""
    predicted, confidence = [], []
    for similarity_RC, _ in _tiles(image_IE, class_CE, label_I):
        predicted.append(similarity_RC.argmax(-1))
        confidence.append((scale * similarity_RC).softmax(-1).gather(1, predicted[-1][:, None])[:, 0])
    return torch.cat(predicted), torch.cat(confidence)


def _flags(label_sets: Sequence[Sequence[int]], num_classes: int) -> Tensor:
    flag_IC = torch.zeros(len(label_sets), num_classes, dtype=torch.bool)
    for row, numbers in enumerate(label_sets):
        flag_IC[row, list(numbers)] = True
    return flag_IC


def answer_scores(answers: Answers, metric: str = "accuracy") -> dict[str, float]:
    """Shares in [0, 1] with intervals; `n` images and the numbers of `classes` and, if any, of `alike_classes`.

    Raises ValueError for a metric that the answers do not allow: see the head of this file.
    """
    counts = _counts(len(answers.label_I), answers.class_CE)
    if answers.is_class_IC is not None:
        return _precision_scores(answers.image_IE, answers.class_CE, answers.is_class_IC) | counts
    right_I = answers.rank_I == 1
    scores = _top_scores(answers.rank_I, len(answers.class_CE))
    scores |= interval(right_I, answers.label_I).scores("mean_per_class")
    if metric == "mean_top1_top5":
        if "top5" not in scores:
            raise ValueError(f"zero-shot: mean_top1_top5 wants at least 5 classes, got {len(answers.class_CE)}")
        scores |= interval((right_I.double() + (answers.rank_I <= 5)) / 2).scores(metric)
    if metric == "roc_auc":
        image_IE, class_CE, label_I = answers.image_IE, answers.class_CE, answers.label_I
        (found,) = bootstrap(
            lambda drawn: [roc_auc(image_IE[drawn], class_CE, label_I[drawn]) if _has_both(label_I[drawn]) else nan],
            _checked_two(class_CE, label_I),
        )
        scores |= found.scores(metric)
    if SCORE_OF_METRIC[metric] not in scores:
        raise ValueError(f"zero-shot: {metric} wants images with several classes, got one each")
    return scores | counts


def _top_scores(rank_I: Tensor, num_classes: int) -> dict[str, float]:
    """top1, and top5 of at least 5 classes, with intervals."""
    scores = interval(rank_I <= 1).scores("top1")
    return scores | (interval(rank_I <= 5).scores("top5") if num_classes >= 5 else {})


def roc_auc(image_IE: Tensor, class_CE: Tensor, label_I: Tensor) -> float:
    """Of all pairs of an image of class 1 and one of class 0, the share in which the first is more like class 1.

    Ties count half. Raises ValueError unless there are two classes with images of both.
    """
    _checked_two(class_CE, label_I)
    margin_I = image_IE.double() @ (class_CE[1] - class_CE[0]).double()
    first, second = margin_I[label_I == 0].sort().values, margin_I[label_I == 1]
    below, upto = torch.searchsorted(first, second), torch.searchsorted(first, second, right=True)
    return ((below + upto).double().mean() / (2 * len(first))).item()


def _checked_two(class_CE: Tensor, label_I: Tensor) -> int:
    """The number of images."""
    if len(class_CE) != 2 or not _has_both(label_I):
        raise ValueError(f"zero-shot: roc_auc wants images of 2 classes, got {len(class_CE)} classes")
    return len(label_I)


def _has_both(label_I: Tensor) -> bool:
    return set(label_I.tolist()) == {0, 1}


def _precision_scores(image_IE: Tensor, class_CE: Tensor, is_class_IC: Tensor) -> dict[str, float]:
    similarity_IC = image_IE.double() @ class_CE.double().T

    def means(drawn_I: Tensor) -> Sequence[float]:
        """Over the classes that occur."""
        similar_IC, own_IC = similarity_IC[drawn_I], is_class_IC[drawn_I]
        classes = own_IC.any(0).nonzero()[:, 0].tolist()
        curves = [average_precision(similar_IC[:, number], own_IC[:, number]) for number in classes]
        return torch.tensor(curves, dtype=torch.float64).mean(0).tolist() if curves else (nan, nan)

    exact, interpolated = bootstrap(means, len(image_IE), resamples=PRECISION_RESAMPLES)
    return exact.scores("map") | interpolated.scores("map_11point")


def average_precision(similarity_I: Tensor, is_class_I: Tensor) -> tuple[float, float]:
    """Exact: the mean of the precision at each image of the class; and with 11 points. Ties count against the model."""
    order_I = torch.argsort(is_class_I.int(), stable=True)
    order_I = order_I[similarity_I[order_I].argsort(descending=True, stable=True)]
    is_class_I = is_class_I[order_I]
    found_I = is_class_I.double().cumsum(0)
    precision_I = found_I / torch.arange(1, len(order_I) + 1)
    best_from_I = precision_I.flip(0).cummax(0).values.flip(0)  # the best precision at this recall or a higher one
    first_with_recall = torch.searchsorted(found_I / found_I[-1], RECALLS - 1e-12)
    return precision_I[is_class_I].mean().item(), best_from_I[first_with_recall].mean().item()
