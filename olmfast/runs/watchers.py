"""Who watches a run, a line at a time: what a terminal that is none shows, and the log beside the report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TextIO

from olmfast.observer import Observer
from olmfast.search.costs import Forecast, Schedule
from olmfast.search.log import Outcome

EVERY_S = 30.0  # between two lines that say how far a run is
RUN_LOG = "run.log"


class Watcher(Observer):
    """An observer that can be entered and left and knows how far a run is; shows nothing by itself."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun = False  # the search: before it, there is no step to finish
        self.forecast = Forecast(Schedule(()), clock)

    def planned(self, schedule: Schedule) -> None:
        """What is left is counted from here."""
        self.begun = True
        self.forecast = Forecast(schedule, self.clock)

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """Another step is going on."""
        self.forecast.begin(stage, unit, n_candidates)

    def candidate(self, label: str) -> None:
        """One more is done."""
        self.forecast.candidate(label)

    def spent(self, evaluations: float) -> None:
        """As the search counts them."""
        self.forecast.spent(evaluations)

    def chosen(self, outcome: Outcome) -> None:  # noqa: ARG002
        """Its step is done."""
        self.forecast.end()

    def recorded(self, outcome: Outcome) -> None:
        """Its step needs no time."""
        self.forecast.recorded(outcome.stage, outcome.unit)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


class Lines(Watcher):
    """Plain lines, for logs and pipes, with the time since the start: one per stage, one for what changed, and how far
    the run is every 30 s, or when the next candidate or step along a gradient is done."""

    def __init__(self, verbose: bool, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.verbose = verbose
        self.started = self.said = clock()
        self.stage, self.where = "", ""

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """A line when a new stage begins, or for every step when verbose."""
        super().step(stage, unit, n_candidates)
        self.where = told_where(stage, unit)
        if stage != self.stage or self.verbose:
            self._print(f"{stage} {unit}: {n_candidates} candidates")
            self.stage = stage
        self._say_how_far()

    def candidate(self, label: str) -> None:
        """A line if the last one is old."""
        super().candidate(label)
        self._say_how_far()

    def spent(self, evaluations: float) -> None:
        """A line if the last one is old."""
        super().spent(evaluations)
        self._say_how_far()

    def chosen(self, outcome: Outcome) -> None:
        """A line when something changed, or for every step when verbose."""
        super().chosen(outcome)
        if outcome.changed or self.verbose:
            self._print(f"{outcome.stage} {outcome.unit}: {outcome.winner}{told_gain(outcome)}")
        self._say_how_far()

    def note(self, text: str) -> None:
        """A line."""
        self._print(text)

    def _say_how_far(self) -> None:
        if self.clock() - self.said >= EVERY_S:
            self.said = self.clock()
            counted = f"{self.forecast.done:.0f} of {self.forecast.total:.0f} evaluations"
            self._print(f"{counted}; {self.where}; {told_time(self.forecast.left_s)} left")

    def _print(self, text: str) -> None:
        print(f"[{self.clock() - self.started:7.1f}s] {text}", file=sys.stderr, flush=True)


class RunLog(Lines):
    """All that `Lines` says when it is verbose, with the time of day, in a file that each session goes on with.

    Lines before `begin` wait for it. A line that cannot be written is lost: the run goes on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(verbose=True, clock=clock)
        self._waiting: list[str] = []
        self._file: TextIO | None = None

    def begin(self, folder: Path) -> None:
        """Write to the log in this folder from here on, which may be renamed meanwhile."""
        with suppress(OSError):
            self._file = (folder / RUN_LOG).open("a", encoding="utf-8")
        self._flush()

    def end(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _print(self, text: str) -> None:
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        self._waiting += [f"{stamp} {line}\n" for line in text.splitlines()]
        self._flush()

    def _flush(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.writelines(self._waiting)
                self._file.flush()
            self._waiting = []


class Both(Observer):
    """Tells several observers of a run the same."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def planned(self, schedule: Schedule) -> None:
        """To each."""
        for one in self.observers:
            one.planned(schedule)

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """To each."""
        for one in self.observers:
            one.step(stage, unit, n_candidates)

    def candidate(self, label: str) -> None:
        """To each."""
        for one in self.observers:
            one.candidate(label)

    def spent(self, evaluations: float) -> None:
        """To each."""
        for one in self.observers:
            one.spent(evaluations)

    def chosen(self, outcome: Outcome) -> None:
        """To each."""
        for one in self.observers:
            one.chosen(outcome)

    def recorded(self, outcome: Outcome) -> None:
        """To each."""
        for one in self.observers:
            one.recorded(outcome)

    def note(self, text: str) -> None:
        """To each."""
        for one in self.observers:
            one.note(text)


def told_where(stage: str, unit: str) -> str:
    """Stage and unit, in a line."""
    return stage if stage == unit else f"{stage} {unit}"


def told_gain(outcome: Outcome) -> str:
    """By how much the winner is better, where that is known."""
    return "" if outcome.gain is None else f", {outcome.gain:+.3f}"


def told_time(seconds: float | None) -> str:
    """A number of seconds, if it is known."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=math.ceil(seconds)))
