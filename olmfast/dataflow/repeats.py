"""Repeating a block: every contiguous range of one model's blocks run twice, coarse to fine, told with intervals.

What people do by hand on a handful of questions, done so that it can be believed. Half of the questions picks: on them
ranges race, a grid of them first, then those around the best on grids of half the step. The best of all is tested once
on the other half. Held-out questions then tell what it and the runners-up are worth; they choose nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from olmfast.config.searches import Dataflow
from olmfast.dataflow.gains import Gain, compared, is_better, leads_of
from olmfast.dataflow.hops import Hop
from olmfast.dataflow.running import PathCandidate
from olmfast.evaluation.scorer import Candidate, Scorer
from olmfast.evaluation.scores import Scores
from olmfast.search.acceptance import Scale
from olmfast.search.halves import Halves
from olmfast.search.loop import Search, Step
from olmfast.search.ranges import Range, around, coarsest, grid, told
from olmfast.search.record import LEDGER
from olmfast.weights.skeletons import Skeletons


class RepeatSweep:
    """The sweep of a run, whose model is the search's base."""

    def __init__(self, search: Search, config: Dataflow, skeletons: Skeletons) -> None:
        self.search, self.config, self.skeletons = search, config, skeletons
        self.model, self.n_blocks = search.recipe.base, search.architecture.n_blocks
        self.halves = Halves.of(search.scorer.sizes, search.config.seed, search.config.sources)
        self.unit = search.architecture.model_unit(search.tensors)
        self.gains: dict[Range, Gain] = {}  # on the questions that pick, as many as it was scored on
        self.whole: set[Range] = set()  # the ranges scored on all of those

    def run(self) -> None:
        """Sweep, and test the best. What came of it is in the record; the recipe is the best range's, if it passed."""
        step = coarsest(self.n_blocks, self.config.grid)
        self._take(f"repeat/{step}", grid(self.n_blocks, step))
        while step > 1:
            step //= 2
            self._take(f"repeat/{step}", around(self.best[: self.config.keep], step, self.n_blocks))
        number = 1
        while left := [one for one in around(self.best[:1], 1, self.n_blocks) if one not in self.gains]:
            number += 1
            self._take(f"repeat/1/{number}", left)
        if self.best and self.gains[self.best[0]].mean > 0:
            self._test(self.best[0])

    @property
    def best(self) -> list[Range]:
        """The ranges from best to worst: first those that were scored on all questions that pick."""
        known = [one for one, gain in self.gains.items() if math.isfinite(gain.mean)]
        return sorted(known, key=lambda one: (one not in self.whole, -self.gains[one].mean, one))

    def candidate(self, one: Range) -> PathCandidate:
        """A range as a path: up to its end, and again from its beginning."""
        return self._path(told(one), [*range(one[1]), *range(one[0], self.n_blocks)])

    def _path(self, label: str, blocks: Sequence[int]) -> PathCandidate:
        hops, ends = [Hop(self.model, block) for block in blocks], (self.model, self.model)
        made: PathCandidate = PathCandidate.of_hops(label, hops, self.search.sources.pool, ends, self.skeletons)
        return made

    def _take(self, key: str, ranges: Sequence[Range]) -> None:
        """One round: the ranges that are new race."""
        new = {told(one): one for one in ranges if one not in self.gains}
        if not new:
            return

        def propose() -> list[Candidate]:
            return [Candidate("as it is"), *map(self.candidate, new.values())]

        step = Step(key, "repeat", self.unit, propose, commit=False, tested=False, questions=self.halves.first)
        outcome = self.search.take(step)
        answers = self._answers(key)
        for label, one in new.items():
            self.gains[one] = Gain.of(self._leads(answers.get(label, {}), answers["as it is"]))
            if label not in outcome.dropped:
                self.whole.add(one)

    def _test(self, one: Range) -> None:
        """Test the best on the other half of the questions, once; it replaces the model if it passes."""

        def propose() -> list[Candidate]:
            return [Candidate("as it is"), self.candidate(one)]

        step = Step(
            "repeat/test",
            "repeat",
            self.unit,
            propose,
            accept=self._accept,
            races=False,
            tested=False,
            questions=self.halves.second,
        )
        self.search.take(step)

    def _accept(self, scores: Scores, alive: list[int]) -> list[int]:
        """Row 1 if it is better than the model beyond what luck makes of one test."""
        scale = Scale(self.search.rules.spans, self.search.rules.weights)
        better = is_better(scores, self.halves.second, scale, self.search.config.required_p, 1)
        return [1 if 1 in alive and better else 0]

    def _leads(self, own: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Dataset by dataset, the gain on each question that both have a score of."""
        spans = {name: span for name, span in self.search.rules.spans.items() if name in own}
        both = {name: torch.stack([model[name], own[name]]) for name in spans}
        return leads_of(Scores(both, {}, {}), 1, spans)

    def _answers(self, key: str) -> dict[str, dict[str, torch.Tensor]]:
        """Label -> dataset -> the score of each question, NaN where it has none, of a step that was taken."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for line in (self.search.record.folder / LEDGER).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["step"] == key:
                values = [math.nan if score is None else score for score in entry["samples"]]
                found.setdefault(entry["candidate"], {})[entry["dataset"]] = torch.tensor(values, dtype=torch.float64)
        return found

    def report(self, scorer: Scorer, modes: Mapping[str, str]) -> dict[str, Any]:
        """What the sweep found, as plain JSON values: every range tried, and the best of them on other questions.

        `scorer` has the held-out questions; without any, it has those of the half that did not pick.
        """
        shown = self.best[: self.config.shown]
        candidates = [self._path("as it is", range(self.n_blocks)), *map(self.candidate, shown)]
        scores = scorer.score(self.unit, candidates)
        rows = [
            {"range": list(one), "hops": self.n_blocks + one[1] - one[0], "picked by": self.gains[one].mean}
            for one in shown
        ]
        best, own = compared(scores, rows, modes)
        tested = self.search.record.outcome("repeat/test")
        return {
            "model": self.model,
            "blocks": self.n_blocks,
            "comparisons": len(self.gains),
            "ranges": [
                {"range": list(one), **gain.to_json(), "whole": one in self.whole}
                for one, gain in sorted(self.gains.items())
            ],
            "best": best,
            "scores of the model": own,
            "tested": tested is not None,
            "chosen": list(self.best[0]) if tested is not None and tested.changed else None,
        }
