"""The joint search of pruning: which layers go, and what those that stay are blended of, together.

CatCMA with margin (Hamano et al., arXiv 2504.07884; the package cmaes) draws an indicator for each layer and the
shares; a share plays a part only where its layer goes, or, of a donor's layer, where that layer stays. It begins at the
best of a few models that need no search: the last layers merged by similarity or uniformly, or dropped, and the layers
of least influence dropped, or blended in (influence: 1 - cos of what enters and leaves a layer, arXiv 2403.03853).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from olmfast.errors import InputError, OlmfastError
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.pruning.depths import Depths, Point
from olmfast.search.loop import Search, Step
from olmfast.weights.draws import normal

BLENDED, GIVEN, SIGMA = 0.15, 0.15, 0.1  # shares at first: of a layer that goes, of a donor's; and their step size
LIKELY, UNLIKELY = 0.85, 0.05  # that a layer goes at first, if the start lets it go, and if not


@dataclass
class JointSearch:
    """One search. `best` is the point of the current model; `front` maps a number of layers that go to the best point
    found and what it scores."""

    search: Search
    depths: Depths
    influence: Sequence[float]
    best: Point
    value: float = math.nan
    front: dict[int, tuple[Point, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weights = {name: entry.weight for name, entry in self.search.config.dataset.items()}
        total = math.fsum(weights.values())
        if not total:
            raise InputError("dataset: every weight is 0, so nothing is searched by")
        self.weights = {name: weight / total for name, weight in weights.items()}
        self.unit = self.search.architecture.model_unit(self.search.tensors)

    def starts(self, given: Mapping[str, Point]) -> dict[str, Point]:
        """Models that need no search: those given, and with the layers of least influence gone."""
        found = dict(given)
        gone = self._least(range(1, self.depths.n_blocks), self.depths.n_steps)
        found["least influence dropped"] = Point(gone, {}, {})
        found["least influence blended"] = self._blended(gone)
        if self.depths.donors:
            share = 1 / len(self.depths.pool)
            every = [(donor, k) for donor in self.depths.donors for k in range(self.depths.n_blocks)]
            found["least influence, all donors"] = Point(gone, {}, dict.fromkeys(every, share))
        return found

    def run(self, given: Mapping[str, Point]) -> None:
        """Search until the budget is spent."""
        starts = self.starts(given)
        self.round("start", list(starts.items()))
        optimizer, size = self._optimizer()
        for number in count(1):
            drawn = [optimizer.ask() for _ in range(size)]
            points = [self._point(solution) for solution in drawn]
            values = self.round(f"joint/{number}", [(str(index), point) for index, point in enumerate(points, 1)])
            optimizer.tell(list(zip(drawn, values, strict=True)))
            self._look_shallower(number)

    def round(self, key: str, tried: Sequence[tuple[str, Point]], commit: bool = True) -> list[float]:
        """What points score; the best of them and the current one becomes the current one.

        Without `commit` it stays as it is: points that let fewer layers go are for the front alone.
        """
        every = dict(tried)

        def propose() -> list[Candidate]:
            made = [Candidate(label, recipe=self.depths.recipe(point)) for label, point in tried]
            return [Candidate("current"), *made]

        step = Step(key, "joint", self.unit, propose, accept=self._accept, commit=commit, tested=False)
        outcome = self.search.take(step)
        if outcome.dropped:
            label, why = next(iter(outcome.dropped.items()))
            raise OlmfastError(f"{key}: {label}: {why}; use another --dtype")
        values = {label: self._objective(outcome.metrics, label) for label in ("current", *every)}
        if commit and outcome.changed:
            self.best = every[outcome.winner]
        self.value = self._objective(outcome.metrics, outcome.winner) if commit else self.value
        for label, point in every.items():
            self._enter(point, values[label])
        self._enter(self.best, self.value)
        return [values[label] for label, _ in tried]

    def _enter(self, point: Point, value: float) -> None:
        n = len(point.gone)
        if n not in self.front or value < self.front[n][1]:
            self.front[n] = (point, value)

    def _objective(self, metrics: Mapping[str, Mapping[str, float | None]], label: str) -> float:
        return math.fsum(weight * float(metrics[name][label] or 0.0) for name, weight in self.weights.items())

    def _accept(self, scores: Scores, alive: list[int]) -> list[int]:
        values: Any = sum(weight * scores.mean(name).double() for name, weight in self.weights.items())
        return sorted(alive, key=lambda row: (float(values[row]), row))

    # Points

    def _least(self, layers: Sequence[int], n: int) -> tuple[int, ...]:
        """The n layers that change least of what enters them."""
        return tuple(sorted(sorted(layers, key=lambda index: (self.influence[index], -index))[:n]))

    def _blended(self, gone: tuple[int, ...]) -> Point:
        return Point(gone, dict.fromkeys(range(1, self.depths.n_blocks), BLENDED), {})

    def _look_shallower(self, number: int) -> None:
        """Score the current point with some layers back, those of most influence first: another depth every round."""
        if self.depths.n_steps < 2:
            return
        point, n = self.best, 1 + (number - 1) % (self.depths.n_steps - 1)
        while len(point.gone) > n:
            point = point.without(max(point.gone, key=lambda index: (self.influence[index], index)))
        self.round(f"front/{number}", [(f"{n} gone", point)], commit=False)

    def _optimizer(self) -> tuple[Any, int]:
        from cmaes import CatCMAwM

        n, donors = self.depths.n_blocks, self.depths.donors
        mean = [self.best.shares.get(k, BLENDED) for k in range(1, n)]
        mean += [self.best.given.get((donor, k), GIVEN) for donor in donors for k in range(n)]
        goes = np.array([LIKELY if k in self.best.gone else UNLIKELY for k in range(1, n)])
        seed = int(normal(1, self.search.config.seed, "joint").abs().item() * 2**20)
        optimizer = CatCMAwM(
            x_space=[[0.0, 1.0]] * len(mean),
            c_space=[2] * (n - 1),
            mean=np.clip(np.array(mean), 0.02, 0.98),
            sigma=SIGMA,
            cat_param=np.stack([1 - goes, goes], axis=1),
            seed=seed,
        )
        return optimizer, optimizer.population_size

    def _point(self, solution: Any) -> Point:
        """What a solution stands for: as many layers go as are wanted; where it says otherwise, influence decides."""
        n, donors, wanted = self.depths.n_blocks, self.depths.donors, self.depths.n_steps
        goes = [k for k in range(1, n) if solution.c[k - 1, 1]]
        stays = [k for k in range(1, n) if k not in goes]
        gone = self._least(goes, wanted)
        gone = tuple(sorted((*gone, *self._least(stays, wanted - len(gone)))))
        shares = [min(1.0, max(0.0, float(x))) for x in solution.x]
        given = {(donor, k): shares[n - 1 + i * n + k] for i, donor in enumerate(donors) for k in range(n)}
        return Point(gone, dict(zip(range(1, n), shares[: n - 1], strict=True)), given)
