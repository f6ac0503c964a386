"""The one door between search and evaluation: candidates of a unit in, scores per sample out.

A search knows no model. It has candidates scored, and tells its Scorer which recipe came of it; whoever scores, in
this process or in another, keeps a model in step with that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from olmfast.evaluation.scores import Scores
from olmfast.weights.architecture import Unit
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Candidate:
    """A unit's proposed values, canonical name -> expression. Without values it is the current model.

    `recipe`, in place of values, is a model altogether: a donor with the settings of its own config.json, or one of
    fewer blocks. A candidate pickles to little more than its names.
    """

    label: str
    values: Mapping[str, Expression] = field(default_factory=dict)
    recipe: Recipe | None = None

    @property
    def is_current(self) -> bool:
        """Whether it is the current model."""
        return self.recipe is None and not self.values

    def of(self, current: Recipe) -> Recipe:
        """The recipe that the current one becomes with it."""
        return current.with_values(self.values) if self.recipe is None else self.recipe


@dataclass(frozen=True)
class Direction:
    """From one value of a tensor to another: `end` - `begin`; with an `axis`, each row along it is a direction."""

    begin: Expression
    end: Expression
    axis: int | None = None


@dataclass(frozen=True)
class Slopes:
    """`losses` maps a dataset to its questions' mean loss; `along` a tensor to its slopes, float64:
    (directions,), or (directions, rows) where these have an axis."""

    losses: dict[str, float]
    along: dict[str, torch.Tensor]


class Scorer(Protocol):
    """Whoever evaluates candidates: sequential, batched or distributed."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Dataset -> number of samples."""
        ...

    def score(
        self,
        unit: Unit,
        candidates: Sequence[Candidate],
        datasets: Sequence[str] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
    ) -> Scores:
        """Score all candidates of one unit; `datasets` and `samples` (indices per dataset) narrow it down."""
        ...

    def slopes(
        self,
        candidate: Candidate,
        directions: Mapping[str, Sequence[Direction]],
        samples: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        teachers: Mapping[str, Candidate],
    ) -> Slopes:
        """How the loss of a candidate changes along directions of its tensors (canonical name -> directions).

        The loss is the sum over datasets of `weights[dataset]` times the mean over its `samples` (indices); see
        `evaluation/slopes.py`. `teachers` are the models that datasets are taught by (`evaluation/lessons.py`); one
        without a teacher needs expected answers.
        """
        ...

    def value(self, expression: Expression) -> torch.Tensor:
        """The tensor that an expression was scored as, on the CPU: what is kept of a transient one that was chosen."""
        ...

    def commit(self, recipe: Recipe, label: str | None = None) -> None:
        """The current model is this recipe from now on.

        `label` is the candidate that the step chose, out of those just scored; None: one that was not scored.
        """
        ...

    @property
    def state(self) -> Mapping[str, Any]:
        """What a scorer of a resumed run has to know to go on in the same way: JSON values by key, none of them null.

        A step writes down the entries that it has changed, so each thing that changes by itself has one of its own.
        """
        ...

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None: ...


def side_by_side(scorer: Scorer, jobs: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """What jobs return, each of which calls the scorer again and again: at once where it can take several calls."""
    at_once = getattr(scorer, "side_by_side", None)
    if at_once is None:
        return [job() for job in jobs]
    found: list[Answer] = at_once(jobs)
    return found
