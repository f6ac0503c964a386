"""What is shown while a run goes on, with a clock of the test's own."""

from __future__ import annotations

import pytest

from olmfast import load_config, run
from olmfast.search.costs import PlannedStep, Schedule
from olmfast.search.log import Outcome
from olmfast.terminal.progress import Bars, Lines, TimeLeft, Watcher
from olmfast.testing import skilled_run, tiny_run


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def outcome(winner: str = "donor1", gain: float | None = None) -> Outcome:
    return Outcome("layers", "0", winner, winner != "donor0", {}, gain=gain)


def shown(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_log_says_every_30_s_how_far_the_run_is(capsys):
    clock = Clock()
    lines = Lines(verbose=False, clock=clock)
    steps = [PlannedStep("layers", str(block), 4, 4.0) for block in range(25)]
    lines.planned(Schedule((*steps, PlannedStep("held-out", "result", 2, 2.0, counts=False)), evaluations=80))
    for step in steps[:20]:
        lines.step(step.stage, step.unit, 4)
        for label in "abcd":
            clock.now += 2.5
            lines.candidate(label)
        lines.chosen(outcome("donor0"))
    said = shown(capsys)
    assert said[0] == "[    0.0s] layers 0: 4 candidates"
    assert said[1:3] == [
        "[   30.0s] 12 of 80 evaluations; layers 2; 0:02:55 left",  # 68 more of 2.5 s, and two closing scores
        "[   60.0s] 24 of 80 evaluations; layers 5; 0:02:25 left",
    ]
    assert len(said) == 1 + 200 // 30


def test_a_candidate_of_a_minute_is_followed_by_a_line(capsys):
    clock = Clock()
    lines = Lines(verbose=False, clock=clock)
    lines.planned(Schedule((PlannedStep("base", "base", 2, 2.0), PlannedStep("model", "model", 2, 2.0))))
    lines.step("base", "base", 2)
    clock.now = 60.0
    lines.candidate("donor0")
    assert shown(capsys)[1:] == ["[   60.0s] 1 of 4 evaluations; base; -:--:-- left"]  # no step has been timed yet
    clock.now = 70.0
    lines.candidate("donor1")
    lines.chosen(outcome("donor0"))
    clock.now = 100.0
    lines.step("model", "model", 2)
    assert shown(capsys) == [
        "[  100.0s] model model: 2 candidates",
        "[  100.0s] 2 of 4 evaluations; model; 0:00:40 left",
    ]


@pytest.mark.parametrize(("gain", "told"), [(0.0123, "donor1, +0.012"), (-0.0123, "donor1, -0.012"), (None, "donor1")])
def test_an_improvement_is_told_with_its_size(capsys, gain, told):
    Lines(verbose=False).chosen(outcome(gain=gain))
    assert shown(capsys)[0].endswith(f"layers 0: {told}")
    Bars(verbose=False).chosen(outcome(gain=gain))
    assert shown(capsys) == [f"layers 0: {told}"]


def test_bars_count_to_the_budget_and_show_the_time_that_was_learnt():
    clock = Clock()
    bars = Bars(verbose=False, clock=clock)
    column, task = TimeLeft(bars), bars.progress.tasks[0]
    bars.planned(Schedule(tuple(PlannedStep("layers", str(block), 4, 4.0) for block in range(25)), evaluations=80))
    assert (task.completed, task.total, str(column.render(task))) == (0, 80, "-:--:--")
    bars.step("layers", "0", 4)
    for label in "abcda":  # a race: one is scored on more questions
        clock.now += 5
        bars.candidate(label)
    assert task.completed == 4
    bars.chosen(outcome())
    assert (task.completed, str(column.render(task))) == (4, "0:07:55")  # 19 steps of 25 s


def test_a_descent_says_how_far_it_is(tmp_path, capsys):
    class Hurried(Lines):
        """For which each look at the clock is 5 s after the last."""

        def __init__(self):
            self.now = 0.0
            super().__init__(verbose=False, clock=self.tick)

        def tick(self):
            self.now += 5.0
            return self.now

    run(skilled_run(tmp_path, n=12, budget=30), observer=Hurried())
    descent = [line for line in shown(capsys) if "evaluations; gradient part;" in line]
    told = [int(line.split()[2]) for line in descent]
    assert len(set(told)) > 4
    assert told == sorted(told)


@pytest.mark.parametrize("keys", [{}, {"improve_all": "all"}, {"budget": 13}, {"racing": {"rungs": [2, 4]}}])
def test_a_run_ends_where_its_forecast_does(tmp_path, keys):
    class Followed(Watcher):
        """Notes how far the run is said to be after each step."""

        def chosen(self, outcome: Outcome) -> None:
            super().chosen(outcome)
            said.append((self.forecast.done, self.forecast.total))

    said: list[tuple[int, int]] = []
    stages = {"base_select": True, "boundary_select": True, "layer_swap": True, "tensor_swap": True, "es_norm": True}
    config = load_config(tiny_run(tmp_path, 3, **stages, units=["*.q_proj"]), keys)
    watcher = Followed()
    result = run(config, observer=watcher)
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[-1][0] == result.record.evaluations
    assert watcher.forecast.left_s is not None
    totals = [total for _, total in said]
    if "budget" in keys:
        assert set(totals) == {13}
    else:
        assert said[-1][0] == said[-1][1]
        assert totals == sorted(totals, reverse=True)
    resumed = Followed()
    said.clear()
    run(load_config(tmp_path / "cfg.yaml", {**keys, "budget": 10**6}), observer=resumed, resume=True)
    if "budget" in keys:
        assert said[0][0] > result.record.evaluations
        assert said[-1][0] == said[-1][1]
    else:
        assert not said  # it was finished
