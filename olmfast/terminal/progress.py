"""Progress while a run goes on: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
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

from olmfast.runs.watchers import Lines, Watcher, told_gain, told_time, told_where
from olmfast.search.costs import Schedule
from olmfast.search.log import Outcome


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
        self.where = escape(told_where(stage, unit))
        self._show(description=self.where, refresh=True)  # else a step shorter than a frame would never be seen

    def candidate(self, label: str) -> None:
        """Advances the bar."""
        super().candidate(label)
        self._show(description=f"{self.where} · {escape(label)}")

    def spent(self, evaluations: float) -> None:
        """Advances the bar."""
        super().spent(evaluations)
        self._show()

    def chosen(self, outcome: Outcome) -> None:
        """A line above the bar for what changed, or for every decision when verbose."""
        super().chosen(outcome)
        self.n_changed += outcome.changed
        self._show(best=f"{self.n_changed} improvements")
        if outcome.changed or self.verbose:
            unit, winner = escape(outcome.unit), escape(outcome.winner)
            self.console.print(f"{outcome.stage} [bold]{unit}[/]: {winner}{told_gain(outcome)}", highlight=False)

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
        return Text(told_time(self.watcher.forecast.left_s), style="progress.remaining")


def make_observer(quiet: bool, verbose: bool) -> Watcher:
    """Bars on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return Watcher()
    return Bars(verbose) if sys.stderr.isatty() else Lines(verbose)
