"""The parts of a report that are tables: scores, comparisons, distances, steps. Numbers become text here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from olmfast.report.drawings import Interval
from olmfast.report.history import History, Taken
from olmfast.report.measures import Measure
from olmfast.runs.scoreboard import Scoreboard
from olmfast.runs.verdict import NORMAL

MOST_STEPS = 300  # that are told one by one
MOST_ROWS = 3000  # candidates in all of them
MOST_CANDIDATES = 40  # of one step
MOST_COLUMNS = 8  # datasets beside each other in a step


@dataclass(frozen=True)
class Table:
    """Headings, and rows of cells, of which `marked` is the one to look at (-1: none).

    The rows of one that has `many` columns become lists where the page is narrow.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int = -1
    many: bool = False


@dataclass(frozen=True)
class ToldStep:
    """A step in a line, and its candidates; `gap` is how many steps before it are left out."""

    number: int
    title: str
    told: str
    changed: bool
    table: Table
    notes: Sequence[str] = ()
    gap: int = 0


@dataclass(frozen=True)
class ToldSteps:
    """The steps that are told, and what is not; `stages` counts all of them."""

    steps: Sequence[ToldStep]
    stages: Table
    total: int
    rest: int = 0  # left out after the last one
    left_out: int = field(default=0)


def names_shown(names: Sequence[str]) -> dict[str, str]:
    """Paths by their last part where that tells them apart; everything else unchanged."""
    last = [Path(name).name for name in names]
    return {name: short if last.count(short) == 1 and short else name for name, short in zip(names, last, strict=True)}


def scores_table(board: Scoreboard, result: str, shown: Mapping[str, str]) -> Table:
    """Models by datasets, with accuracy, and skill retained where there is a scale."""
    scale = board.has_scale and len(board.donors) > 1
    head = ["model", *(board.heading(name, shown.get(name, name)) for name in board.datasets)]
    rows = []
    for label in board.rows:
        cells = [shown.get(label, label), *(board.cell(label, name) for name in board.datasets)]
        rows.append([*cells, *([f"{board.retained(label):.3f}"] if scale else [])])
    marked = list(board.rows).index(result) if result in board.rows else -1
    return Table([*head, *(["skill retained"] if scale else [])], rows, marked, many=True)


def skills_of(board: Scoreboard) -> dict[str, dict[str, Interval]]:
    """Dataset -> model -> the skill that it retains, with half of its 95 % interval over the questions."""
    found: dict[str, dict[str, Interval]] = {}
    spans, left_out = board.spans, board.without_span()
    for name in board.datasets:
        if name in left_out or len(board.donors) < 2:
            continue
        best, worst = spans[name]
        found[name] = {}
        for label in board.rows:
            half = 0.0
            if label in board.samples and len(board.samples[label][name]) > 1:
                scores = board.scores_of([label], name)[0]
                half = NORMAL * float(scores.std()) / math.sqrt(len(scores)) / (worst - best)
            found[name][label] = Interval((worst - board.rows[label][name]) / (worst - best), half)
    return found


def distances_table(anchor: Mapping[str, Any], shown: Mapping[str, str]) -> Table:
    """How far each donor is from what task vectors are taken from: overall, by depth and by kind."""
    by_part: Mapping[str, Mapping[str, float]] = anchor["distances"]
    donors = list(next(iter(by_part.values()), {}))
    rows = [[_part(part), *(_number(own.get(donor)) for donor in donors)] for part, own in by_part.items()]
    return Table(["part", *(shown.get(donor, donor) for donor in donors)], rows)


def steps_of(history: History, measure: Measure, shown: Mapping[str, str]) -> ToldSteps:
    """Every step, or where these are too many those that changed something first, with candidates and margins."""
    chosen = _chosen(history.steps)
    told, before = [], -1
    for number in chosen:
        told.append(_step(history.steps[number], number, number - before - 1, measure, shown))
        before = number
    total = len(history.steps)
    rest = total - 1 - before
    return ToldSteps(told, _stages(history.steps), total, rest, total - len(chosen))


def _chosen(steps: Sequence[Taken]) -> list[int]:
    """Which steps are told: what changed something goes first, its beginning and its end before its middle."""
    changed = [number for number, taken in enumerate(steps) if taken.outcome.changed]
    changed = [*changed[: MOST_STEPS // 3], *changed[MOST_STEPS // 3 :][::-1]]
    others = [number for number, taken in enumerate(steps) if not taken.outcome.changed]
    found: list[int] = []
    rows = 0
    for number in [*changed, *others]:
        rows += min(MOST_CANDIDATES, len(_labels(steps[number])))
        if len(found) == MOST_STEPS or (rows > MOST_ROWS and found):
            break
        found.append(number)
    return sorted(found)


def _step(taken: Taken, number: int, gap: int, measure: Measure, shown: Mapping[str, str]) -> ToldStep:
    outcome = taken.outcome
    values = {label: measure.value(outcome, label) for label in _labels(taken)}
    best = values.get(outcome.winner, math.nan)
    ordered = sorted(values, key=lambda label: _place(values[label], measure) if label != outcome.winner else -math.inf)
    datasets = list(outcome.metrics)[:MOST_COLUMNS]
    rows = []
    for label in ordered[:MOST_CANDIDATES]:
        behind = best - values[label] if measure.higher_is_better else values[label] - best
        scores = [_number(outcome.metrics[name].get(label)) for name in datasets]
        rows.append([shown.get(label, label), _signed(values[label]), _signed(behind), *scores])
    what = "skill" if measure.higher_is_better else "against first"
    head = ["candidate", what, "behind", *(shown.get(name, name) for name in datasets)]
    notes = [f"not scored: {shown.get(label, label)}: {why}" for label, why in list(outcome.dropped.items())[:10]]
    if len(ordered) > MOST_CANDIDATES:
        notes.append(f"{len(ordered) - MOST_CANDIDATES} more candidates are in evaluations.jsonl")
    if len(outcome.metrics) > len(datasets):
        notes.append(f"{len(outcome.metrics) - len(datasets)} more datasets are in evaluations.jsonl")
    gain = "" if outcome.gain is None else f", {outcome.gain:+.3f}"
    spent = "" if taken.evaluations is None else f"after {taken.evaluations:g} evaluations"
    winner = shown.get(outcome.winner, outcome.winner)
    title = f"{outcome.where}: {winner if outcome.changed else 'nothing changed'}{gain}"
    return ToldStep(number + 1, title, spent, outcome.changed, Table(head, rows, 0 if rows else -1), notes, gap)


def _labels(taken: Taken) -> list[str]:
    return list(dict.fromkeys(label for by in taken.outcome.metrics.values() for label in by))


def _stages(steps: Sequence[Taken]) -> Table:
    """Each stage's steps in a row, in the order in which it was first taken."""
    order = list(dict.fromkeys(taken.outcome.stage for taken in steps))
    by_stage = {
        stage: list(own)
        for stage, own in groupby(
            sorted(steps, key=lambda taken: order.index(taken.outcome.stage)), lambda taken: taken.outcome.stage
        )
    }
    rows = []
    for stage, own in by_stage.items():
        gains = [taken.outcome.gain for taken in own if taken.outcome.changed and taken.outcome.gain is not None]
        largest = f"{max(gains):+.3f}" if gains else ""
        rows.append([stage, f"{len(own):,}", f"{sum(taken.outcome.changed for taken in own):,}", largest])
    return Table(["stage", "steps", "that changed something", "largest gain"], rows)


def _place(value: float, measure: Measure) -> float:
    if math.isnan(value):
        return math.inf
    return -value if measure.higher_is_better else value


def _part(name: str) -> str:
    return f"blocks {name}" if name[:1].isdigit() else name


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""
