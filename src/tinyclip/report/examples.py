"""Retrieval examples: the same query to teacher and student, side by side, and in how many queries they agree.

Shape legend: I images, T texts, Q queries, C candidates, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import Source
from tinyclip.data.thumbnail import thumbnail
from tinyclip.device import pick_device
from tinyclip.distill.teacher import load_teacher
from tinyclip.evaluate.embed import Model, embed_images, embed_texts, own_ranks, texts_of
from tinyclip.formats import checkpoint
from tinyclip.report.read import Run

TOP = 5
WANTED = {"text": {"lost": 2, "gained": 1, "kept": 1}, "image": {"lost": 1, "kept": 1}}  # six queries


class Answer(NamedTuple):
    """A picture (data URI) for a text, or a text for a picture; `own` is right."""

    text: str
    own: bool
    picture: str | None = None


class Example(NamedTuple):
    kind: str  # lost, gained or kept
    query: Answer
    teacher: list[Answer]
    student: list[Answer]
    teacher_rank: int
    student_rank: int


class Agreement(NamedTuple):
    """In how many queries the right answer comes first for whom."""

    direction: str
    queries: int
    both: int
    teacher_only: int
    student_only: int
    neither: int


class Examples(NamedTuple):
    data: str
    items: list[Example]
    agreements: list[Agreement]


class Pairs(NamedTuple):
    """What both models read: the images by index in the source, the texts, and the row of each text's image."""

    source: Source
    indices: list[int]
    texts: list[str]
    image_of_text_T: Tensor


class Embedded(NamedTuple):
    image_IE: Tensor
    text_TE: Tensor


def examples(run: Run, source: Source, *, say: Callable[[str], None], allow_remote: bool = False) -> Examples:
    """Six queries, chosen by the difference of ranks. Raises ValueError without a teacher or a student."""
    if run.student is None:
        raise ValueError(f"{run.path}: examples need a student, no stage is complete")
    if not isinstance(run.recipe.get("teacher"), str):
        raise ValueError(f"{run.path}: examples need a teacher, the recipe has none")
    left_out = LeftOut(say)
    captions = texts_of(source, source.captions, "captions", left_out)
    say(f"examples: teacher and student read {len(captions)} images")
    device = pick_device()
    student = checkpoint.load(run.path / run.complete[-1].name, device=device)
    pairs, mine = embed(student, source, captions, left_out)
    _, theirs = embed(load_teacher(run.recipe["teacher"], allow_remote=allow_remote).to(device), source, captions)
    return of_embeddings(pairs, theirs, mine)


def embed(
    model: Model, source: Source, captions: dict[int, tuple[str, ...]], left_out: LeftOut | None = None
) -> tuple[Pairs, Embedded]:
    items = {index: (str(index),) for index in captions}
    names, image_IE = embed_images(model, source, items, batch_size=64, workers=0, left_out=left_out)
    indices = [int(name) for (name,) in names]
    texts = [text for index in indices for text in captions[index]]
    image_of_text_T = torch.arange(len(indices)).repeat_interleave(
        torch.tensor([len(captions[index]) for index in indices])
    )
    return Pairs(source, indices, texts, image_of_text_T), Embedded(
        image_IE.double(), embed_texts(model, texts).double()
    )


def of_embeddings(pairs: Pairs, teacher: Embedded, student: Embedded) -> Examples:
    """Both directions: texts that look for images, images that look for texts."""
    image_I = torch.arange(len(pairs.indices))
    items, agreements, used = [], [], set()
    for side, group_Q, group_C in (("text", pairs.image_of_text_T, image_I), ("image", image_I, pairs.image_of_text_T)):

        def sides(model: Embedded, side: str = side) -> tuple[Tensor, Tensor]:
            return (model.text_TE, model.image_IE) if side == "text" else (model.image_IE, model.text_TE)

        teacher_Q, student_Q = (own_ranks(*sides(model), group_Q, group_C) for model in (teacher, student))
        agreements.append(agreement(side, teacher_Q, student_Q))
        for kind, query in choose(teacher_Q, student_Q, group_Q, WANTED[side], used):
            group = int(group_Q[query])
            theirs, mine = (
                [_answer(pairs, side, c, int(group_C[c]) == group) for c in first(*sides(model), query)]
                for model in (teacher, student)
            )
            question = _answer(pairs, "image" if side == "text" else "text", query, False)
            items.append(Example(kind, question, theirs, mine, int(teacher_Q[query]), int(student_Q[query])))
    return Examples(pairs.source.name, items, agreements)


def agreement(side: str, teacher_Q: Tensor, student_Q: Tensor) -> Agreement:
    t, s = teacher_Q == 1, student_Q == 1
    counts = [int(found.sum()) for found in (t & s, t & ~s, ~t & s, ~t & ~s)]
    return Agreement("text to image" if side == "text" else "image to text", len(teacher_Q), *counts)


def choose(
    teacher_Q: Tensor, student_Q: Tensor, group_Q: Tensor, wanted: dict[str, int], used: set[int]
) -> list[tuple[str, int]]:
    """(kind, query): the largest losses and gains of rank where the other model is right, and the middle one of those
    where both are. An image is used once; `used` holds the images so far, and grows.
    """
    difference_Q = student_Q - teacher_Q
    of_kind = {
        "lost": ((teacher_Q == 1) & (student_Q > 1), -difference_Q),
        "gained": ((student_Q == 1) & (teacher_Q > 1), difference_Q),
        "kept": ((teacher_Q == 1) & (student_Q == 1), difference_Q),
    }
    chosen = []
    for kind, count in wanted.items():
        possible_Q, order_Q = of_kind[kind]
        queries = possible_Q.nonzero().flatten()
        queries = queries[order_Q[queries].argsort(stable=True)].tolist()
        queries = queries[len(queries) // 2 :] if kind == "kept" else queries
        for query in queries:
            if count and int(group_Q[query]) not in used:
                used.add(int(group_Q[query]))
                chosen.append((kind, query))
                count -= 1
    return chosen


def first(query_QE: Tensor, candidate_CE: Tensor, query: int) -> list[int]:
    """The TOP most similar candidates, the earlier one first where they are equal."""
    similarity_C = candidate_CE @ query_QE[query]
    return similarity_C.argsort(descending=True, stable=True)[:TOP].tolist()


def _answer(pairs: Pairs, side: str, item: int, own: bool) -> Answer:
    """Of a text query the answers are images, described by their first caption; of an image query they are texts."""
    if side == "image":
        return Answer(pairs.texts[item], own)
    captions = [pairs.texts[t] for t in (pairs.image_of_text_T == item).nonzero().flatten().tolist()]
    return Answer(_short(captions), own, thumbnail(pairs.source, pairs.indices[item]))


def _short(captions: Sequence[str]) -> str:
    text = captions[0]
    return text if len(text) <= 160 else f"{text[:159]}…"
