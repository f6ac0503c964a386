"""Which datasets tell the donors apart beyond noise."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from olmfast.search.spans import one_sided_p, real_spans


def noisy(means: list[float], n: int, seed: int, noise: float = 1.0) -> torch.Tensor:
    """Scores (donors, n) around these means."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(means)[:, None] + noise * torch.randn(len(means), n, generator=generator).double()


def test_a_difference_far_beyond_noise_is_a_span_from_the_best_mean_to_the_worst():
    scores = noisy([0.0, 5.0, 2.0], 50, seed=0)
    best, worst = real_spans({"a": scores})["a"]
    assert (best, worst) == pytest.approx((float(scores[0].mean()), float(scores[1].mean())))


def test_questions_are_paired_so_that_what_is_hard_for_all_donors_hides_no_span():
    hard = 10 * torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    apart = noisy([0.0, 0.1], 40, seed=1, noise=0.05)
    assert real_spans({"a": apart + hard})["a"] is not None
    assert real_spans({"a": torch.stack([apart[0] + hard, apart[1] + hard.flip(0)])})["a"] is None


def test_the_p_value_is_students():
    first, second = noisy([0.3, 0.0], 12, seed=3)
    expected = stats.ttest_rel(first, second, alternative="greater").pvalue
    assert one_sided_p(first - second) == pytest.approx(float(expected), rel=1e-9)


def test_of_datasets_of_pure_noise_at_most_one_in_ten_passes_for_a_span_whatever_the_number_of_donors():
    # Of two equal donors the lucky one is "best": one-sided, each of the two directions passes in 5 %.
    for donors in (2, 6):
        found = real_spans({str(seed): noisy([0.0] * donors, 16, seed) for seed in range(600)})
        assert sum(span is not None for span in found.values()) / 600 < 0.13


def test_more_donors_need_a_clearer_difference():
    pair = noisy([0.0, 0.0], 20, seed=5)
    pair[1] = pair[0] + torch.linspace(-1, 1.7, 20)
    assert one_sided_p(pair[1] - pair[0]) == pytest.approx(0.035, abs=0.01)
    assert real_spans({"a": pair})["a"] is not None
    between = [pair[0] + share * (pair[1] - pair[0]) for share in (0.2, 0.4, 0.6)]
    assert real_spans({"a": torch.stack([pair[0], *between, pair[1]])})["a"] is None


def test_copies_of_a_donor_count_once_and_copies_alone_have_no_span():
    pair = noisy([0.0, 0.0], 20, seed=5)
    pair[1] = pair[0] + torch.linspace(-1, 1.7, 20)
    once = real_spans({"a": pair})["a"]
    assert once is not None
    assert real_spans({"a": torch.stack([pair[0], pair[1], pair[0], pair[1], pair[1]])})["a"] == once
    assert real_spans({"a": torch.stack([pair[0], pair[0]])})["a"] is None


def test_a_constant_difference_is_real_unless_there_are_but_a_few_questions():
    row = torch.arange(8.0)
    assert real_spans({"a": torch.stack([row, row + 1])})["a"] == (3.5, 4.5)
    assert real_spans({"a": torch.tensor([[0.0, 0, 0], [1, 1, 1]])})["a"] is None  # three of three may be luck
    assert real_spans({"a": torch.tensor([[0.0], [5.0]])})["a"] is None


def test_a_donor_that_cannot_be_scored_is_left_out():
    row, broken = torch.arange(8.0), torch.zeros(8)
    broken[0] = math.nan
    assert real_spans({"a": torch.stack([row, broken, row + 1])})["a"] == (3.5, 4.5)
    assert real_spans({"a": torch.stack([row, broken])})["a"] is None
