"""Intervals are the textbook's where there is one, pairs and groups are drawn together, and equal models are equal."""

import numpy as np
import pytest
import torch

from tinyclip.evaluate import Difference, interval, paired_difference, with_interval
from tinyclip.evaluate.confidence import bootstrap, median_interval, ratio_interval, resampled_sums


def answers(count, share, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share


def test_of_yes_or_no_it_is_the_binomial_interval():
    right = answers(2000, 0.7)
    found, p = interval(right, resamples=4000), right.double().mean().item()
    half = 1.96 * (p * (1 - p) / 2000) ** 0.5
    assert found.value == p and found.n == 2000
    assert found.low == pytest.approx(p - half, abs=0.1 * half)
    assert found.high == pytest.approx(p + half, abs=0.1 * half)


def test_of_real_values_it_is_the_normal_interval_of_the_mean():
    value_N = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found, error = interval(value_N, resamples=4000), value_N.double().std().item() / 1000**0.5
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_at_95_percent_about_95_of_100_intervals_hold_the_truth():
    held = [low <= 0.6 <= high for _, low, high, _ in (interval(answers(300, 0.6, seed)) for seed in range(200))]
    assert 0.90 <= np.mean(held) <= 0.99


def test_counting_repeats_and_drawing_rows_sample_the_same(monkeypatch):
    table_N1 = answers(500, 0.3).double().numpy()[:, None]
    counted = resampled_sums(table_N1, 4000, np.random.default_rng(0))
    monkeypatch.setattr("tinyclip.evaluate.confidence.MIN_REPEATS", 1e9)
    drawn = resampled_sums(table_N1, 4000, np.random.default_rng(0))
    assert counted.mean() == pytest.approx(drawn.mean(), abs=1) and counted.std() == pytest.approx(drawn.std(), rel=0.1)


def test_one_seed_one_interval():
    right = answers(100, 0.5)
    assert interval(right) == interval(right) and interval(right, seed=1) != interval(right)
    assert interval(right, level=0.5).low > interval(right).low


def test_with_groups_it_is_the_mean_of_class_means_drawn_within_each_class():
    # Class 7 is always right, class 3 never: which of their items are drawn changes nothing.
    right, label = torch.tensor([1, 1, 1, 0, 1, 1]), torch.tensor([7, 7, 7, 3, 7, 7])
    assert interval(right, label) == (0.5, 0.5, 0.5, 6)
    assert interval(right) == (5 / 6, 0.5, 1.0, 6)


def test_the_interval_of_a_difference_is_that_of_the_same_items():
    theirs = answers(1000, 0.6)
    ours = theirs.clone()
    ours[:40] = True  # better on a few, the same on all others
    found = paired_difference(ours, theirs)
    assert found.value == pytest.approx((ours.sum() - theirs.sum()).item() / 1000) and found.n == 1000
    assert found.different and found.low > 0
    assert interval(ours).low < interval(theirs).high  # which the two intervals on their own do not show


def test_not_different_is_said_when_it_is_not():
    right = answers(200, 0.6)
    assert paired_difference(right, right) == (0, 0, 0, 200) and not paired_difference(right, right).different
    assert str(Difference(0.012, -0.004, 0.028, 500)) == "not different: +1.2 points [-0.4, +2.8]"
    assert str(Difference(-0.05, -0.07, -0.03, 500)) == "-5.0 points [-7.0, -3.0]"


def test_members_of_an_item_are_drawn_together():
    """Five copies of an answer hold no more than one: the interval stays as wide."""
    right = answers(400, 0.5)
    alone, copied = interval(right), ratio_interval(5 * right, torch.full((400,), 5))
    assert copied == pytest.approx(alone, abs=0.01)
    as_if_independent = interval(right.repeat(5))
    assert as_if_independent.high - as_if_independent.low < 0.6 * (copied.high - copied.low)


def test_a_ratio_by_eye():
    assert ratio_interval(torch.tensor([2, 0]), torch.tensor([3, 1])) == (0.5, 0.0, pytest.approx(2 / 3), 2)


def test_a_median_by_eye():
    rank, image = torch.tensor([9, 1, 4, 4, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    found = median_interval(rank, image, resamples=4000)
    assert found == (3.0, 2.0, 5.0, 3)  # 1 2 2 4 4 9; image 0 three times: 5; image 2 at least twice: 2


def test_of_median_draws_each_is_the_median_of_its_members():
    rng = np.random.default_rng(0)
    value_M, item_M = torch.from_numpy(rng.integers(1, 50, 60)), torch.arange(60) // 3
    draws = [
        np.median(np.concatenate([value_M[item_M == i].numpy() for i in rng.integers(20, size=20)]))
        for _ in range(4000)
    ]
    found = median_interval(value_M, item_M, resamples=4000)
    assert found.value == np.median(value_M.numpy())
    assert found[1:3] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1)


def test_a_table_shows_a_score_and_its_interval_in_one_cell():
    scores = {"top1": 0.45, "top1_low": 0.412, "top1_high": 0.4891, "n": 1200, "odd_low": 0.5, "probe_C": 0.001}
    scores |= {"median_rank": 3.0, "median_rank_low": 2.0, "median_rank_high": 4.5}
    assert with_interval(scores) == [
        ("top1", "45.0% [41.2, 48.9]"),
        ("n", "1,200"),
        ("odd_low", "50.0%"),
        ("probe_C", "0.001"),
        ("median_rank", "3 [2, 4.5]"),
    ]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: interval(torch.tensor([])), "values of at least one item, got none"),
        (lambda: interval(torch.tensor([0.5, torch.nan])), "finite values, got 1 that are not"),
        (lambda: interval(torch.ones(3), torch.ones(2)), "a group for each of 3 values, got 2"),
        (lambda: interval(torch.ones(3), level=95), "level 95: expected a share"),
        (lambda: paired_difference(torch.ones(3), torch.ones(2)), "values of the same items"),
        (lambda: ratio_interval(torch.ones(2), torch.tensor([1, 0])), "at least one member of each item"),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_bootstrap_of_any_score_is_that_of_the_mean_where_the_score_is_a_mean():
    value_N = torch.arange(50, dtype=torch.float64)
    (ours,) = bootstrap(lambda drawn: [value_N[drawn].mean().item()], 50)
    expected = interval(value_N)
    assert ours.value == expected.value and ours.n == 50
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), rel=0.03)
    (some,) = bootstrap(lambda drawn: [1.0 if (drawn == 0).any() else float("nan")], 3)
    assert some == (1.0, 1.0, 1.0, 3)  # draws without item 0 have no score
