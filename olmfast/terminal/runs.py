"""What a terminal shows: progress while a run goes on, and tables at its end."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from olmfast.observer import Observer
from olmfast.runs.estimate import Estimate
from olmfast.runs.scoreboard import Scoreboard
from olmfast.runs.session import Result
from olmfast.search.log import Outcome


class Watcher(Observer):
    """An observer that can be entered and left; shows nothing by itself."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


class Lines(Watcher):
    """Plain lines, for logs and pipes: one per stage and decision, with the time since the start."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.started = time.monotonic()
        self.stage = ""

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """A line when a new stage begins, or for every step when verbose."""
        if stage != self.stage or self.verbose:
            self._print(f"{stage} {unit}: {n_candidates} candidates")
            self.stage = stage

    def chosen(self, outcome: Outcome) -> None:
        """A line when something changed, or for every step when verbose."""
        if outcome.changed or self.verbose:
            self._print(f"{outcome.stage} {outcome.unit}: {outcome.winner}")

    def note(self, text: str) -> None:
        """A line."""
        self._print(text)

    def _print(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:7.1f}s] {text}", file=sys.stderr, flush=True)


class Bars(Watcher):
    """A live bar with stage, unit, candidate, best so far and the time left."""

    def __init__(self, verbose: bool) -> None:
        self.console = Console(stderr=True)
        self.verbose = verbose
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
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

    def planned(self, n_candidates: int) -> None:
        """The bar's length."""
        self.progress.update(self.task, total=n_candidates)

    def step(self, stage: str, unit: str, n_candidates: int) -> None:  # noqa: ARG002
        """Shows where the run is."""
        self.where = escape(f"{stage} {unit}")
        self.progress.update(self.task, description=self.where)

    def candidate(self, label: str) -> None:
        """Advances the bar."""
        self.progress.update(self.task, advance=1, description=f"{self.where} · {escape(label)}")

    def chosen(self, outcome: Outcome) -> None:
        """A line above the bar for what changed, or for every decision when verbose."""
        self.n_changed += outcome.changed
        self.progress.update(self.task, best=f"{self.n_changed} improvements")
        if outcome.changed or self.verbose:
            self.console.print(
                f"{outcome.stage} [bold]{escape(outcome.unit)}[/]: {escape(outcome.winner)}", highlight=False
            )

    def recorded(self, outcome: Outcome) -> None:
        """Advances the bar past a step of an earlier session."""
        self.progress.update(self.task, advance=max((len(by) for by in outcome.metrics.values()), default=0))

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, markup=False)


def make_observer(quiet: bool, verbose: bool) -> Watcher:
    """Bars on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return Watcher()
    return Bars(verbose) if sys.stderr.isatty() else Lines(verbose)


def print_plan(plan: Estimate, as_json: bool) -> None:
    """What a run would do."""
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
        return
    table = Table("stage", "units", "tensors", "candidates")
    for name, stage in plan.stages.items():
        table.add_row(name, str(len(stage.units)), str(len(stage.tensors)), str(stage.n_candidates))
    table.add_row("all", "", str(plan.n_tensors), str(plan.n_candidates))
    _console().print(table)
    print(f"candidates of a unit: its current values; for each donor: {plan.candidates}")
    for why, n in plan.stays.items():
        print(f"{n} tensors keep the base's values: {why}")
    tokens = ", ".join(f"{name} {n}" for name, n in plan.vocabulary.items() if n)
    listed = f"; tokens listed by the tokenizers: {tokens}" if tokens else ""
    print(f"tokenizer: {plan.tokenizer}'s; vocabulary: {plan.n_rows} rows in every donor{listed}")
    for name, (mode, n_samples) in plan.datasets.items():
        print(f"{name}: {mode}, {n_samples} samples")
    few = ", which is too little" if plan.memory_limit < plan.memory_bytes else ""
    dtype = str(plan.dtype).removeprefix("torch.")
    print(
        f"memory: at least {decimal(plan.memory_bytes)} on {plan.device} in {dtype} (an estimate), "
        f"{decimal(plan.memory_limit)} allowed{few}"
    )
    print(
        f"time: about {timedelta(seconds=math.ceil(plan.seconds))} at the {plan.flop_per_s / 1e9:.0f} GFLOP/s that a "
        "trial product reached (an estimate: decoding and everything but matrix products add to it, racing and equal "
        "donors reduce it)"
    )
    there = " (exists: --overwrite or --resume will be needed)" if plan.output_dir.exists() else ""
    print(
        f"result: {decimal(plan.n_bytes)} in {plan.output_dir}{there}, {decimal(plan.free_bytes)} free there; "
        "nothing has been written"
    )


def print_result(result: Result, as_json: bool) -> None:
    """Which donor won each unit, and the scores of the result and every donor, selection and held-out apart."""
    if as_json:
        content = {
            "output_dir": str(result.output_dir),
            "status": result.status,
            "selection": result.selection.to_json(),
            "holdout": result.holdout.to_json() if result.holdout.rows else None,
            "choices": {f"{o.stage}/{o.unit}": o.winner for o in result.record.choices()},
        }
        print(json.dumps(_without_nan(content), indent=2))
        return
    table = Table("unit", "from", title="What was chosen", title_justify="left")
    for outcome in result.record.choices():
        if outcome.changed or outcome.stage not in ("tensors", "svd_es", "norm_es"):
            table.add_row(outcome.where, outcome.winner + ("" if outcome.changed else " (kept)"))
    _console().print(table)
    print_scoreboard(result.selection, "Selection scores (lower is better)", False)
    if result.holdout.rows:
        print_scoreboard(result.holdout, "Held-out scores (lower is better)", False)
    left = "" if result.status == "finished" else "; the budget is spent, --resume with a larger one continues"
    output = Path(os.path.normpath(result.output_dir))
    shown = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    print(f"\n{shown}: {result.status}{left}")


def print_scoreboard(board: Scoreboard, title: str, as_json: bool) -> None:
    """A row per model: its score per dataset and the mean skill it retains of the donors'."""
    if as_json:
        print(json.dumps(_without_nan(board.to_json()), indent=2))
        return
    several = len(board.donors) > 1
    models, datasets = _short([*board.rows]), _short(board.datasets)
    table = Table("model", *datasets.values(), *(["skill retained"] if several else []), title=title)
    table.title_justify = "left"
    for label in board.rows:
        cells = [board.cell(label, name) for name in board.datasets]
        table.add_row(models[label], *cells, *([f"{board.retained(label):.3f}"] if several else []))
    _console().print(table)
    if several and (alike := board.alike()):
        print(f"left out of skill retained, because all donors score alike: {', '.join(alike)}")


def _short(names: list[str]) -> dict[str, str]:
    """Paths by their last part where that tells them apart; everything else unchanged."""
    last = [Path(name).name for name in names]
    return {
        name: short if Path(name).is_absolute() and last.count(short) == 1 else name
        for name, short in zip(names, last, strict=True)
    }


def _console() -> Console:
    # A pipe has no width: tables must not be folded there.
    return Console(markup=False) if sys.stdout.isatty() else Console(width=200, markup=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return value
