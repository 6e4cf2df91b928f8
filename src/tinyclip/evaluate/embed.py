"""Pictures and texts -> unit vectors on the CPU, the rank of what belongs to a query, and its most similar candidates.

Every score here is one question: how many wrong candidates are at least as similar as the right one? Ranks and top-k
visit the Q x C similarities in tiles, so a million by a million needs no more memory than a tile and the results.
Similarities are fp64, so no global matmul precision setting can change a score.

Shape legend: I images, T texts, Q queries, C candidates, R queries in a tile, K nearest candidates, E embedding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tinyclip.data.loader import EvalBatches, LeftOut, examples
from tinyclip.data.sources import BadItem, Source
from tinyclip.preprocess import Preprocess

TEXTS_PER_BATCH = 256
QUERIES_PER_CHUNK = 256
NUM_NAMED = 3  # images that cannot be read
CANDIDATES_PER_CHUNK = 32_768  # at most: a tile of 256 x 32,768 in fp64 is 67 MB


class Model(Protocol):
    """What an evaluation asks of a model; `tinyclip.model.CLIP` has it."""

    @property
    def preprocess(self) -> Preprocess | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def scale(self) -> Tensor | float:
        """1 / temperature."""
        ...

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


def texts_of(
    source: Source,
    read: Callable[[int], Sequence[str] | None],
    noun: str,
    left_out: LeftOut | None = None,
    name: str | None = None,
) -> dict[int, tuple[str, ...]]:
    """Captions or labels by item, of the items that have any; the others are counted in `left_out`, the set by `name`.

    Raises ValueError where no item has any.
    """
    texts, broken = {}, []
    for index in range(len(source)):
        try:
            if own := read(index):
                texts[index] = tuple(own)
        except BadItem as error:
            broken.append((source.key(index), str(error)))
    if not texts:
        none = f"none of the {len(source)} items has any"
        raise ValueError(f"{source.name}: expected {noun}, {none}{examples(broken)}")
    if left_out is not None:
        left_out.opened(source, name)
        left_out.add(name or source.name, f"items without {noun}", len(source) - len(texts) - len(broken))
        left_out.add(name or source.name, f"items whose {noun} cannot be read", len(broken), broken)
    return texts


def embed_images(
    model: Model,
    source: Source,
    texts: Mapping[int, tuple[str, ...]],
    *,
    batch_size: int,
    workers: int,
    encode: Callable[[Tensor], Tensor] | None = None,
    left_out: LeftOut | None = None,
    name: str | None = None,
) -> tuple[list[tuple[str, ...]], Tensor]:
    """Of the items in `texts` whose image can be read: the texts, and the images' unit embeddings [I, E].

    With `encode`, what it makes of uint8 pixels [B, 3, S, S] instead. The items of `texts` whose image cannot be read
    are counted in `left_out`, the set by `name`. Raises ValueError where the model has no preprocessing, and where no
    image can be read.
    """
    if model.preprocess is None:
        raise ValueError("expected a model with preprocessing, got one without")
    encode = encode or partial(model.encode_image, normalize=True)
    indices: list[int] = []
    embeddings: list[Tensor] = []
    with evaluating(model):
        batches = EvalBatches(source, model.preprocess, batch_size, workers)
        for batch_indices, pixels in batches:
            indices += batch_indices
            embeddings.append(encode(pixels.to(model.device)).cpu())
    rows = [row for row, index in enumerate(indices) if index in texts]
    unread, why = sorted(texts.keys() - set(indices)), dict(batches.skipped)
    skipped = [(key, why.get(key, "")) for key in map(source.key, unread[:NUM_NAMED])]
    if not rows:
        none = f"none of the {len(texts)} that have a text can be read"
        raise ValueError(f"{source.name}: expected images, {none}{examples(skipped)}")
    if left_out is not None:
        left_out.add(name or source.name, "images that cannot be read", len(unread), skipped)
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
    not compete with each other. Raises ValueError for embeddings that are not finite.
    """
    check_finite(query_QE)
    check_finite(candidate_CE)
    blocks, groups = _blocks(candidate_CE), _blocks(group_C)
    if len(blocks) == 1:
        blocks = [blocks[0].double()]
    chunks = zip(query_QE.split(QUERIES_PER_CHUNK), group_Q.split(QUERIES_PER_CHUNK), strict=True)
    return torch.cat([_own_ranks(query_RE.double(), blocks, group_R[:, None], groups) for query_RE, group_R in chunks])


def _own_ranks(query_RE: Tensor, blocks: Sequence[Tensor], group_R1: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Two passes over the candidates: the best own one, then how many others are as similar.

    The first pass only multiplies blocks with an own candidate, so data in order costs one block more than one pass.
    """

    @lru_cache(maxsize=1)
    def similarity(block: int) -> Tensor:
        return query_RE @ blocks[block].double().T

    best_R1 = torch.full_like(query_RE[:, :1], -torch.inf)
    for block, group in enumerate(groups):
        own = group_R1 == group
        if own.any():
            best_R1 = best_R1.maximum(similarity(block).masked_fill(~own, -torch.inf).amax(-1, keepdim=True))
    rank_R = torch.ones_like(group_R1[:, 0], dtype=torch.int64)
    for block, group in enumerate(groups):
        rank_R += ((similarity(block) >= best_R1) & (group_R1 != group)).sum(-1)
    return rank_R


def top_k(query_QE: Tensor, candidates: Tensor | Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k most similar candidates of each query, best first: similarities fp64 and row numbers, both [Q, min(k, C)].

    Candidates are [C, E], or come as blocks [c, E] one after the other, each read once. Among equally similar ones
    the first comes first. Raises ValueError for embeddings that are not finite, k < 1 and no candidates.
    """
    if k < 1:
        raise ValueError(f"top_k: expected k of at least 1, got {k}")
    check_finite(query_QE)
    chunks = query_QE.split(QUERIES_PER_CHUNK)
    best = [_Nearest(q.new_empty(len(q), 0, dtype=torch.float64), q.new_empty(len(q), 0).long()) for q in chunks]
    start = 0
    for given in [candidates] if isinstance(candidates, Tensor) else candidates:
        check_finite(given)
        for block in _blocks(given):
            block = block.to(query_QE.device).double()
            for number, query_RE in enumerate(chunks):
                new = _nearest(query_RE.double() @ block.T, k)
                best[number] = _merged(best[number], _Nearest(new.similarity_RK, new.index_RK + start), k)
            start += len(block)
    if not start:
        raise ValueError("top_k: expected candidates, got none")
    return torch.cat([nearest.similarity_RK for nearest in best]), torch.cat([nearest.index_RK for nearest in best])


class _Nearest(NamedTuple):
    similarity_RK: Tensor  # falling; where equal, the index rises
    index_RK: Tensor


def _nearest(similarity_RC: Tensor, k: int) -> _Nearest:
    """torch.topk, which leaves open which of equal candidates it takes: rows with a tie at the edge are sorted."""
    num = similarity_RC.shape[1]
    if k >= num:
        return _Nearest(*similarity_RC.sort(dim=-1, descending=True, stable=True))
    value_RK, index_RK = similarity_RC.topk(k + 1)
    tied_R = value_RK[:, k - 1] == value_RK[:, k]
    index_RK = index_RK[:, :k].sort(dim=-1).values
    if tied_R.any():
        index_RK[tied_R] = similarity_RC[tied_R].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    value_RK, order_RK = similarity_RC.gather(1, index_RK).sort(dim=-1, descending=True, stable=True)
    return _Nearest(value_RK, index_RK.gather(1, order_RK))


def _merged(first: _Nearest, then: _Nearest, k: int) -> _Nearest:
    """The best k of both; of equal ones those of `first`, whose indices are lower."""
    similarity, order = torch.cat([first.similarity_RK, then.similarity_RK], 1).sort(
        dim=-1, descending=True, stable=True
    )
    index = torch.cat([first.index_RK, then.index_RK], 1).gather(1, order)
    return _Nearest(similarity[:, :k], index[:, :k])


def check_finite(embeddings: Tensor) -> None:
    """Raises ValueError for embeddings with NaN or infinity."""
    finite = torch.cat([rows.isfinite().all(-1) for rows in embeddings.split(CANDIDATES_PER_CHUNK)])
    if not finite.all():
        bad = (~finite).nonzero()
        raise ValueError(
            f"expected finite embeddings, got {len(bad)} of {len(embeddings)} with NaN or infinity"
            f" (the first is number {int(bad[0])})"
        )


def _blocks(rows: Tensor) -> Sequence[Tensor]:
    """Nearly equal ones: a last block of a few rows would be multiplied by another kernel, and ties would break."""
    return rows.tensor_split(max(1, math.ceil(len(rows) / CANDIDATES_PER_CHUNK)))


def share_within(rank_Q: Tensor, k: int) -> float:
    """Fraction of queries in [0, 1] whose own candidate is among the first k."""
    return (rank_Q <= k).double().mean().item()
