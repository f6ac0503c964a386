"""CMA-ES (the package cmaes) over points that stand for candidates, scored on some of the questions.

A generation is a step of the search, so that a resumed run tells the distribution what it was told before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from olmfast.evaluation.scorer import Candidate
from olmfast.search.halves import Indices
from olmfast.search.loop import Search, Step
from olmfast.weights.architecture import Unit
from olmfast.weights.draws import normal

Point = np.ndarray[Any, np.dtype[np.float64]]


class Sampler:
    """One distribution. `candidate` makes a point's candidate of a label and the point (numbers,), float64."""

    def __init__(
        self,
        search: Search,
        unit: Unit,
        key: str,
        questions: Indices,
        candidate: Callable[[str, Point], Candidate],
        start: Point,
        sigma: float,
        bounds: Point | None = None,
        population: int | None = None,
    ) -> None:
        """`bounds` are the lowest and the highest value of each number, (numbers, 2); None: any."""
        from cmaes import CMA

        seed = int(normal(1, search.config.seed, key).abs().item() * 2**20)
        self.search, self.unit, self.key, self.questions = search, unit, key, questions
        self.candidate, self.n_numbers = candidate, len(start)
        if len(start) == 1:  # the package wants two: one more, which nobody looks at
            start, bounds = np.repeat(start, 2), None if bounds is None else np.repeat(bounds, 2, axis=0)
        self.optimizer = CMA(mean=start, sigma=sigma, bounds=bounds, seed=seed, population_size=population)

    @property
    def mean(self) -> Point:
        """The distribution's mean (numbers,): what all that was scored has led to."""
        mean: Point = self.optimizer.mean[: self.n_numbers].copy()
        return mean

    def take(self, number: int) -> None:
        """Draw a generation, have it scored, and move the distribution."""
        points = [self.optimizer.ask() for _ in range(self.optimizer.population_size)]
        step = Step(
            f"{self.key}/{number}",
            self.key.split("/")[0],
            self.unit,
            partial(self._candidates, points),
            accept=lambda _, alive: alive or [0],
            commit=False,
            races=False,
            tested=False,
            questions=self.questions,
        )
        values = self._values(self.search.take(step).metrics, len(points))
        self.optimizer.tell(list(zip(points, values, strict=True)))

    def _candidates(self, points: Sequence[Point]) -> list[Candidate]:
        return [self.candidate(str(index), point[: self.n_numbers]) for index, point in enumerate(points)]

    def _values(self, metrics: dict[str, dict[str, float | None]], n: int) -> list[float]:
        """What each point is worth, lower being better; one without a score is worse than all others."""
        assert self.search.crossfit is not None
        values = []
        for index in range(n):
            means = {name: by[str(index)] for name, by in metrics.items()}
            known = {name: value if value is not None else math.nan for name, value in means.items()}
            values.append(-self.search.crossfit.scale.skill(known))
        worst = max((value for value in values if math.isfinite(value)), default=0.0)
        return [value if math.isfinite(value) else worst + 1 for value in values]
