"""What steps cost, learnt while a run goes on, and how long the rest of it will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

DECAY = 0.8  # how much a step tells of its kind's cost, against the step after it


@dataclass(frozen=True)
class PlannedStep:
    """A step that a run takes at most: its candidates, and the work of scoring them all, in one unit for all steps.

    `counts`: its candidates are evaluations of the search, which a budget limits; closing tables are not. `like`: the
    stage whose costs it has, where that is not its own.
    """

    stage: str
    unit: str
    n_candidates: int
    work: float
    counts: bool = True
    like: str = ""

    @property
    def kind(self) -> str:
        """What steps are told apart by where their costs are learnt."""
        return self.like or self.stage

    def limited_to(self, n_candidates: int) -> PlannedStep:
        """The same step with fewer candidates, and as much less work."""
        return replace(self, n_candidates=n_candidates, work=self.work * n_candidates / self.n_candidates)


@dataclass(frozen=True)
class Schedule:
    """The steps of a run in order, and what is left of its budget (None: no limit).

    `done` evaluations of earlier sessions are counted already; `evaluations` limits them and this session's together,
    `seconds` limits this session, but for what does not count.
    """

    steps: tuple[PlannedStep, ...]
    done: float = 0
    evaluations: int | None = None
    seconds: float | None = None


def within(steps: Iterable[PlannedStep], n_evaluations: float) -> Iterator[PlannedStep]:
    """The first steps of so many evaluations, the last of them in part; and every step that does not count."""
    for step in steps:
        taken = min(step.n_candidates, int(n_evaluations)) if step.counts else step.n_candidates
        n_evaluations -= taken if step.counts else 0
        if taken:
            yield step.limited_to(taken)


def affordable(steps: Iterable[PlannedStep], work: float) -> int:
    """How many evaluations are reached, taking steps in order, before so much work is done."""
    n = 0
    for step in steps:
        share = min(1.0, work / step.work) if step.work else 1.0
        n += int(share * step.n_candidates) if step.counts else 0
        work -= step.work
        if work <= 0:
            break
    return n


def evaluations(steps: Iterable[PlannedStep]) -> int:
    """How many candidates count."""
    return sum(step.n_candidates for step in steps if step.counts)


class Costs:
    """Seconds that a unit of work takes, for each kind of step; the latest steps of a kind count most."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[float, float]] = {}
        self._seconds = self._work = 0.0

    def add(self, kind: str, work: float, seconds: float) -> None:
        """A step of this kind has been taken."""
        if work > 0:
            before_s, before = self._kinds.get(kind, (0.0, 0.0))
            self._kinds[kind] = DECAY * before_s + seconds, DECAY * before + work
            self._seconds, self._work = self._seconds + seconds, self._work + work

    def expected_s(self, kind: str, work: float, unknown: float = math.nan) -> float:
        """Seconds that so much work of this kind will take: at its own cost, else at that of all, else `unknown`."""
        seconds, known = self._kinds.get(kind, (self._seconds, self._work))
        return work * seconds / known if known else unknown


class Forecast:
    """How far a run is and how long it will go on, from what an observer is told and the seconds of a clock.

    A step ends when it is said to, or when the next one begins; what passes between two steps belongs to the second.
    Planned steps that a later stage has overtaken will not be taken, and no longer count.
    """

    def __init__(self, schedule: Schedule, clock: Callable[[], float] = time.monotonic) -> None:
        self.schedule, self.clock, self.costs = schedule, clock, Costs()
        self._rest = list(schedule.steps)
        self._started = self._since = clock()
        self._done = schedule.done
        self._current: tuple[PlannedStep, ...] = ()  # the step that is going on; read by threads that draw
        self._labels: set[str] = set()
        self._reached = 0.0  # evaluations of the current step, where it counts them itself

    @property
    def done(self) -> float:
        """Evaluations done, of earlier sessions too."""
        most = evaluations(self._current)
        return self._done + min(most, max(len(self._labels), self._reached))

    @property
    def total(self) -> float:
        """Evaluations of the whole run: those done, and those of the plan that the budget pays for."""
        n = self._done + evaluations([*self._current, *self._rest])
        limit = self.schedule.evaluations
        return n if limit is None else max(self._done, min(n, limit))

    @property
    def left_s(self) -> float | None:
        """Seconds until the end, what does not count included; None as long as no step has been timed."""
        rest, limit, now = self._rest, self.schedule.evaluations, self.clock()
        if limit is not None:
            rest = list(within(rest, limit - self._done - evaluations(self._current)))
        # A step that takes longer than expected has no time left, and takes none from what follows it.
        current = [max(seconds - (now - self._since), 0.0) for seconds in self._expected(self._current)]
        searching = sum(current) + sum(self._expected(step for step in rest if step.counts))
        scoring = sum(self._expected(step for step in rest if not step.counts))
        if self.schedule.seconds is not None:
            searching = min(searching, max(0.0, self.schedule.seconds - (now - self._started)))
        return searching + scoring if math.isfinite(searching + scoring) else None

    def recorded(self, stage: str, unit: str) -> None:
        """A step was taken in an earlier session."""
        self._take(stage, unit, None)
        self._since = self.clock()

    def begin(self, stage: str, unit: str, n_candidates: int) -> None:
        """A step begins."""
        self.end()
        self._current = (self._take(stage, unit, n_candidates),)

    def candidate(self, label: str) -> None:
        """A candidate of the step has been scored, on some questions at least."""
        if len(self._labels) < sum(step.n_candidates for step in self._current):
            self._labels.add(label)

    def spent(self, n_evaluations: float) -> None:
        """So many evaluations have been done, by the count of the search."""
        if self._current:
            self._reached = n_evaluations - self._done
        else:
            self._done = n_evaluations

    def end(self) -> None:
        """The step is over, if one was going on."""
        now = self.clock()
        for step in self._current:
            self.costs.add(step.kind, step.work, now - self._since)
            self._since = now
        self._done += evaluations(self._current)
        self._current = ()
        self._labels.clear()
        self._reached = 0.0

    def _expected(self, steps: Iterable[PlannedStep]) -> list[float]:
        return [self.costs.expected_s(step.kind, step.work) for step in steps]

    def _take(self, stage: str, unit: str, n_candidates: int | None) -> PlannedStep:
        """Take a step out of those planned; it may have fewer candidates, come in another order, or come unplanned."""
        of_stage = [at for at, step in enumerate(self._rest) if step.stage == stage]
        if not of_stage:
            n = n_candidates or 0
            known = evaluations(self.schedule.steps)
            work = sum(step.work for step in self.schedule.steps if step.counts) / known if known else 1.0
            return PlannedStep(stage, unit, n, n * work)
        chosen = next((at for at in of_stage if self._rest[at].unit == unit), of_stage[0])
        step = self._rest.pop(chosen)
        del self._rest[: of_stage[0]]
        return step if n_candidates is None else step.limited_to(n_candidates)
