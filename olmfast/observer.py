"""Who watches a run."""

from __future__ import annotations

from olmfast.search.log import Outcome


class Observer:
    """Who watches a run. This one shows nothing; others override what they want to be told."""

    def planned(self, n_candidates: int) -> None:
        """How many candidates the whole run has at most."""

    def step(self, stage: str, unit: str, n_candidates: int) -> None:
        """A step begins."""

    def candidate(self, label: str) -> None:
        """One candidate has been evaluated."""

    def chosen(self, outcome: Outcome) -> None:
        """A step has been taken and recorded."""

    def recorded(self, outcome: Outcome) -> None:
        """A step was taken in an earlier session."""

    def note(self, text: str) -> None:
        """Something the user should know."""
