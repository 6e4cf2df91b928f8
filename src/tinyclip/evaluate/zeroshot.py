"""Zero-shot classification: the class whose description is most similar to the picture.

A class is described by every synonym in every template; the mean of these unit vectors, renormalised, is its
row of the classifier (Radford et al. 2021, section 3.1.4). Ties count against the model.

Shape legend: I images, C classes, T texts, E embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyclip.data.sources import Source
from tinyclip.evaluate.embed import Model, embed_images, embed_texts, own_ranks, share_within, texts_of

DEFAULT_TEMPLATES = (
    "{}.",
    "a {}.",
    "a photo of a {}.",
    "a picture of a {}.",
    "a photo of the {}.",
    "a close-up of a {}.",
    "a drawing of a {}.",
)


def classifier(model: Model, class_names: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
    """Unit vectors [C, E], one for each class given as its synonyms.

    Raises ValueError for fewer than two classes, a class without a name, no template, or a template without {}.
    """
    if len(class_names) < 2 or not all(class_names):
        raise ValueError(f"zero-shot: expected at least 2 classes with a name each, got {list(class_names)}")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f'zero-shot: expected templates like "a photo of a {{}}.", got {list(templates)}')
    texts = [template.replace("{}", name) for names in class_names for name in names for template in templates]
    texts_per_class_C = torch.tensor([len(names) * len(templates) for names in class_names])
    class_of_text_T = torch.arange(len(class_names)).repeat_interleave(texts_per_class_C)
    text_TE = embed_texts(model, texts)
    sum_CE = text_TE.new_zeros(len(class_names), text_TE.shape[1]).index_add_(0, class_of_text_T, text_TE)
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
    """top1 and top5 over a labelled source, with `n` images and its number of `classes`.

    The classes are the labels that occur in the source. Items whose image or label cannot be read, or that have no
    label, are left out. Raises ValueError for a source without labels and for fewer than two classes.
    """
    labels = texts_of(source, source.label, "labels")
    classes = {names: number for number, names in enumerate(sorted(set(labels.values())))}
    class_CE = classifier(model, list(classes), templates)
    names, image_IE = embed_images(model, source, labels, batch_size=batch_size, workers=workers)
    label_I = torch.tensor([classes[own] for own in names])
    return top_k_accuracy(image_IE, class_CE, label_I) | {"n": len(image_IE), "classes": len(classes)}
