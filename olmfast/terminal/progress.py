"""Progress while a run goes on: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from olmfast.observer import Observer
from olmfast.search.costs import Forecast, Schedule
from olmfast.search.log import Outcome

EVERY_S = 30.0  # between two lines that say how far a run is


class Watcher(Observer):
    """An observer that can be entered and left and knows how far a run is; shows nothing by itself."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.forecast = Forecast(Schedule(()), clock)

    def planned(self, schedule: Schedule) -> None:
        """What is left is counted from here."""
        self.forecast = Forecast(schedule, self.clock)

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """Another step is going on."""
        self.forecast.begin(stage, unit, n_candidates)

    def candidate(self, label: str) -> None:
        """One more is done."""
        self.forecast.candidate(label)

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
    the run is every 30 s, or when the next candidate is done."""

    def __init__(self, verbose: bool, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.verbose = verbose
        self.started = self.said = clock()
        self.stage, self.where = "", ""

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """A line when a new stage begins, or for every step when verbose."""
        super().step(stage, unit, n_candidates)
        self.where = _where(stage, unit)
        if stage != self.stage or self.verbose:
            self._print(f"{stage} {unit}: {n_candidates} candidates")
            self.stage = stage
        self._say_how_far()

    def candidate(self, label: str) -> None:
        """A line if the last one is old."""
        super().candidate(label)
        self._say_how_far()

    def chosen(self, outcome: Outcome) -> None:
        """A line when something changed, or for every step when verbose."""
        super().chosen(outcome)
        if outcome.changed or self.verbose:
            self._print(f"{outcome.stage} {outcome.unit}: {outcome.winner}{_gain(outcome)}")
        self._say_how_far()

    def note(self, text: str) -> None:
        """A line."""
        self._print(text)

    def _say_how_far(self) -> None:
        if self.clock() - self.said >= EVERY_S:
            self.said = self.clock()
            counted = f"{self.forecast.done} of {self.forecast.total} evaluations"
            self._print(f"{counted}; {self.where}; {_time(self.forecast.left_s)} left")

    def _print(self, text: str) -> None:
        print(f"[{self.clock() - self.started:7.1f}s] {text}", file=sys.stderr, flush=True)


class Bars(Watcher):
    """A live bar with stage, unit, candidate, best so far and the time left."""

    def __init__(self, verbose: bool, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.console = Console(stderr=True)
        self.verbose = verbose
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeLeft(self),
            TextColumn("{task.fields[best]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.progress.add_task("starting", total=None, best="")
        self.where, self.n_changed = "", 0

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def planned(self, schedule: Schedule) -> None:
        """The bar's length."""
        super().planned(schedule)
        self._show()

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """Shows where the run is."""
        super().step(stage, unit, n_candidates)
        self.where = escape(_where(stage, unit))
        self._show(description=self.where)

    def candidate(self, label: str) -> None:
        """Advances the bar."""
        super().candidate(label)
        self._show(description=f"{self.where} · {escape(label)}")

    def chosen(self, outcome: Outcome) -> None:
        """A line above the bar for what changed, or for every decision when verbose."""
        super().chosen(outcome)
        self.n_changed += outcome.changed
        self._show(best=f"{self.n_changed} improvements")
        if outcome.changed or self.verbose:
            unit, winner = escape(outcome.unit), escape(outcome.winner)
            self.console.print(f"{outcome.stage} [bold]{unit}[/]: {winner}{_gain(outcome)}", highlight=False)

    def recorded(self, outcome: Outcome) -> None:
        """Advances the bar past a step of an earlier session."""
        super().recorded(outcome)
        self._show()

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, markup=False)

    def _show(self, **changes: Any) -> None:
        self.progress.update(self.task, completed=self.forecast.done, total=self.forecast.total or None, **changes)


class TimeLeft(ProgressColumn):
    """The forecast of what watches a run."""

    max_refresh = 0.5

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def render(self, task: Task) -> Text:  # noqa: ARG002
        """The time left, as hours, minutes and seconds."""
        return Text(_time(self.watcher.forecast.left_s), style="progress.remaining")


def _where(stage: str, unit: str) -> str:
    return stage if stage == unit else f"{stage} {unit}"


def _gain(outcome: Outcome) -> str:
    return "" if outcome.gain is None else f", {outcome.gain:+.3f}"


def _time(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=math.ceil(seconds)))


def make_observer(quiet: bool, verbose: bool) -> Watcher:
    """Bars on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return Watcher()
    return Bars(verbose) if sys.stderr.isatty() else Lines(verbose)
