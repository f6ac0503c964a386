"""A run as its record tells it: what a report is made of, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from olmfast.errors import InputError
from olmfast.runs.scoreboard import RESULT, Scoreboard
from olmfast.runs.verdict import HELD_OUT, SELECTION, Verdict, of_run
from olmfast.search.log import STEPS, Outcome
from olmfast.search.record import REPORT, Record
from olmfast.weights.recipe import Recipe


@dataclass(frozen=True)
class Taken:
    """A step; `evaluations` are the run's up to and with it, None where the record does not say."""

    key: str
    outcome: Outcome
    evaluations: float | None


@dataclass(frozen=True)
class History:
    """What a record holds. `recipe` is the result's, `start` what a search with tests began with, if it is known."""

    header: Mapping[str, Any]
    values: Mapping[str, Any]
    status: str
    steps: tuple[Taken, ...]
    recipe: Recipe | None
    start: Recipe | None
    evaluations: float

    @classmethod
    def of(cls, record: Record) -> History:
        """What a record says."""
        steps = (Taken(key, outcome, record.spent[key]) for key, outcome in record.steps.items())
        recipes = record.validated or record.recipe, record.snapshots.get("start")
        return cls(record.header, record.values, record.status, tuple(steps), *recipes, record.evaluations)

    @classmethod
    def read(cls, folder: Path) -> History:
        """What is recorded in a folder: of a run, finished or not, or of a model pruned without a search.

        Raises InputError where there is no record, or one that cannot be read.
        """
        path = folder / REPORT
        if (folder / STEPS).is_file() and not (_is_older(folder / STEPS) and path.is_file()):
            return cls.of(Record.load(folder))
        if not path.is_file():
            raise InputError(f"{folder}: holds no {STEPS} and no {REPORT}, so there is nothing to report")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("olmfast"), dict):
            raise InputError(f"{path}: was not written by olmfast, so that it lacks what a report tells")
        return cls.from_report(data["olmfast"], str(path))

    @classmethod
    def from_report(cls, data: Mapping[str, Any], where: str) -> History:
        """What the part of a `merge_report.json` that is olmfast's own says. Raises InputError for another form."""
        try:
            recipe = data.get("recipe")
            steps = (Taken(key, Outcome(**one), None) for key, one in data.get("steps", {}).items())
            told = (str(data["status"]), tuple(steps), Recipe.from_json(recipe) if recipe else None)
            return cls(data, data, *told, None, float(data.get("evaluations", 0)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: is damaged: {error!r}") from error

    @cached_property
    def boards(self) -> dict[str, Scoreboard]:
        """Kind of questions -> the closing table of them, the held-out ones first; only those with scores."""
        named = ((HELD_OUT, "holdout"), (SELECTION, "selection"))
        found = {kind: Scoreboard.from_json(self.values[key]) for kind, key in named if self.values.get(key)}
        return {kind: board for kind, board in found.items() if board.rows}

    @property
    def board(self) -> Scoreboard | None:
        """The table that tells how good the result is: of questions that chose nothing, if there are any."""
        return next(iter(self.boards.values()), None)

    @property
    def result(self) -> str:
        """What the closing tables call the result."""
        rows = list(self.board.rows) if self.board else []
        return RESULT if RESULT in rows or not rows else rows[-1]

    @cached_property
    def verdict(self) -> Verdict | None:
        """How the result of a run compares; None where that cannot be said, or is none of a run's."""
        empty = Scoreboard([])
        selection, held_out = (self.boards.get(kind, empty) for kind in (SELECTION, HELD_OUT))
        return of_run(selection, held_out, self.values.get("expected"))

    @property
    def donors(self) -> list[str]:
        """The models that it is made of."""
        return list(self.header.get("donors", {}))


def _is_older(log: Path) -> bool:
    """Whether a version wrote it that did not seal lines: what it wrote beside it is read instead."""
    with log.open("rb") as file:
        return b'"seal"' not in file.readline()
