"""The order is a function of (seed, epoch, position): an epoch visits all once, and any place can be sought."""

from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinyclip.data.order import Windows, epoch_order, permuted, visits

SIZES = [5, 1, 0, 7, 3, 4, 6]


def test_what_lies_on_a_disk_is_visited_in_one_permutation():
    generator = torch.Generator().manual_seed(Random("3/1").getrandbits(63))
    expected = torch.randperm(20, generator=generator)
    assert torch.equal(epoch_order(20, 3, 1), expected)
    assert permuted(20, 3, 1, 4, 9) == [(index, 1) for index in expected[4:9].tolist()]
    assert permuted(20, 3, 0, 0, 20) != permuted(20, 3, 2, 0, 20) and len(permuted(20, 3, 1, 15, 40)) == 5


@pytest.mark.parametrize("per_window", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("sizes", [SIZES, [4], [0, 0, 3]])
def test_windows_visit_every_item_once_and_slices_agree(sizes, per_window):
    windows, count = Windows(sizes, per_window, seed=1, epoch=2), sum(sizes)
    whole = windows.visits(0, count)
    assert sorted(whole) == [(index, 2) for index in range(count)]
    for start in range(count):
        for stop in range(start + 1, count + 1):
            assert windows.visits(start, stop) == whole[start:stop]


def test_items_stay_in_the_window_of_their_group():
    windows = Windows([10] * 6, 2, seed=0, epoch=0)
    groups = [index // 10 for index, _ in windows.visits(0, 60)]
    by_window = [groups[start : start + 20] for start in (0, 20, 40)]
    assert [set(own) for own in by_window] == [set(windows.groups[start : start + 2].tolist()) for start in (0, 2, 4)]
    assert all(own != sorted(own) and own != sorted(own, reverse=True) for own in by_window)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [Windows(SIZES, 2, seed, epoch).visits(0, 26) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(index for index, _ in order) for order in orders}) == 4


def test_the_groups_that_are_needed_now_and_next_are_asked_for():
    asked = []
    source = SimpleNamespace(groups=np.arange(0, 61, 10), window=2, expect=asked.append)
    whole = [item for start in range(0, 60, 15) for item in visits(source, 0, 0, start, start + 15)]
    groups = Windows([10] * 6, 2, 0, 0).groups.tolist()
    assert sorted(whole) == [(index, 0) for index in range(60)]
    assert asked == [groups[:4], groups, groups[2:], groups[4:]]
