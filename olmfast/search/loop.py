"""The one loop of every search: propose, evaluate, select, commit, record.

A stage is a function that takes steps one after another; a step is recorded when it returns, and a recorded
step is never taken twice: a resumed run walks the same steps and gets their outcomes from the record.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from olmfast.config.resources import Budget
from olmfast.config.run import RunConfig
from olmfast.errors import InputError, Interrupted, OlmfastError
from olmfast.evaluation.model import builds_alike
from olmfast.evaluation.scorer import Candidate, Direction, Scorer, Slopes
from olmfast.evaluation.scores import Scores
from olmfast.observer import Observer
from olmfast.search.acceptance import Gain
from olmfast.search.costs import Costs
from olmfast.search.crossfit import FIRST, MEAN, SECOND, CrossFit, Decision
from olmfast.search.halves import Indices
from olmfast.search.lines import Lines
from olmfast.search.log import Outcome, Standing
from olmfast.search.racing import heats, left_to_score
from olmfast.search.ranking import Rules, choose, is_degraded
from olmfast.search.record import Record
from olmfast.search.spans import real_spans
from olmfast.weights.architecture import Architecture, Unit
from olmfast.weights.chunks import Readable
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression, Sources

GRADIENT = 3  # evaluations that a gradient counts as: one forward pass, and two on the way back
N_TRAINED = 2  # evaluations that trained candidates take: each half's on the other, and the mean of both on all


class BudgetSpent(Exception):
    """The next step does not fit the budget; the run ends with the best so far."""


@dataclass(frozen=True)
class Trained:
    """How many evaluations it takes to train the candidates of a step: a gradient counts as three."""

    evaluations: float


@dataclass(frozen=True)
class Step:
    """One decision about one unit. `propose` lists the candidates; the first is the incumbent."""

    key: str
    stage: str
    unit: Unit
    propose: Callable[[], Sequence[Candidate]]
    # Rows that may win -> the winner, and after it, where it matters, the others from best to worst.
    accept: Callable[[Scores, list[int]], list[int]] | None = None  # None: by the config's selection
    guarded: bool = True
    commit: bool = True
    races: bool = True  # where racing is on
    # In a joint search: whether the winner must pass a test on other questions than those that picked it.
    tested: bool = True
    trained: Trained | None = None  # the candidates are the incumbent, one per half, and the mean of these two
    questions: Indices | None = None  # None: all
    spans: bool = False  # whether the candidates are the donors, which set the scale
    begins: bool = False  # whether training begins at the best-scoring candidate, also where it passes no test


@dataclass
class Search:
    """Everything the loop works on, and what it has spent. It owns a recipe; models are the Scorer's business.

    `order` are the recipe's tensors in the order in which its module declares its parameters.
    """

    config: RunConfig
    recipe: Recipe
    order: tuple[str, ...]
    sources: Sources
    scorer: Scorer
    record: Record
    rules: Rules
    observer: Observer = field(default_factory=Observer)
    stop_requested: Callable[[], bool] = lambda: False
    base_means: dict[str, float] = field(default_factory=dict)
    crossfit: CrossFit | None = None  # of a joint search, once the donors have set its scale

    def __post_init__(self) -> None:
        # Whose values are tried, in this order.
        self.donors: list[str] = [name for name in self.sources.pool.names if name in self.config.models]
        self._counting = threading.Lock()  # slopes may be asked for by several threads
        self._scored = 0  # questions, in the step that is being taken
        self._spent_before = self.record.elapsed_s
        self._started = time.monotonic()
        self._evaluations: float = self.record.evaluations
        self._current: Scores | None = None  # scores of the current recipe, if they are known
        self._lines = Lines()
        self._costs = Costs()  # of a candidate, in seconds
        self._costs.add("earlier sessions", self._evaluations, self._spent_before)
        self._recall()

    @property
    def elapsed_s(self) -> float:
        """Seconds of wall time this run has taken, earlier sessions included."""
        return self._spent_before + time.monotonic() - self._started

    @property
    def architecture(self) -> Architecture:
        """What the tensor names mean, of as many blocks as the recipe has."""
        return self.sources.pool.architecture.edited(self.recipe.config_edits)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Canonical names in the module's parameter order."""
        known = [name for name in self.order if name in self.recipe.tensors]
        return (*known, *(name for name in self.recipe.tensors if name not in set(known)))

    @property
    def origins(self) -> tuple[Recipe, ...]:
        """What training goes on from: on the first half, on the second, and their mean."""
        return self._lines.origins(self.recipe)

    def saved_dtype(self, tensor: str) -> torch.dtype:
        """The dtype the result stores this tensor in."""
        return self._saved(tensor).dtype

    def is_matrix(self, tensor: str) -> bool:
        """Whether the tensor is a matrix of floating-point numbers, which evolution strategies can refine."""
        saved = self._saved(tensor)
        return len(saved.shape) == 2 and saved.dtype.is_floating_point

    def _saved(self, tensor: str) -> Readable:
        """A tensor of the dtype and shape that the result has: the base's, or its own where the base has none."""
        info = self.sources.pool[self.recipe.base].tensors.get(tensor)
        return self.recipe.tensors[tensor].open(self.sources) if info is None else info

    def set_scale(self, spans: Mapping[str, tuple[float, float]], base_means: dict[str, float]) -> None:
        """Set what the donors scored: the scale of `selection: mean`, and the base that the guard protects."""
        self.rules = replace(self.rules, spans=spans)
        self.base_means = base_means

    def rebase(self, recipe: Recipe) -> None:
        """Continue from another recipe, whose scores are not known."""
        self.recipe = recipe
        self.scorer.commit(recipe)
        self._current, self._lines = None, Lines()

    def take(self, step: Step) -> Outcome:
        """Propose, evaluate, select, commit, record; or the recorded outcome if the step was taken before."""
        done = self.record.outcome(step.key)
        if done is not None:
            self.observer.recorded(done)
            return done
        if self.stop_requested():
            raise Interrupted("stopped on request; everything decided so far is saved, continue with --resume")
        self._scored = 0
        began = self.elapsed_s
        if step.trained is not None:
            self._check_budget(step.stage, step.trained.evaluations + N_TRAINED)
            self.observer.step(step.stage, step.unit.name, max(1, round(step.trained.evaluations + N_TRAINED)))
        candidates, twin = self._distinct(step.propose())
        if step.trained is None:
            self._check_budget(step.stage, len(candidates) * self._share(step.questions))
        if step.trained is None:
            self.observer.step(step.stage, step.unit.name, len(candidates))
        scores, dropped = self._evaluate(step, candidates)
        alive = [row for row in range(len(candidates)) if row not in dropped]
        gain: Gain | None = None
        if self.crossfit is not None and step.tested:
            decision = self._test(step, scores, candidates, alive)
            ranked, gain = [decision.winner], decision.gain
        else:
            ranked = (step.accept or self._choose)(scores, alive)
        winner = ranked[0]
        before = self.recipe
        if step.commit and winner != 0:
            self.recipe = self._stored(step, candidates[winner])
            is_mean = step.trained is not None and step.tested
            self._lines = self._lines.trained(candidates, scores, before) if is_mean else Lines()
        elif step.begins and self.crossfit is not None:
            best = candidates[self.crossfit.best(scores, alive)].of(before)
            if best != before and builds_alike(before, best, self.sources.pool):
                self._lines = Lines.begun(best)
        sampled = step.questions is not None and not step.commit  # what a sample wrote is not the current model's
        self.scorer.commit(self.recipe, None if sampled else candidates[winner].label)
        if step.questions is None and (step.commit or candidates[0].is_current):
            self._current = scores.rows([winner if step.commit else 0])
        if not builds_alike(before, self.recipe, self.sources.pool):
            self._current = None  # scored in a module of its own: in other batches than the next ones
        outcome = self._outcome(step, candidates, twin, scores, dropped, winner)
        outcome.order = [candidates[row].label for row in ranked[1:]]
        if gain is not None:
            outcome.gain, outcome.tested = round(gain.shrunk, 6), True
        if step.spans:
            found = real_spans({name: scores.samples[name][alive] for name in scores.samples})
            outcome.spans = {name: list(span) for name, span in found.items() if span is not None}
        counted = self._counted(len(candidates))
        self._evaluations += counted
        known, crossed = (own.to_json() if own is not None else {} for own in (self._current, self._lines.crossed))
        standing = Standing(self.recipe, known, self.scorer.state, self._lines.recipes, crossed)
        self.record.add(step.key, outcome, standing, self._evaluations, self.elapsed_s)
        self._costs.add(step.stage, counted, self.elapsed_s - began)
        self.observer.chosen(outcome)
        self.observer.spent(self._evaluations)
        return outcome

    def _recall(self) -> None:
        """Restore what an earlier session's last step left: a resumed run compares with the very same numbers."""
        standing = self.record.standing
        if standing.scorer:
            self.scorer.state = standing.scorer
        if standing.scores:
            self._current = Scores.from_json(standing.scores)
        self._lines = Lines.recalled(standing)

    def _choose(self, scores: Scores, alive: list[int]) -> list[int]:
        return [choose(scores, alive, self.rules)]

    def begin_tests(self, crossfit: CrossFit) -> None:
        """From now on winners are tested. The tests of an earlier session count."""
        self.crossfit = crossfit
        for outcome in self.record.steps.values():
            if outcome.tested:
                crossfit.n_tests = 0 if outcome.changed else crossfit.n_tests + 1

    def slopes(
        self,
        values: Mapping[str, Expression],
        directions: Mapping[str, Sequence[Direction]],
        questions: Indices,
        teachers: Mapping[str, Candidate],
        weights: Mapping[str, float] | None = None,
    ) -> Slopes:
        """The slopes of the loss on some questions with tensors of the current model changed: each dataset counts by
        `weights`, or by its weight on the scale."""
        if weights is None:
            assert self.crossfit is not None
            weights = {name: self.crossfit.scale.weight(name) for name in questions}
        with self._counting:
            self._scored += GRADIENT * sum(map(len, questions.values()))
        found = self.scorer.slopes(Candidate("slopes", values), directions, questions, weights, teachers)
        self.observer.spent(self._evaluations + self._scored / sum(self.scorer.sizes.values()))
        return found

    def count_gradient(self, n_questions: int) -> None:
        """The step that is being taken has gone back through so many questions, before the run was killed."""
        self._scored += GRADIENT * n_questions

    def count_lessons(self, datasets: Iterable[str]) -> None:
        """The step that is being taken has every question of these datasets put to a teacher."""
        self._scored += sum(self.scorer.sizes[name] for name in datasets)

    def _share(self, questions: Indices | None) -> float:
        """The share of all questions that these are."""
        return 1.0 if questions is None else sum(map(len, questions.values())) / sum(self.scorer.sizes.values())

    def _counted(self, n_candidates: int) -> float:
        """The evaluations of the step that has just been taken.

        By stages each candidate counts as one. In a joint search, where a candidate may be scored on a part of the
        questions, it is the questions that count: one evaluation is all of them, once.
        """
        if not self.config.counts_questions:
            return n_candidates
        return round(self._scored / sum(self.scorer.sizes.values()), 3)

    def _test(self, step: Step, scores: Scores, candidates: Sequence[Candidate], alive: list[int]) -> Decision:
        assert self.crossfit is not None
        if step.trained is None:
            return self.crossfit.of_candidates(scores, alive)
        whole = len(alive) == len(candidates) == 1 + MEAN  # else two of them are the same
        return self.crossfit.of_trained(scores, self._lines.crossed) if whole else Decision(0)

    def _distinct(self, candidates: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, int]]:
        """Candidates of different bytes, and for each label that is left out the row of its equal."""
        seen: dict[tuple[object, ...], int] = {}
        kept: list[Candidate] = []
        twin: dict[str, int] = {}
        names = {n for one in candidates for n in (one.values if one.recipe is None else one.recipe.tensors)}
        names = {name for name in names if not self.architecture.is_ignored(name)}
        for candidate in candidates:
            identity = self._identity(candidate, sorted(names))
            if identity in seen:
                twin[candidate.label] = seen[identity]
            else:
                seen[identity] = len(kept)
                kept.append(candidate)
        return kept, twin

    def _identity(self, candidate: Candidate, names: Sequence[str]) -> tuple[object, ...]:
        """What tells a candidate's model from those of the others, which differ in the tensors `names`."""
        recipe = candidate.of(self.recipe)
        own = "" if builds_alike(self.recipe, recipe, self.sources.pool) else candidate.label
        return (own, *((n, recipe.tensors[n].identity(self.sources)) for n in names if n in recipe.tensors))

    def affordable(self, stage: str) -> float:
        """How many evaluations the budget still pays for: of its time, by what those of a stage have cost so far."""
        budget: Budget | None = self.config.budget
        left = [math.inf]
        if budget is not None and budget.evaluations is not None:
            left.append(budget.evaluations - self._evaluations)
        if budget is not None and budget.seconds is not None:
            each_s, seconds = self._costs.expected_s(stage, 1.0, unknown=0.0), budget.seconds - self.elapsed_s
            left.append(seconds / each_s if each_s else math.copysign(math.inf, seconds))
        return min(left)

    def _check_budget(self, stage: str, n_candidates: float) -> None:
        """A step is taken whole or not at all."""
        if n_candidates > self.affordable(stage) + 1e-9:  # sums of shares of the questions are rounded
            raise BudgetSpent

    def _evaluate(self, step: Step, candidates: list[Candidate]) -> tuple[Scores, dict[int, str]]:
        """Dataset by dataset under a guard, so that a degraded candidate costs no further evaluation."""
        if step.trained is not None or step.questions is not None:
            return self._evaluate_parts(step, candidates)
        datasets = list(self.config.dataset)
        guard = self.config.improve_all if step.guarded else None
        rounds = [[name] for name in datasets] if guard else [datasets]
        found: list[Scores] = []
        every = {name: list(range(self.scorer.sizes[name])) for name in datasets}
        raced, dropped = self._race(step, candidates, every)
        if raced is not None:
            self._write_ledger(step, candidates, list(dropped), raced)
        for names in rounds:
            rows = [row for row in range(len(candidates)) if row not in dropped]
            wanted = {name: every[name] for name in names}
            scores = self._score(step, candidates, rows, wanted, raced).spread(rows, len(candidates))
            found.append(scores)
            self._write_ledger(step, candidates, rows, scores)
            for row in rows:
                reason = self._fault(scores, row, guard)
                if reason and row == 0:
                    raise self._unscorable(step, candidates[0].label, reason)
                if reason:
                    dropped[row] = reason
        return Scores.joined(found), dropped

    def _evaluate_parts(self, step: Step, candidates: list[Candidate]) -> tuple[Scores, dict[int, str]]:
        """Candidates that are scored on some questions only: each half's on the other, or all on those of the step."""
        every = {name: list(range(n)) for name, n in self.scorer.sizes.items()}
        asked: list[tuple[list[int], Indices]] = [(list(range(len(candidates))), step.questions or every)]
        if step.trained is not None and self.crossfit is not None and len(candidates) == 1 + MEAN:
            halves = self.crossfit.halves
            first, second = ({name: half.get(name, []) for name in every} for half in halves)
            asked = [([0, MEAN], every), ([FIRST], second), ([SECOND], first)]
        found: Scores | None = None
        behind: dict[int, str] = {}
        for rows, questions in asked:
            raced, behind = self._race(step, candidates, questions)
            if raced is not None:
                self._write_ledger(step, candidates, list(behind), raced)
            rows = [row for row in rows if row not in behind]
            own = self._score(step, candidates, rows, questions, raced).spread(rows, len(candidates))
            found = own if found is None else found.filled_by(own)
        assert found is not None
        self._write_ledger(step, candidates, [row for row in range(len(candidates)) if row not in behind], found)
        dropped = {row: reason for row in range(len(candidates)) if (reason := self._fault(found, row, None))}
        dropped |= behind
        if 0 in dropped and candidates[0].is_current:
            raise self._unscorable(step, candidates[0].label, dropped[0])
        return found, dropped

    def _unscorable(self, step: Step, label: str, reason: str) -> OlmfastError:
        """The error where an incumbent has no score: in the first step it is as its files have it."""
        if not self.record.steps:
            advice = "its config.json or weights are wrong, or the dtype is too narrow for them"
            return InputError(f"{label}: {reason}, as it is: {advice}")
        return OlmfastError(f"{step.key}: {label}: {reason}; the incumbent cannot be scored")

    def _race(
        self, step: Step, candidates: list[Candidate], questions: Mapping[str, list[int]]
    ) -> tuple[Scores | None, dict[int, str]]:
        """Where racing is on: scores on a part of the questions, and who is out after it."""
        racing = self.config.races
        if racing is None or not step.races or step.trained is not None or len(candidates) < 3:
            return None, {}

        def score(rows: list[int], samples: Mapping[str, list[int]]) -> Scores:
            return self._ask(step, candidates, rows, samples)

        guard = self.config.improve_all if step.guarded else None
        guarded = [name for name in questions if guard in ("all", "base", self.config.dataset[name].mode, name)]
        led = step.accept is None  # another rule may prefer an offspring that is worse than the incumbent
        return heats(score, len(candidates), questions, racing, self.rules, self.config.seed, guarded, led)

    def _score(
        self,
        step: Step,
        candidates: list[Candidate],
        rows: list[int],
        questions: Mapping[str, list[int]],
        raced: Scores | None,
    ) -> Scores:
        """All of these questions; what the race has scored is not scored again."""
        if raced is None:
            return self._ask(step, candidates, rows, questions)
        known = raced.only(list(questions)).rows(rows)
        return known.filled_by(self._ask(step, candidates, rows, left_to_score(raced, rows, questions)))

    def _ask(
        self, step: Step, candidates: list[Candidate], rows: list[int], samples: Mapping[str, list[int]]
    ) -> Scores:
        """Have the Scorer score some candidates on some samples; the incumbent may have been scored before."""
        names = list(samples)
        n_questions = sum(map(len, samples.values()))
        if not (rows and rows[0] == 0 and candidates[0].is_current and self._current is not None):
            self._scored += n_questions * len(rows)
            return self.scorer.score(step.unit, [candidates[row] for row in rows], names, samples)
        self.observer.candidate(candidates[0].label)
        known = self._current.only(names).limited_to(samples)
        if len(rows) == 1:
            return known
        self._scored += n_questions * (len(rows) - 1)
        return known.followed_by(self.scorer.score(step.unit, [candidates[r] for r in rows[1:]], names, samples))

    def _fault(self, scores: Scores, row: int, guard: str | None) -> str | None:
        """Why a candidate is out: a score that is not finite, or worse on a guarded dataset."""
        for dataset in scores.samples:
            was_scored = bool(scores.evaluated[dataset][row].any())
            if was_scored and not bool(torch.isfinite(scores.mean(dataset)[row])):
                return f"scored NaN or infinity on {dataset}"
            if guard and row != 0 and dataset in self.base_means:
                value, now = (float(scores.mean(dataset)[r]) for r in (row, 0))
                names = (self.config.dataset[dataset].mode, dataset)
                if is_degraded(value, self.base_means[dataset], now, guard, names, self.rules):
                    return f"degraded on {dataset}"
        return None

    def _write_ledger(self, step: Step, candidates: list[Candidate], rows: list[int], scores: Scores) -> None:
        lines: list[dict[str, Any]] = []
        for row in rows:
            for dataset in scores.samples:
                lines.append(
                    {
                        "step": step.key,
                        "candidate": candidates[row].label,
                        "dataset": dataset,
                        "score": float(scores.mean(dataset)[row]),
                        "samples": [round(float(x), 7) for x in scores.samples[dataset][row]],  # NaN: not evaluated
                        "truncated": int(scores.truncated[dataset][row].sum()),
                    }
                )
        self.record.append_evaluations(lines)

    def _stored(self, step: Step, winner: Candidate) -> Recipe:
        """The recipe with the winner, its transient values stored next to the record as they were scored."""
        recipe, file = winner.of(self.recipe), step.key.replace("/", ".")
        transient = {name: value for name, value in recipe.tensors.items() if value.is_transient}
        return recipe.with_values(
            {
                name: self.record.store(
                    file if len(transient) == 1 else f"{file}.{name}", name, self.scorer.value(value)
                )
                for name, value in transient.items()
            }
        )

    def _outcome(
        self,
        step: Step,
        candidates: list[Candidate],
        twin: dict[str, int],
        scores: Scores,
        dropped: dict[int, str],
        winner: int,
    ) -> Outcome:
        rows = {candidate.label: row for row, candidate in enumerate(candidates)} | twin
        metrics: dict[str, dict[str, float | None]] = {}
        truncated: dict[str, dict[str, float]] = {}
        for dataset in scores.samples:
            means = scores.mean(dataset)
            metrics[dataset] = {
                label: float(means[row]) if bool(torch.isfinite(means[row])) else None for label, row in rows.items()
            }
            if bool(scores.truncated[dataset].any()):
                n_scored = scores.evaluated[dataset].sum(dim=1)
                rates = scores.truncated[dataset].sum(dim=1) / n_scored
                truncated[dataset] = {
                    label: round(float(rates[row]), 4) for label, row in rows.items() if n_scored[row]
                }
        return Outcome(
            stage=step.stage,
            unit=step.unit.name,
            winner=candidates[winner].label,
            changed=winner != 0,
            metrics=metrics,
            dropped={candidates[row].label: reason for row, reason in dropped.items()},
            truncated=truncated,
        )
