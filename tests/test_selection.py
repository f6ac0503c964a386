"""Who wins: Copeland over ranks, the scaled mean, ties, significance, weights and the guard."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from olmfast.evaluation.scores import Scores
from olmfast.search.ranking import Comparison, Rules, choose, is_degraded, order, scaled_mean, skill_retained

TOLERANCE = 1e-6


def scores(**datasets: list[float | list[float]]) -> Scores:
    """Scores from one mean, or one list of samples, per candidate."""
    samples = {
        name: torch.tensor([row if isinstance(row, list) else [row] for row in rows], dtype=torch.float64)
        for name, rows in datasets.items()
    }
    return Scores(
        samples,
        {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in samples.items()},
        {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in samples.items()},
    )


def copeland(table: Scores, **rules) -> int:
    n = len(next(iter(table.samples.values())))
    return choose(table, range(n), Rules("copeland", TOLERANCE, **rules))


def test_copeland_prefers_who_is_better_on_more_datasets():
    assert copeland(scores(a=[1.0, 0.9, 2.0], b=[1.0, 0.9, 0.1], c=[1.0, 0.9, 2.0])) == 1


def test_ties_go_to_the_lowest_rank_sum_then_to_what_is_there_then_to_pool_order():
    # 1 and 2 both beat 0 and draw with each other; Borda prefers 2, which is first twice.
    assert copeland(scores(a=[9, 1, 2], b=[9, 2, 1], c=[9, 3, 3])) == 1
    assert copeland(scores(a=[3, 3], b=[3, 3])) == 0
    assert copeland(scores(a=[5, 3, 3], b=[5, 3, 3])) == 1


def test_scores_closer_than_the_tolerance_are_ties():
    assert copeland(scores(a=[1.0, 1.0 - 1e-8])) == 0
    assert copeland(scores(a=[1.0, 1.0 - 1e-4])) == 1


def test_copeland_forgets_magnitudes_and_the_scaled_mean_does_not():
    table = scores(a=[0.5, 0.49], b=[0.5, 0.49], c=[0.0, 0.9])
    spans = dict.fromkeys("abc", (0.0, 1.0))
    assert copeland(table) == 1
    assert choose(table, [0, 1], Rules("mean", TOLERANCE, spans=spans)) == 0


def test_weights_count_in_both_selections():
    table = scores(a=[0.5, 0.4], b=[0.5, 0.6], c=[0.5, 0.6])
    spans = dict.fromkeys("abc", (0.0, 1.0))
    for selection in ("copeland", "mean"):
        assert choose(table, [0, 1], Rules(selection, TOLERANCE, spans=spans)) == 0
        heavy = Rules(selection, TOLERANCE, weights={"a": 5.0}, spans=spans)
        assert choose(table, [0, 1], heavy) == 1


def test_scaled_mean_and_skill_retained_are_one_anothers_complement_on_the_donors_span():
    spans = {"a": (1.0, 3.0), "b": (0.0, 10.0), "alike": (2.0, 2.0)}
    means = {"a": 2.0, "b": 2.5, "alike": 7.0}
    assert scaled_mean(means, Rules("mean", TOLERANCE, spans=spans)) == pytest.approx((0.5 + 0.25) / 2)
    assert skill_retained(means, spans) == pytest.approx((0.5 + 0.75) / 2)
    assert math.isnan(skill_retained({"alike": 1.0}, spans))


def test_significance_makes_a_difference_within_noise_a_tie():
    clear = [[1.0, 1.1, 0.9, 1.0], [0.5, 0.6, 0.4, 0.51]]
    noisy = [[1.0, 1.0, 1.0, 1.0], [0.0, 2.1, 0.1, 1.7]]
    for selection in ("copeland", "mean"):
        rules = Rules(selection, TOLERANCE, spans={"a": (0.0, 1.0)})
        strict = Rules(selection, TOLERANCE, significance=0.05, spans={"a": (0.0, 1.0)})
        assert choose(scores(a=noisy), [0, 1], rules) == 1
        assert choose(scores(a=noisy), [0, 1], strict) == 0
        assert choose(scores(a=clear), [0, 1], strict) == 1


@given(st.lists(st.tuples(*[st.floats(0, 2)] * 2), min_size=3, max_size=12))
def test_the_paired_test_is_students(pairs):
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    table = scores(a=[first, second])
    p = stats.ttest_rel(first, second).pvalue
    if not math.isfinite(p) or min(abs(p - 0.05), torch.tensor(first).sub(torch.tensor(second)).std()) < 1e-6:
        return
    better = Comparison(table, Rules("copeland", TOLERANCE, significance=0.05)).is_better("a", 1, 0)
    gain = sum(first) - sum(second)
    assert better == (bool(p < 0.05) and gain > 1e-5)


@settings(max_examples=60)
@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_copeland_equals_its_definition_and_order_is_a_permutation_that_it_leads(columns):
    table = scores(**{f"d{i}": [float(x) for x in column] for i, column in enumerate(columns)})
    n = len(columns[0])
    ranks = [[1 + sum(x < column[i] for x in column) for i in range(n)] for column in columns]
    wins = [
        sum(sum(r[i] < r[j] for r in ranks) > sum(r[j] < r[i] for r in ranks) for j in range(n) if j != i)
        for i in range(n)
    ]
    expected = min(range(n), key=lambda i: (-wins[i], sum(r[i] for r in ranks), i))
    rules = Rules("copeland", TOLERANCE)
    assert choose(table, range(n), rules) == expected
    ordered = order(table, range(n), rules)
    assert ordered[0] == expected
    assert sorted(ordered) == list(range(n))


def test_the_guard_compares_with_the_base_or_with_base_and_present_state():
    rules, names = Rules("copeland", TOLERANCE), ("exact_match", "sums.json")
    assert not is_degraded(0.9, base=1.0, now=0.5, improve_all="base", names=names, rules=rules)
    assert is_degraded(0.9, base=1.0, now=0.5, improve_all="all", names=names, rules=rules)
    assert is_degraded(1.1, base=1.0, now=2.0, improve_all="base", names=names, rules=rules)
    assert is_degraded(0.9, base=1.0, now=0.5, improve_all="exact_match", names=names, rules=rules)
    assert is_degraded(0.9, base=1.0, now=0.5, improve_all="sums.json", names=names, rules=rules)
    assert not is_degraded(9.0, base=1.0, now=0.5, improve_all="diversity", names=names, rules=rules)
    assert not is_degraded(1.0, base=1.0, now=1.0, improve_all="all", names=names, rules=rules)
