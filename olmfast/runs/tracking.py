"""A run told to an experiment tracker while it goes on: numbers of each step, and the closing tables at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from olmfast.config.run import RunConfig
from olmfast.errors import told
from olmfast.observer import Observer
from olmfast.runs.scoreboard import Scoreboard
from olmfast.runs.trackers import Mlflow, Tensorboard, Tracker, Wandb, load_tracker
from olmfast.runs.watchers import Both
from olmfast.search.log import Outcome
from olmfast.search.record import Record


class Tracking(Observer):
    """Tells a tracker of each step. One that fails is told of once, and no more is sent: the run goes on."""

    def __init__(self, begin: Callable[[], Tracker], name: str, record: Record, tell: Callable[[str], None]) -> None:
        self.name, self.record, self.tell = name, record, tell
        self.tracker: Tracker | None = None
        self._tried(lambda: setattr(self, "tracker", begin()))

    def chosen(self, outcome: Outcome) -> None:
        """A line: what the current model scores now, by how much it got better, and what that took."""
        values: dict[str, float | None] = {
            f"score/{name}": by.get(outcome.winner) for name, by in outcome.metrics.items()
        }
        values |= {"gain": outcome.gain, "changed": float(outcome.changed), "evaluations": self.record.evaluations}
        self._send(lambda tracker: tracker.log(_numbers(values), len(self.record.steps)))

    def end(self) -> None:
        """The closing tables, if there are any yet."""
        summary = dict(_closing(self.record.values))
        self._send(lambda tracker: tracker.end(_numbers(summary), len(self.record.steps) + 1))

    def _send(self, call: Callable[[Tracker], None]) -> None:
        tracker = self.tracker
        if tracker is not None:
            self._tried(lambda: call(tracker))

    def _tried(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of whatever a tracker's client raises; a run must not end by it
            self.tracker = None
            self.tell(f"track: {self.name} failed and is told no more: {told(error)}")


@contextmanager
def tracked(config: RunConfig, record: Record, observer: Observer) -> Iterator[Observer]:
    """The observer, and with it the tracker that the config names, for as long as the run goes on."""
    module = load_tracker(config.track)
    if config.track is None:
        yield observer
        return
    name, told_of = config.output_dir.name, config.decisive()
    kinds: dict[str, Callable[[], Tracker]] = {
        "trackio": lambda: Wandb(module, name, told_of),
        "wandb": lambda: Wandb(module, name, told_of),
        "mlflow": lambda: Mlflow(module, name, told_of),
        "tensorboard": lambda: Tensorboard(module, config.output_dir.parent / "tensorboard" / name, told_of),
    }
    tracking = Tracking(kinds[config.track], config.track, record, observer.note)
    try:
        yield Both([observer, tracking])
    finally:
        tracking.end()


def _closing(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Each model's scores and skill retained, by the kind of questions."""
    for key in ("holdout", "selection"):
        if not values.get(key):
            continue
        board = Scoreboard.from_json(values[key])
        for label, row in board.rows.items():
            yield from ((f"{key}/{label}/{name}", score) for name, score in row.items())
            if board.has_scale and len(board.donors) > 1:
                yield f"{key}/{label}/skill retained", board.retained(label)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}
