"""What the parts of the fast Scorer hand to each other: candidates evaluated together, and what that has cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from olmfast.evaluation.division import Part
from olmfast.evaluation.leaves import Leaf
from olmfast.evaluation.scores import Scores


@dataclass
class Cohort:
    """Candidates (rows of `scores`) to be evaluated together on parts of the tasks (`division.py`).

    A candidate's place in the cohort is its place in `rows` and `labels`, and its row in the stacks of `leaves`.
    """

    scores: Scores
    rows: Sequence[int]
    labels: Sequence[str]
    parts: Sequence[Part]
    first: int | None  # the first block that differs from the current model; None: the embedding does
    leaves: Sequence[Leaf]  # where the candidates' values are stacked; empty: they are live


@dataclass
class Statistics:
    """What has been computed so far."""

    tokens: int = 0  # of inputs, times the blocks they went through
    padded: int = 0  # the same with their batches' padding
    passes: int = 0  # forward passes
    decoded: int = 0  # tokens decoded after leaving a trajectory
    splits: int = 0  # times that something did not fit the memory and was halved

    @property
    def padding(self) -> float:
        """The share of padding in what was computed."""
        return 1 - self.tokens / self.padded if self.padded else 0.0
