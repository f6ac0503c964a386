"""The search for a path through the blocks of several models (data-flow space, Akiba et al., arXiv 2403.13187).

Paths are drawn from a distribution that begins at the first model as it is, and moves to where they score well on one
half of the questions. Now and then the best so far is tested on the other half; if it is better than the current path
there, it replaces it. At the end, questions that no step has used pick among all that were current once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from olmfast.config.searches import Dataflow
from olmfast.dataflow.drawing import Space, distribution
from olmfast.dataflow.gains import compared, is_better
from olmfast.dataflow.hops import Hop
from olmfast.dataflow.plan import told
from olmfast.dataflow.running import PathCandidate
from olmfast.evaluation.scorer import Candidate, Scorer
from olmfast.evaluation.scores import Scores
from olmfast.search.acceptance import Scale
from olmfast.search.halves import Halves
from olmfast.search.loop import Search, Step
from olmfast.weights.draws import normal
from olmfast.weights.skeletons import Skeletons

GENERATIONS_PER_TEST = 5
WORST = 1e6  # of what a distribution is told of paths that run
Hops = tuple[Hop, ...]


class PathSearch:
    """The search of a run, from its base, the first model; `models` are those whose blocks a path may use."""

    def __init__(self, search: Search, config: Dataflow, models: tuple[str, ...], skeletons: Skeletons) -> None:
        self.search, self.config, self.skeletons = search, config, skeletons
        n_blocks = search.architecture.n_blocks
        self.space = Space(models, n_blocks, config.passes, config.factors)
        self.max_hops = config.most_hops(n_blocks)
        self.halves = Halves.of(search.scorer.sizes, search.config.seed, search.config.sources)
        self.scale = Scale(search.rules.spans, search.rules.weights)
        self.unit = search.architecture.model_unit(search.tensors)
        self.current: Hops = self.space.path(self.space.first, None)
        self.kept: dict[str, Hops] = {"start": self.current}  # the paths of the record's snapshots
        self.skills: dict[Hops, float] = {}  # on the half that picks
        self._tried: set[Hops] = set()  # in a test
        self._n_tests = 0

    def run(self) -> None:
        """Search until the generations or the budget are spent. What passed a test is kept in the record."""
        seed = int(normal(1, self.search.config.seed, "paths").abs().item() * 2**20)
        drawn_from = distribution(self.config, self.space, seed)
        self.search.record.keep_snapshot("start")
        self._score("paths/0", [self.current])
        for generation in range(1, self.config.n_generations + 1):
            drawn = drawn_from.draw()
            self._score(f"paths/{generation}", [one.hops for one in drawn])
            drawn_from.tell(drawn, [self._value(one.hops) for one in drawn])
            if generation % GENERATIONS_PER_TEST == 0 or generation == self.config.n_generations:
                self._test(generation)

    @property
    def front(self) -> list[Hops]:
        """The best path of each depth that is better than all shorter ones, by the half that picks."""
        found: list[Hops] = []
        for path in sorted(self.skills, key=lambda path: (len(path), -self.skills[path])):
            if not found or self.skills[path] > self.skills[found[-1]]:
                found.append(path)
        return found

    def _score(self, key: str, paths: list[Hops]) -> None:
        """Have those scored that are neither known nor empty nor too long; the others cost nothing."""
        new = [path for path in dict.fromkeys(paths) if path not in self.skills and self._runs(path)]
        if not new:
            return

        def propose() -> list[Candidate]:
            return [self._candidate(str(index), path) for index, path in enumerate(new)]

        step = Step(
            key,
            "paths",
            self.unit,
            propose,
            accept=lambda _, alive: alive or [0],
            commit=False,
            races=False,
            tested=False,
            questions=self.halves.first,
        )
        metrics = self.search.take(step).metrics
        for index, path in enumerate(new):
            means = {name: by[str(index)] for name, by in metrics.items()}
            known = {name: mean for name, mean in means.items() if mean is not None}
            self.skills[path] = self.scale.skill(known) if len(known) == len(means) else -math.inf

    def _runs(self, path: Hops) -> bool:
        """Whether a path is scored: the first model always is, however deep."""
        return path == self.kept["start"] or 0 < len(path) <= self.max_hops

    def _value(self, path: Hops) -> float:
        """What the distribution is told, lower being better: paths that do not run are worse than all that do."""
        if self._runs(path):
            return min(WORST, -self.skills[path])
        return 2 * WORST + max(0, len(path) - self.max_hops)

    def _test(self, generation: int) -> None:
        """Test the best so far against the current path on the half that did not pick it."""
        best = min(self.skills, key=lambda path: (-self.skills[path], len(path)))
        if best in self._tried or self.skills[best] <= self.skills[self.current]:
            return
        self._tried.add(best)
        self._n_tests += 1

        def propose() -> list[Candidate]:
            return [Candidate("current"), self._candidate(told(best), best)]

        step = Step(
            f"paths/test/{generation}",
            "paths",
            self.unit,
            propose,
            accept=self._accept,
            races=False,
            tested=False,
            questions=self.halves.second,
        )
        if self.search.take(step).changed:
            self.current, self._n_tests = best, 0
            self.kept[f"generation {generation}"] = best
            self.search.record.keep_snapshot(f"generation {generation}")

    def _accept(self, scores: Scores, alive: list[int]) -> list[int]:
        better = is_better(scores, self.halves.second, self.scale, self.search.config.required_p, self._n_tests)
        return [1 if 1 in alive and better else 0]

    def _candidate(self, label: str, path: Hops) -> PathCandidate:
        ends = (self.search.config.base_name, self.search.config.base_name)
        made: PathCandidate = PathCandidate.of_hops(label, path, self.search.sources.pool, ends, self.skeletons)
        return made

    def report(self, scorer: Scorer, modes: Mapping[str, str]) -> dict[str, Any]:
        """The front of score against depth, as plain JSON values, on questions that chose nothing."""
        front = self.front
        candidates = [self._candidate("first model", self.kept["start"])]
        candidates += [self._candidate(str(index), path) for index, path in enumerate(front)]
        rows = [{"path": told(path), "hops": len(path), "picked by": self.skills[path]} for path in front]
        best, own = compared(scorer.score(self.unit, candidates), rows, modes)
        return {
            "first model": self.search.config.base_name,
            "max_hops": self.max_hops,
            "comparisons": len(self.skills),
            "front": best,
            "scores of the first model": own,
        }
