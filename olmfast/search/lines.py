"""What training goes on from: a line of models for each half of the questions.

The mean of both lines is what is committed. It has seen the answers to all questions, so that nothing trained later
could be compared with it; each line's next model is compared with its last one, on the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.search.crossfit import FIRST, SECOND
from olmfast.search.log import Standing
from olmfast.weights.recipe import Recipe


@dataclass(frozen=True)
class Lines:
    """`recipes` are the last models of the first half's line and of the second's, empty where both go on from the
    current recipe. `crossed` are the scores of two candidates: of what was current when training began, and of the
    lines, each on the other half; None where neither has been trained."""

    recipes: tuple[Recipe, ...] = ()
    crossed: Scores | None = None

    def origins(self, current: Recipe) -> tuple[Recipe, ...]:
        """What training goes on from: on the first half, on the second, and their mean."""
        if not self.recipes:
            return (current,) * 3
        return (*self.recipes, current if self.crossed is not None else self.recipes[0])

    @classmethod
    def begun(cls, recipe: Recipe) -> Lines:
        """Both begin at a recipe that nothing has been trained for."""
        return cls((recipe, recipe))

    def trained(self, candidates: Sequence[Candidate], scores: Scores, before: Recipe) -> Lines:
        """What a step with trained candidates, on the recipe `before`, leads to."""
        first, second = (candidates[row].of(before) for row in (FIRST, SECOND))
        begun = scores.rows([0]) if self.crossed is None else self.crossed.rows([0])
        return Lines((first, second), begun.followed_by(scores.rows([FIRST]).filled_by(scores.rows([SECOND]))))

    @classmethod
    def recalled(cls, standing: Standing) -> Lines:
        """Those that a record has kept."""
        return cls(standing.lines, Scores.from_json(standing.crossed) if standing.crossed else None)
