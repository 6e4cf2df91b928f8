"""Streaming top-k is the dense one, whatever the tiles and however the candidates come, ties in order."""

import pytest
import torch

from tinyclip.evaluate import embed, top_k
from tinyclip.evaluate.embed import own_ranks


def random(count, seed, dim=5):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_top_k_by_eye():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[0.5, 0.1], [0.9, 0.2], [0.5, 0.3], [0.1, 0.3]])
    similarity, index = top_k(query, candidates, 3)
    assert index.tolist() == [[1, 0, 2], [2, 3, 1]]  # of equal ones the first
    torch.testing.assert_close(similarity.float(), torch.tensor([[0.9, 0.5, 0.5], [0.3, 0.3, 0.2]]))


@pytest.mark.parametrize("candidates_per_chunk", [1, 7, 30, 1000])
@pytest.mark.parametrize("queries_per_chunk", [1, 8, 1000])
@pytest.mark.parametrize("k", [1, 6, 64, 100])
def test_tiles_give_the_dense_top_k(monkeypatch, queries_per_chunk, candidates_per_chunk, k):
    monkeypatch.setattr(embed, "QUERIES_PER_CHUNK", queries_per_chunk)
    monkeypatch.setattr(embed, "CANDIDATES_PER_CHUNK", candidates_per_chunk)
    query, candidates = random(17, 0), random(64, 1)
    dense = (query.double() @ candidates.double().T).sort(dim=-1, descending=True, stable=True)
    for given in (candidates, candidates.split([20, 1, 43]), iter(candidates.split(9))):
        similarity, index = top_k(query, given, k)
        assert torch.equal(index, dense.indices[:, :k])
        torch.testing.assert_close(similarity, dense.values[:, :k])


@pytest.mark.parametrize("candidates_per_chunk", [4, 13, 1000])
def test_equal_candidates_keep_their_order(monkeypatch, candidates_per_chunk):
    monkeypatch.setattr(embed, "CANDIDATES_PER_CHUNK", candidates_per_chunk)
    whole = torch.randint(
        -1, 2, (40, 3), generator=torch.Generator().manual_seed(0)
    ).float()  # exact products, many ties
    dense = (whole @ whole.T).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_k(whole, whole, 7)[1], dense[:, :7])


@pytest.mark.parametrize("candidates_per_chunk", [5, 16, 1000])
def test_ranks_in_tiles_are_the_dense_ones_where_own_candidates_lie_anywhere(monkeypatch, candidates_per_chunk):
    monkeypatch.setattr(embed, "CANDIDATES_PER_CHUNK", candidates_per_chunk)
    query, candidates = random(20, 0), random(60, 1)
    group_C = torch.randint(20, (60,), generator=torch.Generator().manual_seed(2))
    similarity = query.double() @ candidates.double().T
    for row, rank in enumerate(own_ranks(query, candidates, torch.arange(20), group_C).tolist()):
        own = group_C == row
        best = similarity[row][own].max() if own.any() else -torch.inf
        assert rank == 1 + (similarity[row][~own] >= best).sum()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(2, 3), torch.ones(4, 3), 0), "expected k of at least 1, got 0"),
        ((torch.ones(2, 3), [], 1), "expected candidates, got none"),
        ((torch.ones(2, 3), [torch.ones(4, 3), torch.full((1, 3), torch.nan)], 1), "finite embeddings, got 1 of 1"),
        ((torch.full((2, 3), torch.inf), torch.ones(4, 3), 1), "finite embeddings, got 2 of 2"),
    ],
)
def test_what_has_no_top_k_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_k(*arguments)
