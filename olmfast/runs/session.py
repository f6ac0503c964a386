"""A run: its inputs opened, its stages walked, its result scored and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmfast import __version__
from olmfast.cluster.on_ray import RayFleet
from olmfast.cluster.scorer import ClusterEvaluation
from olmfast.config.run import RunConfig
from olmfast.config.run import Scale as Units
from olmfast.config.searches import FinalEval
from olmfast.errors import OlmfastError
from olmfast.evaluation.open import Evaluation, Questions
from olmfast.evaluation.scorer import Candidate, Scorer
from olmfast.observer import Observer
from olmfast.output.folder import partial_of
from olmfast.output.writer import content_of, faults_of, write_folder, write_text, writing
from olmfast.runs.answers import answered
from olmfast.runs.benchmarks import write_results
from olmfast.runs.card import write_card
from olmfast.runs.folder import RunFolder, told_failures
from olmfast.runs.harness import HarnessBoard
from olmfast.runs.inputs import Inputs
from olmfast.runs.rebuild import restore
from olmfast.runs.scoreboard import AVERAGE, RESULT, START, Scoreboard, plain_average
from olmfast.runs.steps import CLOSING, HELD_OUT, SELECTION, schedule
from olmfast.runs.tracking import tracked
from olmfast.runs.verdict import Verdict, of_run
from olmfast.runs.watchers import Both, RunLog
from olmfast.search.acceptance import Scale
from olmfast.search.candidates import score_donors, swap
from olmfast.search.crossfit import CrossFit, expected_skill
from olmfast.search.evolve import refine
from olmfast.search.halves import Halves
from olmfast.search.joint import Joint
from olmfast.search.loop import BudgetSpent, Search
from olmfast.search.parameters import ParameterSearch
from olmfast.search.ranking import Rules
from olmfast.search.record import Record
from olmfast.search.units import STAGES, in_order, units_of
from olmfast.weights.architecture import Unit
from olmfast.weights.coefficients import TaskVectors, task_vectors
from olmfast.weights.expressions import whole
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Sources


@dataclass(frozen=True)
class Result:
    """A finished (or, with a budget, stopped) run: where it is, what it is made of and how it scored."""

    output_dir: Path
    status: str
    recipe: Recipe
    record: Record
    selection: Scoreboard
    holdout: Scoreboard

    @property
    def final_eval(self) -> HarnessBoard | None:
        """What lm-evaluation-harness says, where the config asks it."""
        told = self.record.values.get("final_eval")
        return told and HarnessBoard.from_json(told)

    @property
    def verdict(self) -> Verdict | None:
        """How it compares with its donors and their average; None where the questions cannot say."""
        return of_run(self.selection, self.holdout, self.record.values.get("expected"))


def run_as(
    kind: type[Session],
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: str | Path | None = None,
    observer: Observer | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    at_end: Callable[[Record, Observer], None],
) -> Result:
    """Run a config with sessions of a kind; see `olmfast.run`. `at_end` adds to a result before it gets its name."""
    log = RunLog()
    watched = Both([observer or Observer(), log])
    report = None if report is None else Path(report).absolute()
    if report is not None and report.parent in (config.output_dir, partial_of(config.output_dir)):
        resume, report = True, None
    resume = resume or config.load_merge_report
    folder = RunFolder(config.output_dir, resume=resume, overwrite=overwrite, report=report)
    if report is not None:
        folder.check_apart({"the report": [report]})
    try:
        _run(kind, config, folder, watched, log, stop_requested, at_end)
    except OlmfastError as error:
        log.note(str(error))
        raise
    finally:
        log.end()
    return _result(config, Record.load(config.output_dir))


def _run(
    kind: type[Session],
    config: RunConfig,
    folder: RunFolder,
    observer: Observer,
    log: RunLog,
    stop_requested: Callable[[], bool],
    at_end: Callable[[Record, Observer], None],
) -> None:
    for note in config.notes:
        observer.note(note)
    inputs = Inputs.open(config, observer)
    with told_failures(folder.partial), folder.locked(inputs.header(), inputs.pool) as record:
        if record.status != "finished":
            log.begin(record.folder)
            log.note(f"olmfast {__version__} {'continues' if record.steps else 'begins'}: {config.output_dir}")
            with tracked(config, record, observer) as told:
                session = kind(config, inputs, record, told, stop_requested)
                try:
                    status = session.search_all()
                    observer.note(session.write())
                finally:
                    session.close()
            record.update(status=status)
            log.note(f"{status}: {config.output_dir}")
        else:
            _restore(config, inputs, record, folder, observer)
        if record.folder != folder.output:
            at_end(record, observer)
        folder.publish(record)


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
        self.evaluation = self._opened(recipe)
        tolerance = 1e-6 if inputs.settings.dtype in (torch.float32, torch.float64) else 1e-3
        rules = Rules(
            "mean" if config.is_tested else config.selection,
            tolerance if config.tie_tolerance is None else config.tie_tolerance,
            config.significance,
            {name: entry.weight for name, entry in config.dataset.items()},
        )
        scorer = self._scorer(inputs.selection, observer.note)  # the first one tells
        sources = self.evaluation.sources
        self.search = Search(config, recipe, inputs.order, sources, scorer, record, rules, observer, stop_requested)
        self.selection = Scoreboard(inputs.models)
        self.holdout = Scoreboard(inputs.models)

    def _opened(self, recipe: Recipe) -> Evaluation | ClusterEvaluation:
        """The live model of a recipe, or workers with one each."""
        config, pool, settings, folder = self.config, self.inputs.pool, self.inputs.settings, self.record.folder
        if not config.has_workers:
            return Evaluation(recipe, pool, settings, folder)
        n = None if config.workers == "auto" else config.workers
        fleet = RayFleet(n, config.ray.address if config.ray else None, settings.device)
        return ClusterEvaluation(fleet, fleet.n, recipe, pool, settings, folder, self.observer.note)

    def close(self) -> None:
        """Give back what the session has taken beside this process."""
        self.evaluation.close()

    def _scorer(self, questions: Questions, note: Callable[[str], None] = lambda _: None) -> Scorer:
        return self.evaluation.scorer(questions, self.observer.candidate, note)

    def search_all(self) -> str:
        """Walk the stages in order; returns `finished`, or `stopped` when the budget is spent."""
        self.observer.planned(schedule(self.config, self.inputs, self.record.evaluations, self.search.elapsed_s))
        self._score_holdout_of_donors()
        status = "finished"
        try:
            self.choose_base()
            if self.config.is_tested:
                self._search_with_tests()
            else:
                self._walk_stages()
        except BudgetSpent:
            self.observer.note("the budget is spent; this is the best so far, --resume with a larger one continues")
            status = "stopped"
        self._validate()
        return status

    def _walk_stages(self, again: str = "") -> bool:
        """Walk the units of all scales; true if anything changed. `again` marks a walk that is not the first."""
        changed = False
        for scale in self.config.walk:
            changed |= self._walk(scale, again)
        if "tensor" not in self.config.walk:
            for unit in self._units("tensor"):
                changed |= refine(self.search, unit, again)
        return changed

    def _search_with_tests(self) -> None:
        """Search the coefficients of all donors, with the stages that the config switches on as well, or what `evolve`
        says of the numbers of one merge."""
        config, pool, search = self.config, self.inputs.pool, self.search
        scale = Scale(search.rules.spans, search.rules.weights, self._noise())
        halves = Halves.of(search.scorer.sizes, config.seed, config.sources)
        search.begin_tests(CrossFit(halves, scale, config.required_p))
        left_out = [name for name in config.dataset if name not in scale.spans]
        if left_out:
            self.observer.note(f"no donor is better than another beyond noise, so left out: {', '.join(left_out)}")
        if not scale.spans:
            self.observer.note("no dataset tells the donors apart: there is nothing to search by; more questions help")
            return
        ignored = search.architecture.is_ignored
        vectors = task_vectors(pool, self.inputs.donors, self.inputs.ancestor, config.base_name, ignored)
        self._describe(vectors)
        if config.evolve is not None:
            ParameterSearch(search, config.evolve, vectors, self.inputs.donors).run()
        else:
            start = self.inputs.start
            given = start.values(pool) if start is not None else None
            Joint(search, vectors, lambda number: self._walk_stages(f"/{number}" if number > 1 else ""), given).run()

    def _noise(self) -> dict[str, float]:
        """Dataset -> by how much rounding alone changes the current model's mean score: scored in other batches."""
        if "noise" not in self.record.values:
            unit, sizes = self.search.architecture.model_unit(self.search.tensors), self.search.scorer.sizes
            found = dict.fromkeys(sizes, 0.0)
            scorer = self._scorer(self.inputs.selection)
            whole = scorer.score(unit, [Candidate("in usual batches")])
            for start in (0, 1):
                part = {name: list(range(start, n, 2)) for name, n in sizes.items()}
                own = scorer.score(unit, [Candidate("in other batches", self.search.recipe.tensors)], samples=part)
                for name, indices in part.items():
                    difference = (own.samples[name] - whole.samples[name])[0, indices].sum()
                    found[name] += abs(float(difference)) / sizes[name]
            self.record.update(noise=found)
        return dict(self.record.values["noise"])

    def _describe(self, vectors: TaskVectors) -> None:
        """Record how far each donor is from the anchor, overall and by depth and kind."""
        architecture, tensors = self.search.architecture, self.search.tensors
        units = [*architecture.depth_units(tensors), *architecture.kind_units(tensors)]
        told = {"overall": vectors.distances()} | {unit.name: vectors.distances(unit.tensors) for unit in units}
        anchor = vectors.anchor or "the donors' mean"
        self.record.update(anchor={"model": anchor, "distances": told, "unevenness": vectors.unevenness})
        each = ", ".join(f"{donor} {norm:.4g}" for donor, norm in told["overall"].items())
        self.observer.note(f"task vectors from {anchor}: {each}; largest by smallest {vectors.unevenness:.1f}")

    def _validate(self) -> None:
        """Compare what the search went through on questions that no step has used; an end that is not better than the
        start gives way to it."""
        questions, snapshots = self.inputs.validation, self.record.snapshots
        if snapshots and self.search.recipe != [*snapshots.values()][-1]:  # a part that the budget ended
            self.record.keep_snapshot(f"after {self.record.evaluations:g} evaluations")
            snapshots = self.record.snapshots
        if len(snapshots) < 2 or not questions.datasets or self.search.crossfit is None:
            return
        if not self.config.validation_sets and not set(questions.datasets) & set(self.search.crossfit.scale.spans):
            return  # none of the questions set aside tells models apart
        unit = self.search.architecture.model_unit(self.search.tensors)
        candidates = [Candidate(label, recipe=recipe) for label, recipe in snapshots.items()]
        scores = self._scorer(questions).score(unit, candidates)
        rows = range(len(candidates))
        means = [{name: float(scores.mean(name)[row]) for name in questions.datasets} for row in rows]
        skills = [self._validated(own) for own in means]
        first, *_, last = snapshots
        result = last if skills[-1] > skills[0] else first
        self.record.update(validation={"skill": dict(zip(snapshots, skills, strict=True)), "result": result})
        if result == first:
            self.observer.note("on the validation questions the end is no better than the start, which is the result")

    def _validated(self, means: Mapping[str, float]) -> float:
        """Skill on the validation questions; on datasets of their own, whose spans are not known, the mean score."""
        assert self.search.crossfit is not None
        if self.config.validation_sets:
            return -math.fsum(means.values()) / len(means)
        scale = self.search.crossfit.scale
        spans = {name: span for name, span in scale.spans.items() if name in means}
        return Scale(spans, scale.weights).skill(means)

    def _units(self, scale: Units) -> list[Unit]:
        return units_of(scale, self.config, self.search.architecture, self.search.tensors)

    def _walk(self, scale: Units, again: str) -> bool:
        changed = False
        for unit, following in in_order(self._units(scale)):
            changed |= swap(self.search, STAGES[scale], unit, following, again).changed
            if scale == "tensor":
                changed |= refine(self.search, unit, again)
        return changed

    def write(self) -> str:
        """Score the result with its donors and write it; returns the line that accounts for every tensor."""
        pool, sources = self.inputs.pool, self.evaluation.sources
        recipe = self.record.validated or self.search.recipe
        average: dict[str, Recipe | None] = {}
        if len(self.selection.donors) > 1:
            average = {AVERAGE: plain_average(recipe.base, self.selection.donors, pool)}
        rows: dict[str, Recipe | None] = {
            **average,
            **self._start(),
            RESULT: None if recipe == self.evaluation.recipe else recipe,
        }
        closing = (
            (SELECTION, self.selection, self.inputs.selection),
            (HELD_OUT, self.holdout, self.inputs.holdout),
        )
        for stage, board, questions in closing:
            if questions.datasets and board.rows:  # without the donors' scores there is no scale
                unknown = {name: whole(name, pool.tensors) for name in board.rows if name not in board.samples}
                self.observer.step(stage, CLOSING, len(rows) + len(unknown))
                board.score(self._scorer(questions), {**unknown, **rows}, list(questions.datasets), pool)
        answers = self._answers(recipe)
        content = content_of(recipe, sources, pool[self.config.base_name])
        with writing(self.record.folder, "--resume"):
            write_folder(content, sources, self.record.folder, self.config.shard_size)
        account = content.account()
        boards = {"Selection": self.selection, "Held-out": self.holdout}
        # The recipe too: it is nowhere yet when the budget ended the run before its first step.
        expected = self._expected(recipe)
        verdict = of_run(self.selection, self.holdout, expected)
        told = {"recipe_digest": recipe.digest(), "account": account, "verdict": verdict and verdict.to_json()}
        boarded = {"selection": self.selection.to_json(), "holdout": self.holdout.to_json()}
        if (final := self.config.final_eval) is not None:
            told["final_eval"] = self._final_eval(final, recipe).to_json()
        self.record.update(self.search.recipe, **boarded, **told, answers=answers, expected=expected)
        card = write_card(self.config, self.record, recipe, boards, verdict, account, pool, self._closing())
        with writing(self.record.folder, "--resume"):
            write_text(self.record.folder / "README.md", card)
            entries = self.config.benchmarks
            write_results(self.record.folder, entries, self.config.holdout, self.holdout, RESULT)
        return account

    def _expected(self, result: Recipe) -> float | None:
        """The skill expected of new questions, where the result is what the steps led to and not their start."""
        if self.search.crossfit is None or result != self.search.recipe:
            return None
        return expected_skill(self.record.steps.values(), self.search.crossfit.scale.spans)

    def _answers(self, result: Recipe) -> dict[str, Any]:
        """What donors and result answer to a few questions: held-out ones, if there are any."""
        kind, board, questions = HELD_OUT, self.holdout, self.inputs.holdout
        if not board.rows:
            kind, board, questions = SELECTION, self.selection, self.inputs.selection
        models = {name: whole(name, self.inputs.pool.tensors) for name in board.donors}
        return answered(self.evaluation, questions, kind, board, {RESULT: result, **models}, self.config.answers)

    def _final_eval(self, final: FinalEval, recipe: Recipe) -> HarnessBoard:
        """The result and its donors, as lm-evaluation-harness scores them."""
        recipes = {name: whole(name, self.inputs.pool.tensors) for name in self.inputs.models} | {RESULT: recipe}
        self.observer.step("final_eval", ", ".join(final.tasks), len(recipes))
        board = HarnessBoard(final.limit)
        told, companions = self.observer.candidate, {RESULT: self.config.base_name}
        live = self.evaluation
        if isinstance(live, ClusterEvaluation):  # the harness wants a model in its own process
            live.close()
            live = Evaluation(recipe, self.inputs.pool, self.inputs.settings, self.record.folder)
        board.score(live, recipes, final.tasks, self.config.task_folder, told, companions)
        return board

    def _closing(self) -> list[str]:
        """What a kind of run adds at its end: sections of the model card."""
        return []

    def _start(self) -> dict[str, Recipe | None]:
        """What a search that tests began with, where that is none of the donors."""
        start = self.record.snapshots.get("start")
        if start is None or any(start.tensors == whole(name, start.tensors).tensors for name in self.inputs.donors):
            return {}
        return {START: start}

    def _score_holdout_of_donors(self) -> None:
        pool = self.inputs.pool
        questions = self.inputs.holdout
        if not questions.datasets:
            return
        if "donors_holdout" not in self.record.values:
            self.observer.step("held-out", "donors", len(self.inputs.models))
            recipes = {name: whole(name, pool.tensors) for name in self.inputs.models}
            self.holdout.score(self._scorer(questions), dict(recipes), list(questions.datasets), pool)
            self.record.update(donors_holdout=self.holdout.to_json())
        self.holdout = Scoreboard.from_json(self.record.values["donors_holdout"])

    def choose_base(self) -> None:
        """Score every donor whole, which sets the scale, and go on from the best, or from the config's base."""
        search, pool = self.search, self.inputs.pool
        outcome = score_donors(search)
        rows: dict[str, dict[str, float]] = {}
        for name in self.inputs.models:
            row = {dataset: score for dataset, by in outcome.metrics.items() if (score := by[name]) is not None}
            if len(row) == len(outcome.metrics):  # else neither it nor its twins can define the scale
                rows[name] = row
        truncated = {
            name: {dataset: by[name] for dataset, by in outcome.truncated.items() if by.get(name)} for name in rows
        }
        self.selection = Scoreboard(list(rows), rows, truncated)
        spans = {name: (span[0], span[1]) for name, span in outcome.spans.items()}
        search.set_scale(spans if self.config.is_tested else self.selection.spans, self.selection.rows[outcome.winner])
        resumed = self.config.is_tested and len(self.record.steps) > 1  # its merges have the config's base
        if outcome.winner != search.recipe.base and not resumed and self.config.dataflow is None:
            search.rebase(whole(outcome.winner, pool.tensors))
        if self.config.max_models is not None:
            search.donors = [outcome.winner, *outcome.order, *pool.blocks_only][: self.config.max_models]


def _restore(config: RunConfig, inputs: Inputs, record: Record, folder: RunFolder, observer: Observer) -> None:
    """Write again what a finished run's folder has lost."""
    sources = Sources(inputs.pool, record.folder)
    content = content_of(_recipe_of(record), sources, inputs.pool[config.base_name])
    if faults_of(content, record.folder, config.shard_size):
        with folder.lock(empty=False) if record.folder == folder.output else nullcontext():
            restore(content, sources, record.folder, config.shard_size, observer)
            if record.folder == folder.output:
                folder.discard()


def _recipe_of(record: Record) -> Recipe:
    recipe = record.validated or record.recipe
    if recipe is None:
        raise OlmfastError(f"{record.folder}: the record holds no recipe")
    return recipe


def _result(config: RunConfig, record: Record) -> Result:
    boards = [Scoreboard.from_json(record.values[key]) for key in ("selection", "holdout")]
    return Result(config.output_dir, record.status, _recipe_of(record), record, *boards)
