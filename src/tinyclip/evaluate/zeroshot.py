"""Zero-shot classification: the class whose description is most similar to the picture.

A class is described by every synonym in every template; the mean of these unit vectors, renormalised, is its
row of the classifier (Radford et al. 2021, section 3.1.4). Ties count against the model.

`answers` keeps what the model said of each image; `answer_scores` makes scores of it:

    top1, top5          share of images whose class is the most similar, among the five most similar
    mean_per_class      mean over the classes that occur of their share of right answers
    roc_auc             of two classes: the chance that an image of the second is more like it than one of the first
    map, map_11point    where images have several classes: mean over classes of the average precision, exact and
                        interpolated at recalls 0, 0.1 ... 1 (Everingham et al., "The PASCAL VOC Challenge", 2010)

Shape legend: I images, C classes, T texts, R images in a chunk, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyclip.data.sources import Source
from tinyclip.evaluate.confidence import bootstrap, interval
from tinyclip.evaluate.embed import (
    QUERIES_PER_CHUNK,
    Model,
    embed_images,
    embed_texts,
    own_ranks,
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


class Answers(NamedTuple):
    """What a model said of each image that could be read."""

    item_I: Tensor  # number of the image in the source
    image_IE: Tensor  # unit
    class_CE: Tensor  # unit
    label_I: Tensor
    predicted_I: Tensor  # never the right class where another one is as similar
    rank_I: Tensor  # of the right class, from 1
    confidence_I: Tensor  # softmax probability of the predicted class at the model's scale
    is_class_IC: Tensor | None = None  # bool, where images have several classes: label_I is then one of them


def classifier(model: Model, class_names: Sequence[str | Sequence[str]], templates: Sequence[str]) -> Tensor:
    """Unit vectors [C, E], one for each class given by its name or as its synonyms.

    Raises ValueError for a model without a text tower, fewer than two classes, a class without a name, no template, or
    a template without {}.
    """
    if not callable(getattr(model, "encode_text", None)):
        raise ValueError("zero-shot: expected a model with a text tower, got one without")
    if len(class_names) < 2 or not all(class_names):
        raise ValueError(f"zero-shot: expected at least 2 classes with a name each, got {list(class_names)}")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f'zero-shot: expected templates like "a photo of a {{}}.", got {list(templates)}')
    synonyms = [[names] if isinstance(names, str) else names for names in class_names]
    texts = [template.replace("{}", name) for names in synonyms for name in names for template in templates]
    texts_per_class_C = torch.tensor([len(names) * len(templates) for names in synonyms])
    class_of_text_T = torch.arange(len(synonyms)).repeat_interleave(texts_per_class_C)
    text_TE = embed_texts(model, texts)
    sum_CE = text_TE.new_zeros(len(synonyms), text_TE.shape[1]).index_add_(0, class_of_text_T, text_TE)
    return F.normalize(sum_CE, dim=-1)


def top_k_accuracy(image_IE: Tensor, class_CE: Tensor, label_I: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Fraction in [0, 1] of images whose class is among the k most similar, as top1, top5: for every k <= C.

    Raises ValueError for embeddings that are not finite.
    """
    rank_I = own_ranks(image_IE, class_CE, label_I, torch.arange(len(class_CE), device=class_CE.device))
    return {f"top{k}": share_within(rank_I, k) for k in ks if k <= len(class_CE)}


def zeroshot(
    model: Model,
    source: Source,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> dict[str, float]:
    """top1 and top5 over a labelled source, with intervals, `n` images and its number of `classes`.

    The classes are the labels that occur in the source. Items whose image or label cannot be read, or that have no
    label, are left out. Raises ValueError for a source without labels and for fewer than two classes.
    """
    labels = texts_of(source, source.label, "labels")
    classes = {names: number for number, names in enumerate(sorted(set(labels.values())))}
    class_CE = classifier(model, list(classes), templates)
    names, image_IE = embed_images(model, source, labels, batch_size=batch_size, workers=workers)
    label_I = torch.tensor([classes[own] for own in names])
    rank_I = own_ranks(image_IE, class_CE, label_I, torch.arange(len(class_CE)))
    return _top_scores(rank_I, len(classes)) | {"n": len(image_IE), "classes": len(classes)}


def answers(model: Model, labelled: LabelledSet, *, batch_size: int = 64, workers: int = 0) -> Answers:
    """Raises ValueError for a model without a text tower, and where no image can be read."""
    class_CE = classifier(model, labelled.class_names, labelled.templates)
    items = {index: (str(index),) for index in range(len(labelled.source))}
    names, image_IE = embed_images(model, labelled.source, items, batch_size=batch_size, workers=workers)
    item_I = torch.tensor([int(own[0]) for own in names])
    label_I = torch.tensor(labelled.labels)[item_I]
    rank_I = own_ranks(image_IE, class_CE, label_I, torch.arange(len(class_CE)))
    predicted_I, confidence_I = _predicted(image_IE, class_CE, label_I, rank_I, torch.as_tensor(model.scale).item())
    is_class_IC = None if labelled.label_sets is None else _flags(labelled.label_sets, len(class_CE))[item_I]
    return Answers(item_I, image_IE, class_CE, label_I, predicted_I, rank_I, confidence_I, is_class_IC)


def _predicted(
    image_IE: Tensor, class_CE: Tensor, label_I: Tensor, rank_I: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The most similar class, of equal ones a wrong one, and its probability."""
    predicted, confidence = [], []
    chunks = (part.split(QUERIES_PER_CHUNK) for part in (image_IE, label_I, rank_I))
    for image_RE, label_R, rank_R in zip(*chunks, strict=True):
        similarity_RC = image_RE.double() @ class_CE.double().T
        p_RC = (scale * similarity_RC).softmax(-1)
        is_own_RC = F.one_hot(label_R, len(class_CE)).bool()
        best_R = similarity_RC.masked_fill(is_own_RC & (rank_R > 1)[:, None], -torch.inf).argmax(-1)
        predicted.append(torch.where(rank_R == 1, label_R, best_R))
        confidence.append(p_RC.gather(1, predicted[-1][:, None])[:, 0])
    return torch.cat(predicted), torch.cat(confidence)


def _flags(label_sets: Sequence[Sequence[int]], num_classes: int) -> Tensor:
    flag_IC = torch.zeros(len(label_sets), num_classes, dtype=torch.bool)
    for row, numbers in enumerate(label_sets):
        flag_IC[row, list(numbers)] = True
    return flag_IC


def answer_scores(answers: Answers, metric: str = "accuracy") -> dict[str, float]:
    """Shares in [0, 1] with intervals; `n` images and the number of `classes`.

    Raises ValueError for a metric that the answers do not allow: see the head of this file.
    """
    counts = {"n": len(answers.label_I), "classes": len(answers.class_CE)}
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
