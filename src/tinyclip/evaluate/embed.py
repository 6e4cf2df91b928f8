"""Pictures and texts -> unit vectors on the CPU, and the rank of what belongs to a query.

Every score here is one question: how many wrong candidates are at least as similar as the right one?

Shape legend: I images, T texts, Q queries, C candidates, R queries in a chunk, E embedding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from tinyclip.data.loader import EvalBatches
from tinyclip.data.sources import BadItem, Source
from tinyclip.preprocess import Preprocess

TEXTS_PER_BATCH = 256
QUERIES_PER_CHUNK = 256  # 256 x 25,000 candidates in fp64 are 51 MB


class Model(Protocol):
    """What an evaluation asks of a model; `tinyclip.model.CLIP` has it."""

    @property
    def preprocess(self) -> Preprocess | None: ...
    @property
    def device(self) -> torch.device: ...
    def encode_image(self, images: Tensor, /, *, normalize: bool) -> Tensor: ...
    def encode_text(self, texts: Sequence[str], /, *, normalize: bool) -> Tensor: ...


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """No gradients, evaluation mode; afterwards every module's mode is what it was."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def texts_of(source: Source, read: Callable[[int], Sequence[str] | None], noun: str) -> dict[int, tuple[str, ...]]:
    """Captions or labels by item, of the items that have any; an item that cannot be read has none.

    Raises ValueError where no item has any.
    """
    texts = {}
    for index in range(len(source)):
        with suppress(BadItem):
            if own := read(index):
                texts[index] = tuple(own)
    if not texts:
        raise ValueError(f"{source.name}: expected {noun}, none of the {len(source)} items has any")
    return texts


def embed_images(
    model: Model, source: Source, texts: Mapping[int, tuple[str, ...]], *, batch_size: int, workers: int
) -> tuple[list[tuple[str, ...]], Tensor]:
    """Of the items in `texts` whose image can be read: the texts, and the images' unit embeddings [I, E].

    Raises ValueError where the model has no preprocessing, and where no image can be read.
    """
    if model.preprocess is None:
        raise ValueError("expected a model with preprocessing, got one without")
    indices: list[int] = []
    embeddings: list[Tensor] = []
    with evaluating(model):
        for batch_indices, pixels in EvalBatches(source, model.preprocess, batch_size, workers):
            indices += batch_indices
            embeddings.append(model.encode_image(pixels.to(model.device), normalize=True).cpu())
    rows = [row for row, index in enumerate(indices) if index in texts]
    if not rows:
        raise ValueError(f"{source.name}: expected images, none of the {len(texts)} that have a text can be read")
    return [texts[indices[row]] for row in rows], torch.cat(embeddings)[rows]


def embed_texts(model: Model, texts: Sequence[str]) -> Tensor:
    """Unit embeddings [T, E]."""
    with evaluating(model):
        return torch.cat(
            [
                model.encode_text(texts[start : start + TEXTS_PER_BATCH], normalize=True).cpu()
                for start in range(0, len(texts), TEXTS_PER_BATCH)
            ]
        )


def own_ranks(query_QE: Tensor, candidate_CE: Tensor, group_Q: Tensor, group_C: Tensor) -> Tensor:
    """Rank [Q], from 1, of each query's most similar own candidate: one of the same group.

    A wrong candidate that is exactly as similar ranks before it: ties count against the model. Own candidates do
    not compete with each other. Similarities are fp64, so no global matmul precision setting can change a score.
    Raises ValueError for embeddings that are not finite.
    """
    query_QE, candidate_CE = query_QE.double(), candidate_CE.double()
    for embeddings in (query_QE, candidate_CE):
        bad = (~embeddings.isfinite().all(-1)).nonzero()
        if len(bad):
            raise ValueError(
                f"expected finite embeddings, got {len(bad)} of {len(embeddings)} with NaN or infinity"
                f" (the first is number {int(bad[0])})"
            )
    ranks = []
    for query_RE, group_R in zip(query_QE.split(QUERIES_PER_CHUNK), group_Q.split(QUERIES_PER_CHUNK), strict=True):
        similarity_RC = query_RE @ candidate_CE.T
        own_RC = group_R[:, None] == group_C
        best_R1 = similarity_RC.masked_fill(~own_RC, -torch.inf).amax(-1, keepdim=True)
        ranks.append(1 + ((similarity_RC >= best_R1) & ~own_RC).sum(-1))
    return torch.cat(ranks)


def share_within(rank_Q: Tensor, k: int) -> float:
    """Fraction of queries in [0, 1] whose own candidate is among the first k."""
    return (rank_Q <= k).double().mean().item()
