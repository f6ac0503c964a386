"""What a terminal shows of a run: the plan before it, and tables at its end."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from olmfast.config.resources import Budget
from olmfast.evaluation.metrics import BOUNDED, standard_error
from olmfast.report import paths as picture
from olmfast.runs.estimate import Estimate
from olmfast.runs.scoreboard import Scoreboard
from olmfast.runs.session import Result
from olmfast.runs.verdict import HELD_OUT, SELECTION, Verdict, verdict_on
from olmfast.search.log import strict

# Steps that are told only where they change something.
KINDS = {"selection": SELECTION, "holdout": HELD_OUT}  # the questions of a run, as they are told
QUIET = ("tensors", "svd_es", "norm_es", "gradient", "evolution", "moves", "evolve", "repeat", "paths")


def print_plan(plan: Estimate, as_json: bool) -> None:
    """What a run would do."""
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
        return
    limited = plan.budget is not None
    table = Table("stage", "units", "tensors", "candidates", *(["within the budget"] if limited else []))
    for name, stage in plan.stages.items():
        cells = [name, str(len(stage.units)), str(len(stage.tensors)), str(stage.n_candidates)]
        table.add_row(*cells, *([str(plan.within_budget[name])] if limited else []))
    cells = ["all", "", str(plan.n_tensors), str(plan.n_candidates)]
    table.add_row(*cells, *([str(plan.n_evaluations)] if limited else []))
    make_console().print(table)
    for note in plan.notes:
        print(note)
    if plan.budget is not None:
        print(_fits(plan, plan.budget))
    print(f"scored besides, not limited by a budget of evaluations: {_scored_besides(plan)}")
    if "gradient" in plan.stages:
        print("one round of the joint search; rounds repeat until one changes nothing, or the budget is spent")
    if plan.candidates:
        print(f"candidates of a unit: its current values; for each donor: {plan.candidates}")
    for why, n in plan.stays.items():
        print(f"{n} tensors keep the base's values: {why}")
    tokens = ", ".join(f"{name} {n}" for name, n in plan.vocabulary.items() if n)
    listed = f"; tokens listed by the tokenizers: {tokens}" if tokens else ""
    print(f"tokenizer: {plan.tokenizer}'s; vocabulary: {plan.n_rows} rows in every donor{listed}")
    for name, (mode, n_samples) in plan.datasets.items():
        print(f"{name}: {mode}, {n_samples} samples{_likely_error(mode, n_samples)}")
    if any(mode in BOUNDED for mode, _ in plan.datasets.values()):
        print(
            "these errors are assumed, not measured: scores spread by half the range between the donors; where donors "
            "are nearer to each other, errors are larger"
        )
    few = ", which is too little" if plan.memory_limit < plan.memory_bytes else ""
    dtype = str(plan.dtype).removeprefix("torch.")
    print(
        f"memory: at least {decimal(plan.memory_bytes)} on {plan.device} in {dtype} (an estimate), "
        f"{decimal(plan.memory_limit)} allowed{few}"
    )
    if plan.streams:
        print(
            f"the model takes {decimal(plan.model_bytes)}, with libraries and activations more than is allowed: its "
            "blocks are streamed, two of them in memory at a time, which costs time, most where answers are decoded"
        )
    print(
        f"time: about {timedelta(seconds=math.ceil(plan.seconds))} at the {plan.flop_per_s / 1e9:.3g} GFLOP/s that a "
        "trial product reached (an estimate: decoding and everything but matrix products add to it, racing and equal "
        f"donors reduce it); {timedelta(seconds=math.ceil(plan.scoring_s))} of it for what is scored besides"
    )
    if plan.faster_dtype is not None:
        faster, times = plan.faster_dtype
        print(
            f"{faster} products are {times:.1f} times faster than {dtype} here; dtype: {faster} may be faster, but "
            "decoding, which is small products, may not: try it"
        )
    there = " (exists: --overwrite or --resume will be needed)" if plan.output_dir.exists() else ""
    print(
        f"result: {decimal(plan.n_bytes)} in {plan.output_dir}{there}, {decimal(plan.free_bytes)} free there; "
        "nothing has been written"
    )


def _fits(plan: Estimate, budget: Budget) -> str:
    """How many candidates are tried before the budget is spent."""
    fitting = f"{plan.n_evaluations} of at most {plan.n_candidates} candidates"
    if budget.seconds is None:
        return f"{fitting} fit the budget"
    limit = timedelta(seconds=math.ceil(budget.seconds))
    return f"about {fitting} are expected to fit the budget of {limit}, at the rate given with the time below"


def _scored_besides(plan: Estimate) -> str:
    """Which models are scored on which questions, and how many."""
    besides = [step for step in plan.steps if not step.counts]
    return ", ".join(f"{step.stage} questions: {step.unit} ({step.n_candidates})" for step in besides)


def _likely_error(mode: str, n_samples: int) -> str:
    if mode not in BOUNDED:
        return ""
    now, then = standard_error(n_samples), standard_error(4 * n_samples)
    return f"; a skill's standard error is about {now:.2g}; {4 * n_samples} would give {then:.2g}"


def print_result(result: Result, as_json: bool) -> None:
    """Which donor won each unit, and the scores of the result and every donor, selection and held-out apart."""
    if as_json:
        content = {
            "output_dir": str(result.output_dir),
            "status": result.status,
            "selection": result.selection.to_json(),
            "holdout": result.holdout.to_json() if result.holdout.rows else None,
            "verdict": result.verdict and result.verdict.to_json(),
            **({} if result.final_eval is None else {"final_eval": result.final_eval.to_json()}),
            "choices": {f"{o.stage}/{o.unit}": o.winner for o in result.record.choices()},
        }
        print(json.dumps(strict(content), indent=2))
        return
    table = Table("unit", "from", title="What was chosen", title_justify="left")
    for outcome in result.record.choices():
        if outcome.changed or outcome.stage not in QUIET:
            table.add_row(outcome.where, outcome.winner + ("" if outcome.changed else " (kept)"))
    if table.rows:
        make_console().print(table)
    if report := result.record.values.get("repeats"):
        _print_repeats(report)
    if report := result.record.values.get("paths"):
        _print_front(report)
    boards = {"Selection": result.selection, "Held-out": result.holdout}
    for title, board in boards.items():
        if board.rows or title == "Selection":
            _print_board(board, f"{title} scores (lower is better)")
    _print_verdict(result.verdict, {})
    if result.final_eval is not None:
        print_rows(result.final_eval.table(), result.final_eval.title)
    left = "" if result.status == "finished" else "; the budget is spent, --resume with a larger one continues"
    output = Path(os.path.normpath(result.output_dir))
    shown = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    print(f"\n{shown}: {result.status}{left}")


def _print_repeats(report: Mapping[str, Any]) -> None:
    """The best ranges of blocks run twice, with intervals."""
    title = f"Blocks run twice, on {report['questions']} questions (gain: share of the model's error that is gone)"
    print_rows(picture.table(report), title)
    print(f"{picture.summary(report)}; all ranges are in {picture.PICTURE}")


def _print_front(report: Mapping[str, Any]) -> None:
    """The best path of each depth, with intervals."""
    asked = f"on {report['questions']} questions (gain: share of the first model's error that is gone)"
    print_rows(picture.front_table(report), f"Score against depth, {asked}")
    print(f"{report['comparisons']} paths of at most {report['max_hops']} hops were compared on other questions")


def print_rows(rows: list[list[str]], title: str) -> None:
    """A table whose first row is its head."""
    head, *others = rows
    table = Table(*head, title=title, title_justify="left")
    for row in others:
        table.add_row(*row)
    make_console().print(table)


def print_scoreboard(board: Scoreboard, title: str, as_json: bool, model: str | None = None) -> None:
    """A row per model, and how the row `model` compares with the others."""
    if as_json:
        print(json.dumps(strict(_told(board, model)), indent=2))
        return
    _print_board(board, title)
    _print_verdict(
        verdict_on(model, board) if model is not None else None, _short([*board.rows]) | _short(board.datasets)
    )


def print_comparison(board: Scoreboard, title: str) -> None:
    """A row per model: its mean score per dataset within its 95 % interval, and the share of right answers."""
    datasets = _short(board.datasets)
    table = Table("model", *(board.heading(name, shown) for name, shown in datasets.items()), title=title)
    table.title_justify = "left"
    for label in board.rows:
        table.add_row(label, *(_within(board, label, name) for name in board.datasets))
    make_console().print(table)


def _within(board: Scoreboard, label: str, dataset: str) -> str:
    scores = board.scores_of([label], dataset)[0]
    margin = 1.96 * float(scores.std()) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    right = board.accuracy.get(label, {}).get(dataset)
    told = "" if right is None else f", {right:.1%} right"
    return f"{board.rows[label][dataset]:.4f} ± {margin:.4f}{told}"


def print_scoreboards(boards: Mapping[str, Scoreboard], as_json: bool, model: str) -> None:
    """The boards of a run's questions, selection and held-out, and how the row `model` compares on each."""
    if as_json:
        print(json.dumps(strict({part: _told(board, model, KINDS[part]) for part, board in boards.items()}), indent=2))
        return
    for part, board in boards.items():
        _print_board(board, f"{KINDS[part].capitalize()} scores (lower is better)")
        _print_verdict(verdict_on(model, board, KINDS[part]), _short([*board.rows]) | _short(board.datasets))


def _told(board: Scoreboard, model: str | None, kind: str = "") -> dict[str, Any]:
    verdict = verdict_on(model, board, kind) if model is not None else None
    return board.to_json() | {"verdict": verdict and verdict.to_json()}


def _print_board(board: Scoreboard, title: str) -> None:
    """A row per model: its scores and accuracy per dataset, and where there is a scale, the skill it retains."""
    models, datasets = _short([*board.rows]), _short(board.datasets)
    headings = [board.heading(name, shown) for name, shown in datasets.items()]
    table = Table("model", *headings, *(["skill retained"] if board.has_scale else []), title=title)
    table.title_justify = "left"
    for label in board.rows:
        cells = [board.cell(label, name) for name in board.datasets]
        table.add_row(models[label], *cells, *([f"{board.retained(label):.3f}"] if board.has_scale else []))
    make_console().print(table)
    if remark := board.remark():
        print(remark)


def _print_verdict(verdict: Verdict | None, shown: dict[str, str]) -> None:
    if verdict is not None:
        print("", *verdict.lines(shown), sep="\n")


def _short(names: list[str]) -> dict[str, str]:
    """Paths by their last part where that tells them apart; everything else unchanged."""
    last = [Path(name).name for name in names]
    return {
        name: short if Path(name).is_absolute() and last.count(short) == 1 else name
        for name, short in zip(names, last, strict=True)
    }


def make_console() -> Console:
    # A pipe has no width: tables must not be folded there.
    return Console(markup=False) if sys.stdout.isatty() else Console(width=200, markup=False)
