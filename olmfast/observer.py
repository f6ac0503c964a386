"""Who watches a run or a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmfast.output.writer import OutputTensor
    from olmfast.search.costs import Schedule
    from olmfast.search.log import Outcome
    from olmfast.static.sensitivity import Ranked


class Observer:
    """Who watches a run or a merge. This one shows nothing; subclasses override the methods they need."""

    def planned(self, schedule: Schedule) -> None:
        """What the run will do at most."""

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """A step begins, or the scoring of models that no choice is made of."""

    def candidate(self, label: str) -> None:
        """One candidate has been evaluated."""

    def spent(self, evaluations: float) -> None:
        """So many evaluations have been spent, those of a step that goes along gradients as it goes on."""

    def chosen(self, outcome: Outcome) -> None:
        """A step has been taken and recorded."""

    def recorded(self, outcome: Outcome) -> None:
        """A step was taken in an earlier session."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def ranked(self, layers: Sequence[Ranked], n_merged: int) -> None:
        """The layers tried by a sensitivity ranking, the best first, before the first `n_merged` are merged."""

    def merging(self, method: str, n_bytes: int) -> None:
        """A merge begins to write a result with `n_bytes` of weights."""

    def written(self, tensor: OutputTensor) -> None:
        """One of its tensors has been written."""
