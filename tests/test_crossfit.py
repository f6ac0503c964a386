"""What a joint search accepts: gains on questions that did not pick, and what it expects of new ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.search.acceptance import Gain, Scale, passes
from olmfast.search.crossfit import TRAINED, CrossFit, Decision, expected_skill
from olmfast.search.halves import Halves, set_aside
from olmfast.search.lines import Lines
from olmfast.search.log import Outcome
from olmfast.weights.expressions import whole

SCALE = Scale({"a": (0.2, 1.0), "b": (0.0, 0.5)})


def test_skill_is_1_for_the_best_donor_0_for_the_worst_and_never_more_than_1():
    assert SCALE.skill({"a": 0.2, "b": 0.0}) == 1
    assert SCALE.skill({"a": 1.0, "b": 0.5}) == 0
    assert SCALE.skill({"a": -5.0, "b": 0.5}) == 0.5  # one lucky dataset is not worth several
    assert math.isnan(SCALE.skill({"a": math.nan, "b": 0.0}))


def test_a_difference_that_rounding_makes_is_no_gain():
    scale = Scale({"a": (0.0, 1.0)}, noise={"a": 0.02})
    old = torch.full((20,), 0.5)
    assert scale.gain({"a": old - 0.01}, {"a": old}).mean == 0
    assert scale.gain({"a": old - 0.03}, {"a": old}).mean == pytest.approx(0.03)


def test_tests_share_the_significance():
    gain = next(Gain(x / 100, 0.01, 30) for x in range(1, 100) if Gain(x / 100, 0.01, 30).p < 0.02)
    assert passes(gain, 0.05, 1)
    assert not passes(gain, 0.05, 5)
    assert passes(Gain(0.001, 1.0, 30), None, 5)
    assert not passes(Gain(-0.1, 0.0, 30), None, 1)
    assert sum(6 / (math.pi * k) ** 2 for k in range(1, 100_000)) == pytest.approx(1, abs=1e-4)


def test_a_gain_without_noise_on_a_few_questions_is_no_proof():
    assert Gain(0.5, 0.0, 1).p == 0.25
    assert Gain(0.5, 0.0, 19).p < 1e-5
    assert Gain(0.0, 0.0, 19).p == 1.0


def test_a_gain_is_told_without_the_share_of_noise():
    assert Gain(0.1, 0.05, 30).shrunk == pytest.approx(0.075)
    assert Gain(0.1, 0.2, 30).shrunk == 0
    assert Gain(0.1, 0.0, 30).shrunk == 0.1


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 40), min_size=1), st.integers(0, 9))
def test_halves_and_validation_divide_the_questions(sizes, seed):
    kept, aside = set_aside(sizes, 0.2, seed, {})
    for name, n in sizes.items():
        assert sorted(kept[name] + aside.get(name, [])) == list(range(n))
        assert kept[name]
    halves = Halves.of(sizes, seed, {})
    for name, n in sizes.items():
        first, second = (half.get(name, []) for half in halves)
        assert sorted(first + second) == list(range(n))
        assert 0 <= len(first) - len(second) <= 1
    assert halves == Halves.of(sizes, seed, {})


@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_question_that_two_modes_ask_is_in_one_half_of_both(n, fewer, seed):
    sizes, sources = {"exact": n, "bigram": min(n, fewer)}, {"exact": "file", "bigram": "file"}
    first, second = Halves.of(sizes, seed, sources)
    assert not set(first.get("bigram", ())) & set(second["exact"])
    assert not set(second.get("bigram", ())) & set(first["exact"])
    assert sorted([*first.get("bigram", ()), *second.get("bigram", ())]) == list(range(sizes["bigram"]))
    kept, aside = set_aside(sizes, 0.3, seed, sources)
    assert kept["bigram"]
    assert set(aside.get("bigram", ())) <= set(aside.get("exact", ()))


def scored(samples: dict[str, torch.Tensor]) -> Scores:
    """Scores (candidates, questions) of which all have been evaluated."""
    every = {name: torch.ones_like(values, dtype=torch.bool) for name, values in samples.items()}
    none = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in samples.items()}
    return Scores(samples, every, none, none)


@pytest.mark.parametrize("n", [6, 20])
def test_of_candidates_that_differ_by_luck_few_are_accepted_and_of_better_ones_most(n):
    generator = torch.Generator().manual_seed(n)
    accepted = {0.0: 0, 0.5: 0}
    trials = 200
    for gain in accepted:
        for seed in range(trials):
            hard = {name: torch.rand(n, generator=generator) for name in ("a", "b", "c")}  # of each question
            samples = {
                name: own + 0.3 * torch.randn(9, n, generator=generator) - gain * (torch.arange(9) == 5)[:, None]
                for name, own in hard.items()
            }
            scale = Scale(dict.fromkeys(samples, (0.0, 1.0)))
            crossfit = CrossFit(Halves.of(dict.fromkeys(samples, n), seed, {}), scale, 0.05)
            decision = crossfit.of_candidates(scored(samples), range(9))
            accepted[gain] += decision.winner != 0
            assert crossfit.n_tests == (0 if decision.winner or decision.gain is None else 1)
    assert accepted[0.0] <= 0.05 * trials
    assert accepted[0.5] >= 0.8 * trials


def step(unit: str, *scores: float | None, gain: float | None = 0.1, changed: bool = True) -> Outcome:
    """Of a dataset `a`: what each half trained, scored on the other half, and their mean."""
    return Outcome("gradient", unit, TRAINED[-1], changed, {"a": dict(zip(TRAINED, scores, strict=False))}, gain=gain)


def decided(trained: float, last: float, begun: float, n: int = 40) -> Decision:
    """On what scores `trained` on the questions that test it, where the mean that knows the answers scores 0.1.

    It goes on from what scores `last` there, and training began where a model scores `begun`.
    """
    noise = 0.2 * torch.randn(6, n, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([0.1, trained, trained, 0.1])[:, None] + noise[:4]
    crossed = torch.tensor([begun, last])[:, None] + noise[4:]
    crossfit = CrossFit(Halves.of({"a": n}, 0, {}), Scale({"a": (0.0, 1.0)}), 0.05)
    return crossfit.of_trained(scored({"a": scores}), scored({"a": crossed}))


def test_what_goes_on_from_each_half_is_compared_with_it_and_not_with_a_mean_that_knows_the_answers():
    decision = decided(trained=0.5, last=0.8, begun=0.9)
    assert decision.winner == 3
    assert decision.gain.mean == pytest.approx(0.3, abs=0.1)
    assert decided(trained=0.85, last=0.7, begun=1.0).winner == 0


def test_how_far_training_goes_need_not_be_proved_step_by_step_but_that_it_leads_somewhere():
    small = decided(trained=0.5, last=0.52, begun=0.9)
    assert not passes(small.gain, 0.05, 1)
    assert small.winner == 3
    assert decided(trained=0.5, last=0.52, begun=0.52).winner == 0


def test_scores_crossed_are_of_questions_that_did_not_train():
    halves = Halves.of({"a": 6}, 0, {})
    first, second = (half["a"] for half in halves)
    every = scored({"a": torch.arange(24.0).view(4, 6)})
    own = every.rows([0]), every.rows([1]).limited_to({"a": second}), every.rows([2]).limited_to({"a": first})
    scores, recipe = own[0].followed_by(own[1]).followed_by(own[2]), whole("a", ())
    lines = Lines().trained([Candidate("")] * 3, scores, recipe)
    expected = [12.0 + i if i in first else 6.0 + i for i in range(6)]
    assert lines.crossed.samples["a"].tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], expected]
    again = lines.trained([Candidate("")] * 3, scores.rows([1, 1, 2]), recipe)  # what began is kept
    assert again.crossed.samples["a"].tolist() == lines.crossed.samples["a"].tolist()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([step("part", 0.6, 0.8, 0.1)], 0.3),  # not 0.9, of the mean of both, which has seen every question
        ([step("part", 0.6, 0.8), step("row", 0.4, 0.6)], 0.5),
        ([step("row", 0.4, 0.6), step("block 3", gain=0.02)], 0.52),
        ([step("row", 0.4, 0.6), step("block 3", gain=0.02), step("row", 0.0, 0.0, gain=0.03)], 0.55),
        ([step("block 3", gain=0.02), step("row", 0.4, 0.6)], 0.5),
        ([step("row", 0.4, 0.6), step("part", 0.1, 0.1, changed=False)], 0.5),
        ([step("model", None, 0.2), step("part", 0.6, 0.8)], 0.3),
        ([step("block 3")], None),
        ([], None),
    ],
)
def test_what_is_expected_of_new_questions_is_what_each_half_led_to_on_the_other(steps, expected):
    found = expected_skill(steps, {"a": (0.0, 1.0)})
    assert found == (None if expected is None else pytest.approx(expected))


def test_nothing_is_expected_where_no_dataset_tells_the_donors_apart():
    assert expected_skill([step("row", 0.4, 0.6)], {}) is None
