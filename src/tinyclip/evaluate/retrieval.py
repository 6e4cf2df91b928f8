"""Image-text retrieval: does a picture find its captions, and a caption its picture, among all others?

recall@k is the fraction in [0, 1] of queries whose own item is among the k most similar; the median rank is that of the
own items, from 1. A picture may have several captions: it counts as found by the best-ranked one, and its own captions
do not compete. Ties count against the model. Intervals draw pictures, each with all its captions.

Shape legend: I images, T texts, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import Source
from tinyclip.evaluate.confidence import Difference, median_interval, ratio_interval
from tinyclip.evaluate.embed import Model, embed_images, embed_texts, own_ranks, texts_of

KS = (1, 5, 10)


class Ranks(NamedTuple):
    """The rank, from 1, of what belongs to each query: of the best own text, and of the own image."""

    image_to_text_I: Tensor
    text_to_image_T: Tensor
    image_of_text_T: Tensor


def ranks(image_IE: Tensor, text_TE: Tensor, image_of_text_T: Tensor) -> Ranks:
    """Ranks of unit embeddings; `image_of_text_T` is the row of each text's image.

    Works in tiles: no I x T matrix is kept. Raises ValueError for embeddings that are not finite, and for an image
    without a text.
    """
    image_I = torch.arange(len(image_IE), device=image_IE.device)
    missing = sorted(set(image_I.tolist()) ^ set(image_of_text_T.tolist()))
    if missing:
        raise ValueError(f"expected texts for each of images 0 to {len(image_IE) - 1}, not so for image {missing[0]}")
    return Ranks(
        own_ranks(image_IE, text_TE, image_I, image_of_text_T),
        own_ranks(text_TE, image_IE, image_of_text_T, image_I),
        image_of_text_T,
    )


def recall_at_k(image_IE: Tensor, text_TE: Tensor, image_of_text_T: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """image_to_text_recall@k and text_to_image_recall@k of unit embeddings, for every k <= the number of candidates.

    Takes and raises what `ranks` does.
    """
    found = ranks(image_IE, text_TE, image_of_text_T)
    return {name: hit.double().mean().item() for name, hit, _ in _hits(found, ks)}


def scores_of(found: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recalls and median ranks both ways, each with its interval, and the numbers of `images` and `texts`."""
    num_images, num_texts = map(len, found[:2])
    intervals = {name: ratio_interval(*_by_image(hit, image)) for name, hit, image in _hits(found, ks)} | {
        "image_to_text_median_rank": median_interval(found.image_to_text_I, torch.arange(num_images)),
        "text_to_image_median_rank": median_interval(found.text_to_image_T, found.image_of_text_T),
    }
    scores = {key: value for name, interval in intervals.items() for key, value in interval.scores(name).items()}
    return scores | {"images": num_images, "texts": num_texts}


def recall_differences(ours: Ranks, theirs: Ranks, ks: Sequence[int] = KS) -> dict[str, Difference]:
    """Recalls of one model less those of another, by the names of `recall_at_k`; both ranked the same pairs.

    Raises ValueError for the ranks of other pairs.
    """
    if not torch.equal(ours.image_of_text_T, theirs.image_of_text_T):
        raise ValueError("expected two models' ranks of the same images and texts, got ranks of different ones")
    return {
        name: Difference(*ratio_interval(*_by_image(hit.double() - their_hit.double(), image)))
        for (name, hit, image), (_, their_hit, _) in zip(_hits(ours, ks), _hits(theirs, ks), strict=True)
    }


def retrieval_ranks(
    model: Model, source: Source, *, batch_size: int = 64, workers: int = 0, left_out: LeftOut | None = None
) -> Ranks:
    """`ranks` over a source.

    Items whose image or captions cannot be read, or that have no caption, are left out, and counted in `left_out`.
    Raises ValueError where none is left.
    """
    captions = texts_of(source, source.captions, "captions", left_out)
    reading = {"batch_size": batch_size, "workers": workers, "left_out": left_out}
    texts, image_IE = embed_images(model, source, captions, **reading)
    image_of_text_T = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in texts]))
    return ranks(image_IE, embed_texts(model, [text for own in texts for text in own]), image_of_text_T)


def retrieval(
    model: Model, source: Source, *, batch_size: int = 64, workers: int = 0, left_out: LeftOut | None = None
) -> dict[str, float]:
    """`scores_of` the `retrieval_ranks` of a source; raises what that raises."""
    return scores_of(retrieval_ranks(model, source, batch_size=batch_size, workers=workers, left_out=left_out))


def _hits(found: Ranks, ks: Sequence[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, whether each query found its own, and each query's image, for every k <= the number of candidates."""
    image_I = torch.arange(len(found.image_to_text_I), device=found.image_to_text_I.device)
    for way, rank, image, num_candidates in (
        ("image_to_text", found.image_to_text_I, image_I, len(found.text_to_image_T)),
        ("text_to_image", found.text_to_image_T, found.image_of_text_T, len(image_I)),
    ):
        for k in ks:
            if k <= num_candidates:
                yield f"{way}_recall@{k}", rank <= k, image


def _by_image(value_T: Tensor, image_of_text_T: Tensor) -> tuple[Tensor, Tensor]:
    """Of every image, the sum over its texts (or itself), and how many there are."""
    sum_I = torch.zeros(int(image_of_text_T.max()) + 1, dtype=torch.float64, device=value_T.device)
    return sum_I.index_add(0, image_of_text_T, value_T.double()), image_of_text_T.bincount()
