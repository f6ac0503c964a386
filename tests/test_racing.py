"""Racing drops who can no longer win, keeps the current model, and scores whoever is left in full."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast import run
from olmfast.config.run import load_config
from olmfast.config.searches import Racing
from olmfast.evaluation.scores import Scores
from olmfast.search.racing import heats, left_to_score
from olmfast.search.ranking import Comparison, Rules, choose
from olmfast.testing import sums, tiny_run, write_dataset

RULES = {
    "copeland": Rules("copeland", 1e-6),
    "mean": Rules("mean", 1e-6, spans={"a": (0.0, 1.0), "b": (0.0, 1.0)}),
}


class Table:
    """Scores known beforehand, and a record of what was asked for."""

    def __init__(self, means: list[float], n: int = 200, seed: int = 0, noise: float = 0.2) -> None:
        dice = torch.Generator().manual_seed(seed)
        easy = torch.rand(2, 1, n, generator=dice, dtype=torch.float64)  # samples differ; candidates share that
        noises = torch.randn(2, len(means), n, generator=dice, dtype=torch.float64) * noise
        values = torch.tensor(means, dtype=torch.float64)[None, :, None] + easy + noises
        self.samples = {"a": values[0], "b": values[1]}
        self.sizes = {"a": n, "b": n}
        self.questions = {"a": list(range(n)), "b": list(range(n))}
        self.asked = 0

    def __call__(self, rows, samples):
        mask = {name: torch.zeros(len(rows), n, dtype=torch.bool) for name, n in self.sizes.items()}
        for name, own in samples.items():
            mask[name][:, own] = True
            self.asked += len(rows) * len(own)
        values = {name: torch.where(mask[name], self.samples[name][rows], torch.nan) for name in samples}
        return Scores(values, mask, {name: torch.zeros_like(own) for name, own in mask.items()})

    def race(self, rules: Rules, **keys):
        return heats(self, len(self.samples["a"]), self.questions, Racing(**keys), rules, seed=7)

    def best(self, rules: Rules) -> int:
        full = self(range(len(self.samples["a"])), {name: list(range(n)) for name, n in self.sizes.items()})
        return choose(full, range(len(self.samples["a"])), rules)


def fully_scored(samples: dict[str, torch.Tensor]) -> Scores:
    return Scores(samples, {name: torch.ones_like(own, dtype=torch.bool) for name, own in samples.items()}, {})


@pytest.mark.parametrize("selection", RULES)
def test_clear_losers_leave_early_and_the_winner_stays(selection):
    table = Table([0.5, 0.1, 0.9, 0.8, 0.7, 0.95])
    found, dropped = table.race(RULES[selection])
    assert set(dropped) == {2, 3, 4, 5}
    assert dropped[2] == "behind after 25 of 200 samples"
    assert table.asked <= 6 * 2 * 25 + 2 * 2 * 50
    assert found.evaluated["a"][2].sum() == 25
    rest = left_to_score(found, [0, 1], table.questions)
    assert len(rest["a"]) == 200 - int(found.evaluated["a"][1].sum())


@pytest.mark.parametrize("selection", RULES)
def test_what_is_there_never_leaves_however_bad_it_is(selection):
    _, dropped = Table([5.0, 0.1, 0.2, 4.0]).race(RULES[selection])
    assert 0 not in dropped
    assert 3 in dropped


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), selection=st.sampled_from(sorted(RULES)))
def test_who_is_best_by_far_in_full_is_never_dropped(seed, selection):
    table = Table([0.5, 0.0, 0.5, 0.6, 0.4], seed=seed)
    _, dropped = table.race(RULES[selection], rungs=[25, 75], confidence=0.99)
    assert table.best(RULES[selection]) == 1
    assert 1 not in dropped


@pytest.mark.parametrize("selection", RULES)
def test_of_equal_candidates_the_one_that_would_have_won_is_seldom_dropped(selection):
    wrong = 0
    for seed in range(60):
        table = Table([0.5, 0.5, 0.5], seed=seed)
        _, dropped = table.race(RULES[selection], rungs=[100], confidence=0.99)
        wrong += table.best(RULES[selection]) in dropped
    assert wrong <= 3  # the leader is the best of three by chance; 1 % would be one named beforehand


def test_samples_of_a_rung_are_the_same_for_all_and_grow():
    asked = []

    def score(rows, samples):
        asked.append({name: set(own) for name, own in samples.items()})
        return table(rows, samples)

    table = Table([0.5, 0.5, 0.5, 0.5])
    some = {"a": list(range(200)), "b": list(range(60))}
    heats(score, 4, some, Racing(rungs=[25, 75], confidence=0.99), RULES["copeland"], seed=1)
    assert len(asked[0]["a"]) == len(asked[0]["b"]) == 25
    assert len(asked[1]["a"]) == 50
    assert len(asked[1]["b"]) == 35
    assert not asked[0]["a"] & asked[1]["a"]


def test_a_dataset_that_is_still_open_lets_a_candidate_live_only_if_it_can_turn_the_balance():
    n = 50
    behind, level = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    behind = behind + torch.linspace(0, 0.1, n)
    table = {"a": torch.stack([level, behind]), "b": torch.stack([level, level]), "c": torch.stack([level, level])}
    scores = fully_scored(table)
    sizes = dict.fromkeys("abc", 100)
    assert Comparison(scores, RULES["copeland"]).chance_to_beat(1, 0, sizes) == pytest.approx(0.25)  # if b and c are
    heavy = Rules("copeland", 1e-6, weights={"a": 2.0})
    assert Comparison(scores, heavy).chance_to_beat(1, 0, sizes) < 1e-9


@pytest.mark.parametrize("significance", [None, 0.2])
@pytest.mark.parametrize("selection", RULES)
def test_the_chance_to_beat_the_leader_is_how_often_that_happens(selection, significance):
    """Foretold from 30 of 90 samples, counted over many pairs of candidates, some alike and some not."""
    rules, n, seen, dice = RULES[selection], 90, 30, torch.Generator().manual_seed(5)
    if significance and selection == "mean":
        pytest.skip("significance keeps the current model; between two others the lower mean wins")
    rules = Rules(rules.selection, rules.tie_tolerance, significance, spans=rules.spans)
    foretold, came = [], []
    for _ in range(500):
        samples = {name: torch.randn(2, n, generator=dice, dtype=torch.float64) * 0.2 for name in "ab"}
        for own in samples.values():
            own[1] += torch.randn((), generator=dice, dtype=torch.float64) * 0.15
        full, part = (Comparison(fully_scored({k: v[:, :m] for k, v in samples.items()}), rules) for m in (n, seen))
        foretold.append(part.chance_to_beat(1, 0, {"a": n, "b": n}))
        if selection == "mean":
            came.append(full._mean_gain(1, 0) > 0)
        else:
            came.append(sum(full.is_better(name, 1, 0) - full.is_better(name, 0, 1) for name in "ab") > 0)
    assert abs(sum(came) - sum(foretold)) / len(came) < 0.04
    for low, high in ((0.0, 0.05), (0.05, 0.5), (0.5, 0.95), (0.95, 1.0)):
        within = [(chance, had) for chance, had in zip(foretold, came, strict=True) if low <= chance <= high]
        chances, happened = zip(*within, strict=True)
        deviation = sum(chance * (1 - chance) for chance in chances) ** 0.5
        assert abs(sum(happened) - sum(chances)) < 3.5 * deviation + 1


def test_a_raced_run_reports_what_it_skipped_and_scores_its_winner_in_full(tmp_path):
    path = tiny_run(tmp_path, 4, layer_swap=True, improve_all="all", racing={"rungs": [4, 8], "confidence": 0.6})
    for name in ("sums.json", "more.json", "talk.json"):
        write_dataset(tmp_path / name, sums(24, len(name)))
    result = run(load_config(path))
    steps = result.record.data["olmfast"]["steps"]
    raced = [reason for step in steps.values() for reason in step["dropped"].values() if "behind after" in reason]
    assert raced
    for step in steps.values():
        assert all(step["metrics"][name][step["winner"]] is not None for name in step["metrics"])
        for label, reason in step["dropped"].items():
            if "behind after" in reason:
                assert all(step["metrics"][name][label] is None for name in step["metrics"])
    lines = [json.loads(line) for line in (result.output_dir / "evaluations.jsonl").read_text().splitlines()]
    assert {sum(x is not None for x in line["samples"]) for line in lines} >= {4, 24}
    assert not any("behind" in reason for reason in steps["base"]["dropped"].values())


@pytest.mark.parametrize("selection", RULES)
def test_who_the_guard_will_refuse_drives_nobody_out(selection):
    table = Table([0.5, 0.1, 0.4, 0.9])
    table.samples["a"][1] -= 0.4
    table.samples["b"][1] += 0.55  # best of all by far on `a`, and worse than the current model on `b`
    rules = RULES[selection] if selection == "mean" else Rules("copeland", 1e-6, weights={"a": 2.0})
    _, dropped = heats(table, 4, table.questions, Racing(), rules, 7)
    assert 2 in dropped
    _, dropped = heats(table, 4, table.questions, Racing(), rules, 7, guarded=["b"])
    assert set(dropped) == {3}


def test_where_any_improvement_is_accepted_what_is_there_drives_nobody_out():
    table = Table([0.5, 0.4, 0.45, 0.9])
    table.samples["b"][1:3] += 0.5
    rules = RULES["copeland"]
    _, dropped = heats(table, 4, table.questions, Racing(), rules, 7)
    assert set(dropped) == {1, 2, 3}
    _, dropped = heats(table, 4, table.questions, Racing(), rules, 7, current_leads=False)
    assert 1 not in dropped
    assert 3 in dropped


def test_a_race_on_some_of_the_questions_asks_no_others():
    asked: set[int] = set()

    def score(rows, samples):
        asked.update(samples["a"])
        return table(rows, samples)

    table = Table([0.5, 0.1, 0.9, 0.8])
    some = {"a": list(range(0, 200, 2)), "b": list(range(1, 200, 2))}
    found, dropped = heats(score, 4, some, Racing(rungs=[25, 75]), RULES["mean"], 7)
    assert set(dropped) == {2, 3}
    assert asked <= set(some["a"])
    assert dropped[2] == "behind after 25 of 100 samples"
    rest = left_to_score(found, [0, 1], some)
    assert set(rest["a"]) | asked == set(some["a"])
