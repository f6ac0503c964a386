"""A run: its inputs opened, its stages walked, its result scored and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmfast.config.run import RunConfig, Scale, load_config
from olmfast.errors import FileChanged, OlmfastError
from olmfast.evaluation.open import Evaluation, Questions
from olmfast.evaluation.scorer import Scorer
from olmfast.observer import Observer
from olmfast.output.writer import content_of, write_folder, writing
from olmfast.runs.card import write_card
from olmfast.runs.estimate import plan_stages
from olmfast.runs.folder import RunFolder
from olmfast.runs.inputs import Inputs
from olmfast.runs.scoreboard import AVERAGE, RESULT, Scoreboard, plain_average
from olmfast.search.candidates import score_donors, swap
from olmfast.search.evolve import refine
from olmfast.search.loop import BudgetSpent, Search
from olmfast.search.ranking import Rules
from olmfast.search.record import Record
from olmfast.search.units import STAGES, in_order, units_of
from olmfast.weights.architecture import Unit
from olmfast.weights.expressions import whole
from olmfast.weights.recipe import Recipe


@dataclass(frozen=True)
class Result:
    """A finished (or, with a budget, stopped) run: where it is, what it is made of and how it scored."""

    output_dir: Path
    status: str
    recipe: Recipe
    record: Record
    selection: Scoreboard
    holdout: Scoreboard


def run(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Result:
    """Search for the best merge of the config's pool and write it to `output_dir`.

    `config` is what `load_config` returned or takes. `resume` goes on with an unfinished run, `overwrite` replaces a
    result that is there; `observer` is told of each step, and `stop_requested` asked between two steps.

    Raises InputError before anything is written when the input is unusable, Interrupted when
    `stop_requested` said so between two steps, OlmfastError when the run failed; what was decided is kept.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config)
    observer = observer or Observer()
    folder = RunFolder(config.output_dir, resume=resume or config.load_merge_report, overwrite=overwrite)
    inputs = Inputs.open(config, observer)
    try:
        with folder.locked(inputs.header(), inputs.pool) as record:
            if record.status != "finished":
                session = Session(config, inputs, record, observer, stop_requested)
                status = session.search_all()
                observer.note(session.write())
                record.update(status=status)
            folder.publish(record)
    except FileChanged as error:
        raise error.with_advice("--resume") from error
    except torch.OutOfMemoryError as error:
        raise OlmfastError(
            f"out of memory: {str(error).splitlines()[0]}; everything decided so far is saved; use --resume with "
            "a smaller batch_tokens"
        ) from error
    except OSError as error:
        raise OlmfastError(
            f"{error.filename or folder.partial}: {error.strerror}; everything decided so far is saved; "
            "fix this and use --resume"
        ) from error
    return _result(config, Record.load(config.output_dir))


class Session:
    """One process's share of a run: builds the working model and walks the stages."""

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        record: Record,
        observer: Observer,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.config, self.inputs, self.record, self.observer = config, inputs, record, observer
        recipe = record.recipe or whole(config.base_name, inputs.pool.tensors)
        self.evaluation = Evaluation(recipe, inputs.pool, inputs.settings, record.folder)
        tolerance = 1e-6 if inputs.settings.dtype in (torch.float32, torch.float64) else 1e-3
        rules = Rules(
            config.selection,
            tolerance if config.tie_tolerance is None else config.tie_tolerance,
            config.significance,
            {name: entry.weight for name, entry in config.dataset.items()},
        )
        scorer = self.evaluation.scorer(inputs.selection, observer.candidate, observer.note)  # the first one tells
        sources = self.evaluation.sources
        self.search = Search(config, recipe, inputs.order, sources, scorer, record, rules, observer, stop_requested)
        self.selection = Scoreboard(inputs.pool.names)
        self.holdout = Scoreboard(inputs.pool.names)

    def _scorer(self, questions: Questions) -> Scorer:
        return self.evaluation.scorer(questions, self.observer.candidate)

    def search_all(self) -> str:
        """Walk the stages in order; returns `finished`, or `stopped` when the budget is spent."""
        stages = plan_stages(self.config, self.inputs.pool)
        self.observer.planned(sum(stage.n_candidates for stage in stages.values()))
        self._score_holdout_of_donors()
        try:
            self.choose_base()
            for scale in self.config.walk:
                self._walk(scale)
            if "tensor" not in self.config.walk:
                for unit in self._units("tensor"):
                    refine(self.search, unit)
        except BudgetSpent:
            self.observer.note("the budget is spent; this is the best so far, --resume with a larger one continues")
            return "stopped"
        return "finished"

    def _units(self, scale: Scale) -> list[Unit]:
        return units_of(scale, self.config, self.search.architecture, self.search.tensors)

    def _walk(self, scale: Scale) -> None:
        for unit, following in in_order(self._units(scale)):
            swap(self.search, STAGES[scale], unit, following)
            if scale == "tensor":
                refine(self.search, unit)

    def write(self) -> str:
        """Score the result with its donors and write it; returns the line that accounts for every tensor."""
        pool, recipe, sources = self.inputs.pool, self.search.recipe, self.evaluation.sources
        average = {AVERAGE: plain_average(recipe.base, self.selection.donors, pool)} if len(pool) > 1 else {}
        rows: dict[str, Recipe | None] = {**average, RESULT: None}
        for board, questions in ((self.selection, self.inputs.selection), (self.holdout, self.inputs.holdout)):
            if questions.datasets and board.rows:  # without the donors' scores there is no scale
                board.score(self._scorer(questions), rows, list(questions.datasets), pool)
        content = content_of(recipe, sources, pool[self.config.base_name])
        with writing(self.record.folder, "--resume"):
            write_folder(content, sources, self.record.folder, self.config.shard_size)
        account = content.account()
        boards = {"Selection": self.selection, "Held-out": self.holdout}
        # The recipe too: it is nowhere yet when the budget ended the run before its first step.
        told = {"recipe_digest": recipe.digest(), "account": account}
        self.record.update(recipe, selection=self.selection.to_json(), holdout=self.holdout.to_json(), **told)
        card = write_card(self.config, self.record, recipe, boards, account)
        (self.record.folder / "README.md").write_text(card, encoding="utf-8")
        return account

    def _score_holdout_of_donors(self) -> None:
        pool = self.inputs.pool
        questions = self.inputs.holdout
        if not questions.datasets:
            return
        if "donors_holdout" not in self.record.values:
            self.observer.step("held-out", "donors", len(pool))
            recipes = {name: whole(name, pool.tensors) for name in pool.names}
            self.holdout.score(self._scorer(questions), dict(recipes), list(questions.datasets), pool)
            self.record.update(donors_holdout=self.holdout.to_json())
        self.holdout = Scoreboard.from_json(self.record.values["donors_holdout"])

    def choose_base(self) -> None:
        """Score every donor whole, which sets the scale, and go on from the best, or from the config's base."""
        search, pool = self.search, self.inputs.pool
        outcome = score_donors(search)
        rows: dict[str, dict[str, float]] = {}
        for name in pool.names:
            row = {dataset: score for dataset, by in outcome.metrics.items() if (score := by[name]) is not None}
            if len(row) == len(outcome.metrics):  # else neither it nor its twins can define the scale
                rows[name] = row
        truncated = {
            name: {dataset: by[name] for dataset, by in outcome.truncated.items() if by.get(name)} for name in rows
        }
        self.selection = Scoreboard(list(rows), rows, truncated)
        search.set_scale(self.selection.spans, self.selection.rows[outcome.winner])
        if outcome.winner != search.recipe.base:
            search.rebase(whole(outcome.winner, pool.tensors))
        if self.config.max_models is not None:
            search.donors = [outcome.winner, *outcome.order][: self.config.max_models]


def _result(config: RunConfig, record: Record) -> Result:
    recipe = record.recipe
    if recipe is None:
        raise OlmfastError(f"{record.folder}: the record holds no recipe")
    boards = [Scoreboard.from_json(record.values[key]) for key in ("selection", "holdout")]
    return Result(config.output_dir, record.status, recipe, record, *boards)
