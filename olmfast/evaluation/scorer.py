"""The one door between search and evaluation: candidates of a unit in, scores per sample out.

`SequentialScorer` is the plain reference: candidate by candidate, every dataset in full, batched over samples.
Every faster scorer is tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from olmfast.evaluation.scores import Scores
from olmfast.weights.architecture import Unit
from olmfast.weights.methods import Values


@dataclass(frozen=True)
class Candidate:
    """A unit's proposed values: canonical name -> values. Without values it is what is there now.

    `settings` names the donor whose config.json the module is built by, for a donor that is scored whole; None is
    the base's, which every merge has.
    """

    label: str
    values: Mapping[str, Values] = field(default_factory=dict)
    settings: str | None = None


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

    def decided(self, label: str) -> None:
        """The step is over: the model is now as the candidate of this label, out of those just scored, was."""
        ...

    @property
    def state(self) -> Any:
        """What a scorer of a resumed run has to know to go on in the same way: plain JSON values."""
        ...

    @state.setter
    def state(self, state: Any) -> None: ...
