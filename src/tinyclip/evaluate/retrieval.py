"""Image-text retrieval: does a picture find its captions, and a caption its picture, among all others?

recall@k is the fraction in [0, 1] of queries whose own item is among the k most similar. A picture may have
several captions: it counts as found by the best-ranked one, and its own captions do not compete. Ties count
against the model.

Shape legend: I images, T texts, E embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyclip.data.sources import Source
from tinyclip.evaluate.embed import Model, embed_images, embed_texts, own_ranks, share_within, texts_of


def recall_at_k(
    image_IE: Tensor, text_TE: Tensor, image_of_text_T: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """image_to_text_recall@k and text_to_image_recall@k of unit embeddings, for every k <= the number of candidates.

    `image_of_text_T` is the row of each text's image. Works in chunks of queries: no I x T matrix is kept.
    Raises ValueError for embeddings that are not finite, and for an image without a text.
    """
    image_I = torch.arange(len(image_IE), device=image_IE.device)
    missing = sorted(set(image_I.tolist()) ^ set(image_of_text_T.tolist()))
    if missing:
        raise ValueError(f"expected texts for each of images 0 to {len(image_IE) - 1}, not so for image {missing[0]}")
    image_to_text_I = own_ranks(image_IE, text_TE, image_I, image_of_text_T)
    text_to_image_T = own_ranks(text_TE, image_IE, image_of_text_T, image_I)
    return {f"image_to_text_recall@{k}": share_within(image_to_text_I, k) for k in ks if k <= len(text_TE)} | {
        f"text_to_image_recall@{k}": share_within(text_to_image_T, k) for k in ks if k <= len(image_IE)
    }


def retrieval(model: Model, source: Source, *, batch_size: int = 64, workers: int = 0) -> dict[str, float]:
    """`recall_at_k` over a source, and its numbers of `images` and `texts`.

    Items whose image or captions cannot be read, or that have no caption, are left out. Raises ValueError where none
    is left.
    """
    captions = texts_of(source, source.captions, "captions")
    texts, image_IE = embed_images(model, source, captions, batch_size=batch_size, workers=workers)
    image_of_text_T = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in texts]))
    text_TE = embed_texts(model, [text for own in texts for text in own])
    return recall_at_k(image_IE, text_TE, image_of_text_T) | {"images": len(image_IE), "texts": len(text_TE)}
