"""The verdict on a result: differences of skill with paired intervals, in words, wherever a result is shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from olmfast import load_config, run
from olmfast.evaluation.scores import Scores
from olmfast.runs.scoreboard import Scoreboard
from olmfast.runs.verdict import HELD_OUT, SELECTION, mean_of_means, of_run, verdict_on
from olmfast.search.log import strict
from olmfast.terminal.runs import print_result
from olmfast.testing import tiny_run, write_answers

DONORS = {"arith": {"sums": 0.0, "sorts": 1.0}, "sort": {"sums": 1.0, "sorts": 0.0}}
"""Donor -> dataset -> its mean score: the span of each dataset is 1, and each donor retains 0.5."""


def board_of(n: int, noise: float = 0.3, seed: int = 0, **models: dict[str, float]) -> Scoreboard:
    """A board of both donors and more models, of n questions per dataset that are harder or easier for all alike."""
    generator = torch.Generator().manual_seed(seed)
    means = {**DONORS, **models}
    samples = {}
    for name in means["arith"]:
        hard = 5 * torch.randn(n, generator=generator, dtype=torch.float64)
        own = noise * torch.randn(len(means), n, generator=generator, dtype=torch.float64)
        own -= own.mean(dim=1, keepdim=True)  # the means are the given ones
        samples[name] = torch.tensor([row[name] for row in means.values()])[:, None] + own + hard
    board = Scoreboard(list(DONORS))
    flags = [{name: torch.full_like(x, on).bool() for name, x in samples.items()} for on in (1, 0)]
    board.enter(list(means), Scores(samples, *flags, {"sums": flags[1]["sums"]}))
    return board


def against(board: Scoreboard, rival: str):
    verdict = verdict_on("merged", board, HELD_OUT)
    return next(one for one in verdict.comparisons if one.rival == rival)


GOOD, LIKE_ARITH = {"sums": 0.1, "sorts": 0.2}, {"sums": 0.01, "sorts": 0.97}


def test_the_difference_is_of_skill_retained():
    board = board_of(60, merged=GOOD)
    found = against(board, "arith")
    assert found.difference == pytest.approx(board.retained("merged") - board.retained("arith"), abs=1e-6)
    assert found.difference == pytest.approx(0.85 - 0.5, abs=1e-3)
    assert verdict_on("merged", board).skill == pytest.approx({"sums": 0.9, "sorts": 0.8}, abs=1e-3)


def test_of_one_dataset_the_interval_is_the_paired_t_tests():
    board = board_of(25, merged=GOOD)
    board = replace(board, rows={label: {"sums": row["sums"]} for label, row in board.rows.items()})
    own, other = board.scores_of(["merged", "sort"], "sums")
    expected = stats.ttest_rel(other, own).confidence_interval(0.95)
    best, worst = board.spans["sums"]
    found = against(board, "sort")
    assert (found.low, found.high) == pytest.approx(tuple(x / (worst - best) for x in expected), rel=1e-9)


def test_of_two_samples_the_error_and_its_freedom_are_welchs():
    a, b = (torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (9, 40))
    mean, error, freedom = mean_of_means([a, 3 * b])
    expected = stats.ttest_ind(a, -3 * b, equal_var=False)  # the difference from -b is the sum with b
    assert 2 * mean == pytest.approx(float(a.mean() + 3 * b.mean()))
    assert 2 * mean / (2 * error) == pytest.approx(float(expected.statistic))
    assert freedom == pytest.approx(float(expected.df))


def test_intervals_hold_the_true_difference_in_95_of_100_cases():
    true, held = 0.3, 0
    for seed in range(800):
        generator = torch.Generator().manual_seed(seed)
        leads = [true + scale * torch.randn(n, generator=generator) for n, scale in ((8, 1.0), (30, 0.2), (12, 3.0))]
        mean, error, freedom = mean_of_means(leads)
        held += abs(mean - true) <= stats.t.isf(0.025, freedom) * error
    assert 0.93 < held / 800 < 0.975


def test_what_is_hard_for_all_models_alike_widens_no_interval():
    found = against(board_of(60, noise=0.05, merged=GOOD), "arith")
    assert found.high - found.low < 0.05  # the questions' own scores lie 5 apart


def test_the_words_say_better_worse_or_no_different_and_give_the_interval():
    board = board_of(60, merged=GOOD, start=LIKE_ARITH, **{"best TIES": {"sums": 0.0, "sorts": 0.0}})
    found = against(board, "arith")
    numbers = f"{found.difference:.3f} ({found.low:.3f} to {found.high:.3f})"
    assert found.words() == f"better than arith by {numbers}"
    assert not found.holds_zero
    found = against(board, "best TIES")
    numbers = f"{-found.difference:.3f} ({-found.high:.3f} to {-found.low:.3f})"
    assert found.words() == f"worse than best TIES by {numbers}"
    assert found.difference == pytest.approx(-0.15, abs=1e-3)
    assert found.low < found.difference < found.high < 0
    found = against(board_of(60, merged=GOOD, start={"sums": 0.12, "sorts": 0.2}), "start")
    assert found.holds_zero
    assert found.words() == f"no different from the start: +0.010 ({found.low:.3f} to {found.high:.3f})"


def test_models_that_differ_by_rounding_alone_are_equal_however_often_it_is_one_way():
    board = board_of(60, merged=GOOD, start=GOOD)
    for scores in board.samples["merged"].values():
        scores[:] = board.samples["start"]["sums" if scores is board.samples["merged"]["sums"] else "sorts"]
        scores[:] = [score - 1e-6 for score in scores]
    assert against(board, "start").low > 0
    assert against(board, "start").words() == "no different from the start: equal scores"
    assert "not better than the start" in verdict_on("merged", board).warning


def test_a_result_that_is_better_than_its_start_and_best_donor_needs_no_warning():
    verdict = verdict_on("merged", board_of(60, merged=GOOD, start=LIKE_ARITH), HELD_OUT)
    assert verdict.warning == ""
    assert not any("warning" in line for line in verdict.lines())


def test_one_that_is_not_is_warned_of_with_what_would_help():
    board = board_of(60, noise=0.8, merged=GOOD, start={"sums": 0.12, "sorts": 0.2})
    verdict = verdict_on("merged", board, HELD_OUT)
    (needed,) = {one.n_needed for one in verdict.comparisons if one.rival == "start"}
    assert needed > 120
    assert verdict.warning == (
        f"not better than the start; an interval of +-0.05 needs about {needed:,} held-out questions; "
        "a better merge may need more selection questions or other candidates"
    )
    assert verdict.lines()[-1] == f"warning: {verdict.warning}"
    # Where there are enough questions, more of them would not help.
    worse = board_of(60, noise=0.02, merged={"sums": 0.0, "sorts": 1.01})
    warning = verdict_on("merged", worse, HELD_OUT).warning
    assert warning.startswith("not better than its best donor ")
    assert "interval" not in warning


def test_as_many_questions_as_it_says_give_the_interval_that_it_says():
    few = against(board_of(40, noise=0.6, merged=GOOD), "arith")
    many = against(board_of(few.n_needed // 2, noise=0.6, merged=GOOD), "arith")
    assert few.high - few.low > 0.2
    assert (many.high - many.low) / 2 == pytest.approx(0.05, rel=0.2)


def test_a_dataset_on_which_no_donor_is_better_beyond_noise_is_left_out_and_named():
    board = board_of(60, merged=GOOD)
    lucky = 0.01 * torch.randn(3, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lucky[2] -= 9  # a model that is far better than both donors, which are alike
    for label, scores in zip(board.rows, lucky, strict=True):
        board.samples[label]["noise"], board.rows[label]["noise"] = scores.tolist(), float(scores.mean())
    assert board.rows["arith"]["noise"] != board.rows["sort"]["noise"]
    assert board.without_span() == ["noise"]
    assert board.retained("merged") == pytest.approx(0.85, abs=1e-3)
    assert list(board.skill("merged")) == ["sums", "sorts"]
    assert verdict_on("merged", board).n_questions == 120
    assert board.remark().endswith("no donor being better than another beyond noise: noise")


def test_where_no_dataset_tells_the_donors_apart_nothing_is_said_of_skill():
    board = board_of(60, noise=50.0, merged=GOOD)
    assert not board.has_scale
    assert math.isnan(board.retained("merged"))
    assert verdict_on("merged", board) is None
    assert board.remark().startswith("no skill retained: no donor is better than another beyond noise")


def test_a_question_without_a_score_makes_a_rival_incomparable_and_not_worse():
    board = board_of(60, merged=GOOD, start=LIKE_ARITH)
    board.samples["start"]["sums"][3] = board.rows["start"]["sums"] = math.nan
    verdict = verdict_on("merged", board)
    assert against(board, "start").words() == "not comparable with the start: a question has no score"
    told = json.loads(json.dumps(strict(verdict.to_json()), allow_nan=False))
    assert told["against"]["start"]["difference"] is None
    assert told["against"]["arith"]["holds_zero"] is False


def test_a_board_is_read_back_as_it_was_written_and_one_of_an_older_version_without_its_questions():
    board = board_of(60, merged=GOOD)
    board.rows["merged"]["sums"] = board.samples["merged"]["sums"][0] = math.nan
    data = json.loads(json.dumps(strict(board.to_json()), allow_nan=False))
    assert set(data) == {"donors", "rows", "truncated", "skill_retained", "accuracy", "samples"}
    read = Scoreboard.from_json(data)
    assert json.dumps(read.to_json()) == json.dumps(board.to_json())
    assert read.accuracy["merged"] == {"sums": 0.0}
    assert read.cell("arith", "sums").endswith(" (0% right)")
    assert "right" not in read.cell("arith", "sorts")
    assert read.heading("sums") == "sums (n=60)"
    old = Scoreboard.from_json({key: data[key] for key in ("donors", "rows", "truncated", "skill_retained")})
    assert old.retained("arith") == pytest.approx(board.retained("arith"))
    assert old.heading("sums") == "sums"
    assert verdict_on("merged", old) is None


def test_without_held_out_questions_the_verdict_is_on_those_that_chose_and_says_so():
    board = board_of(60, merged=GOOD)
    verdict = of_run(board, Scoreboard([]))
    told = "merged retains 0.850 of the donors' skill on 120 selection questions, which chose it: sums 0."
    assert verdict.kind == SELECTION
    assert verdict.lines()[0].startswith(told)
    assert of_run(Scoreboard([]), board).kind == HELD_OUT


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run over donors of which two are each best at one dataset, with other questions held out."""
    folder = tmp_path_factory.mktemp("finished")
    modes = {"first.json": {"mode": "exact_match"}, "second.json": {"mode": "exact"}}
    keys = {"dataset": modes, "holdout": {f"held_{name}": entry for name, entry in modes.items()}}
    path = tiny_run(folder, layer_swap=True, selection="mean", **keys)
    for donor, name in enumerate(modes):
        write_answers(folder / name, folder / "models" / f"donor{donor}", 30)
        write_answers(folder / f"held_{name}", folder / "models" / f"donor{donor}", 20)
    return run(load_config(path))


def test_terminal_report_card_and_evaluate_say_the_same_words(finished, olmfast, capsys):
    verdict = finished.verdict
    assert verdict.kind == HELD_OUT
    assert [one.rival for one in verdict.comparisons] == ["donor0", "donor1", "donor2", "plain average"]
    lines = verdict.lines()
    print_result(finished, as_json=False)
    printed = capsys.readouterr().out
    assert "\n".join(lines) in printed
    assert "held_first.json (n=20)" in printed
    assert "(100% right)" in printed
    report = json.loads((finished.output_dir / "merge_report.json").read_text())["olmfast"]
    assert [one["words"] for one in report["verdict"]["against"].values()] == [
        one.words() for one in verdict.comparisons
    ]
    assert report["holdout"]["accuracy"]["donor0"]["held_first.json"] == 1
    assert len(report["holdout"]["samples"]["merged"]["held_first.json"]) == 20
    card = (finished.output_dir / "README.md").read_text()
    assert card.index("## Verdict") < card.index("## Selection scores")
    assert all(line in card for line in lines)
    folder = finished.output_dir.parent
    models = [part for name in finished.holdout.donors for part in ("--against", folder / "models" / name)]
    sets = [f"{folder / f'held_{name}'}" for name in ("first.json:exact_match", "second.json:exact")]
    arguments = ("evaluate", finished.output_dir, *models, *(part for one in sets for part in ("--dataset", one)))
    code, out, _ = olmfast(*arguments, "--device", "cpu")
    assert code == 0
    assert "\n".join(lines).replace(" held-out", "").replace("merged retains", "out retains") in out
    code, out, _ = olmfast(*arguments, "--device", "cpu", "--json")
    told = [one["words"].replace(f"{folder / 'models'}/", "") for one in json.loads(out)["verdict"]["against"].values()]
    assert told == [one.words() for one in verdict.comparisons]


def test_the_ledger_and_the_board_give_a_question_the_same_score(finished):
    lines = [json.loads(line) for line in (finished.output_dir / "evaluations.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["candidate"] == "donor1" and line["dataset"] == "second.json")
    assert finished.selection.samples["donor1"]["second.json"] == pytest.approx(first["samples"], abs=2e-6)
