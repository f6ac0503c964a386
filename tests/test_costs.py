"""The time that is left: learnt from a clock, for kinds of steps that cost very differently."""

from __future__ import annotations

import random

import pytest

from olmfast.search.costs import Costs, Forecast, PlannedStep, Schedule, affordable, within

CHEAP, DEAR = "norm_es", "layers"
PRICES = {CHEAP: 0.5, DEAR: 5.0}  # seconds per unit of work: ten times as much


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def steps(kinds: list[str], n: int = 4) -> list[PlannedStep]:
    return [PlannedStep(kind, str(place), n, float(n)) for place, kind in enumerate(kinds)]


def take(forecast: Forecast, clock: Clock, step: PlannedStep, seconds: float, n: int | None = None) -> None:
    """One step from its begin to its end, candidate by candidate."""
    n = n or step.n_candidates
    forecast.begin(step.stage, step.unit, n)
    for candidate in range(n):
        clock.now += seconds / n
        forecast.candidate(str(candidate))
    forecast.end()


def walk(plan: list[PlannedStep], seconds: dict[str, float], noise: float = 0.0, **limits: float) -> list[float]:
    """Forecast divided by truth after each step but the last, the steps' seconds per work as given."""
    clock, draw = Clock(), random.Random(0)
    costs = [step.work * seconds[step.stage] * (1 + noise * draw.uniform(-1, 1)) for step in plan]
    forecast = Forecast(Schedule(tuple(plan), **limits), clock)
    end = clock.now + sum(costs)
    ratios = []
    for step, cost in zip(plan, costs, strict=True):
        take(forecast, clock, step, cost)
        ratios.append(forecast.left_s / (end - clock.now) if clock.now < end - 1e-6 else 1.0)
    return ratios


@pytest.mark.parametrize(
    "kinds",
    [
        [CHEAP, DEAR] * 30,  # taken in turns
        [CHEAP, DEAR, *[CHEAP] * 29, *[DEAR] * 29],  # the dear ones last
        [CHEAP, DEAR, *[DEAR] * 29, *[CHEAP] * 29],
        [DEAR, *[CHEAP] * 59],
    ],
)
def test_the_time_left_is_right_within_a_quarter_after_a_tenth_although_kinds_cost_ten_times_as_much(kinds):
    ratios = walk(steps(kinds), PRICES, noise=0.3)
    assert all(0.75 <= ratio <= 1.25 for ratio in ratios[len(kinds) // 10 :]), ratios


def test_one_mean_of_all_kinds_would_not_be():
    plan = steps([CHEAP, DEAR, *[CHEAP] * 29, *[DEAR] * 29])
    blurred = [PlannedStep("one", step.unit, step.n_candidates, step.work) for step in plan]
    clock = Clock()
    forecast = Forecast(Schedule(tuple(blurred)), clock)
    end = clock.now + sum(step.work * PRICES[step.stage] for step in plan)
    for step, one in zip(plan[:20], blurred, strict=False):
        take(forecast, clock, one, step.work * PRICES[step.stage])
    assert forecast.left_s < 0.5 * (end - clock.now)


def test_a_kind_that_has_not_been_seen_costs_what_its_work_says():
    clock = Clock()
    forecast = Forecast(Schedule((PlannedStep(CHEAP, "a", 4, 40.0), PlannedStep(DEAR, "b", 4, 400.0))), clock)
    assert forecast.left_s is None
    take(forecast, clock, forecast.schedule.steps[0], 20.0)
    assert forecast.left_s == pytest.approx(200.0)


def test_the_latest_steps_of_a_kind_count_most():
    costs = Costs()
    for seconds in (10.0, 10.0, 10.0, *[1.0] * 12):
        costs.add(CHEAP, 1.0, seconds)
    assert costs.expected_s(CHEAP, 1.0) < 1.5 < (30 + 12) / 15
    assert costs.expected_s(DEAR, 10.0) == pytest.approx(10 * (30 + 12) / 15)
    assert Costs().expected_s(CHEAP, 1.0, unknown=7.0) == 7.0


def test_time_runs_down_while_a_step_goes_on_and_what_follows_keeps_its_time():
    clock, plan = Clock(), steps([CHEAP] * 3)
    forecast = Forecast(Schedule(tuple(plan)), clock)
    take(forecast, clock, plan[0], 8.0)
    forecast.begin(CHEAP, "1", 4)
    clock.now += 3
    assert forecast.left_s == pytest.approx(5 + 8)
    clock.now += 50  # much longer than expected
    assert forecast.left_s == pytest.approx(8)


def test_evaluations_and_time_are_counted_to_the_budget():
    clock, plan = Clock(), [*steps([CHEAP] * 10), PlannedStep("held-out", "result", 2, 3.0, counts=False)]
    forecast = Forecast(Schedule(tuple(plan), evaluations=10), clock)
    assert (forecast.done, forecast.total) == (0, 10)
    take(forecast, clock, plan[0], 4.0)
    # Six more evaluations, and the closing table, which no budget limits.
    assert (forecast.done, forecast.left_s) == (4, pytest.approx(6 + 3))
    timed = Forecast(Schedule(tuple(plan), seconds=20.0), clock)
    take(timed, clock, plan[0], 4.0)
    assert timed.left_s == pytest.approx(16 + 3)
    assert timed.total == 40


def test_a_session_that_goes_on_counts_what_was_done_before():
    clock, plan = Clock(), steps([CHEAP] * 10)
    forecast = Forecast(Schedule(tuple(plan), done=7, evaluations=20), clock)  # one of eight equalled another
    for step in plan[:2]:
        forecast.recorded(step.stage, step.unit)
    assert (forecast.done, forecast.total) == (7, 20)
    take(forecast, clock, plan[2], 4.0)
    assert (forecast.done, forecast.left_s) == (11, pytest.approx(9.0))


def test_steps_that_do_not_come_are_not_waited_for():
    clock = Clock()
    plan = steps([CHEAP] * 5 + [DEAR] * 5)
    forecast = Forecast(Schedule(tuple(plan)), clock)
    take(forecast, clock, plan[0], 4.0)
    take(forecast, clock, plan[7], 6.0, n=2)  # the other kind's third unit comes first, with fewer candidates
    assert (forecast.done, forecast.total) == (6, 6 + 4 * 4)
    take(forecast, clock, PlannedStep("unplanned", "x", 3, 0.0), 3.0)
    assert (forecast.done, forecast.total) == (9, 9 + 4 * 4)
    assert forecast.left_s == pytest.approx(4 * 4 * 6.0 / 2)


def test_candidates_scored_in_parts_count_once():
    clock, plan = Clock(), steps([CHEAP] * 2)
    forecast = Forecast(Schedule(tuple(plan)), clock)
    forecast.begin(CHEAP, "0", 4)
    for label in ("a", "b", "c", "d", "a", "b", "a"):  # a race: some on more questions
        forecast.candidate(label)
    assert forecast.done == 4
    forecast.end()
    forecast.candidate("of no step")
    assert forecast.done == 4


def test_a_step_along_gradients_counts_as_it_goes_on_and_is_put_right_at_its_end():
    clock, plan = Clock(), steps([CHEAP] * 2)
    forecast = Forecast(Schedule(tuple(plan), done=10), clock)
    forecast.begin(CHEAP, "0", 4)
    for spent, done in ((10.5, 10.5), (12.25, 12.25), (30, 14)):
        forecast.spent(spent)
        assert forecast.done == done
    forecast.end()
    assert forecast.done == 14
    forecast.spent(13.4)
    assert (forecast.done, forecast.total) == (13.4, 17.4)


def test_what_fits_is_cut_in_the_order_of_the_steps():
    plan = [PlannedStep("held-out", "donors", 2, 8.0, counts=False), *steps([CHEAP, DEAR])]
    cut = list(within(plan, 6))
    assert [(step.stage, step.n_candidates, step.work) for step in cut] == [
        ("held-out", 2, 8.0),
        (CHEAP, 4, 4.0),
        (DEAR, 2, 2.0),
    ]
    assert [affordable(plan, work) for work in (1.0, 8.0, 10.0, 12.0, 15.9, 16.0, 99.0)] == [0, 0, 2, 4, 7, 8, 8]
