"""Models side by side: the score of each on each dataset, and how much of the donors' skill each retains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from olmfast.evaluation.scorer import Candidate, Scorer
from olmfast.search.ranking import skill_retained
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Copy, Linear, Recipe

AVERAGE = "plain average"
RESULT = "merged"


@dataclass
class Scoreboard:
    """`rows` maps a model's label to its mean score per dataset; `donors` are the labels that set the scale."""

    donors: list[str]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    truncated: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def datasets(self) -> list[str]:
        """The datasets, in order."""
        return list(next(iter(self.rows.values()), {}))

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """Dataset -> the donors' (best, worst) score."""
        return {
            name: (min(self.rows[d][name] for d in self.donors), max(self.rows[d][name] for d in self.donors))
            for name in self.datasets
        }

    def retained(self, label: str) -> float:
        """Mean skill retained of one model; NaN if no dataset tells the donors apart."""
        return skill_retained(self.rows[label], self.spans)

    def alike(self) -> list[str]:
        """Datasets on which all donors score alike, left out of `retained`."""
        alone = {name: skill_retained({name: self.rows[self.donors[0]][name]}, self.spans) for name in self.datasets}
        return [name for name, value in alone.items() if math.isnan(value)]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, readable back by `from_json`; `retained` is for readers."""
        retained = {label: self.retained(label) for label in self.rows} if self.rows else {}
        return {"donors": self.donors, "rows": self.rows, "truncated": self.truncated, "skill_retained": retained}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scoreboard:
        """Read what `to_json` wrote."""
        return cls(list(data["donors"]), dict(data["rows"]), dict(data["truncated"]))

    def score(self, scorer: Scorer, recipes: Mapping[str, Recipe | None], names: Sequence[str], pool: Pool) -> None:
        """Add a row per recipe (None: the model as it is now)."""
        unit = pool.architecture.model_unit(pool.tensors)
        candidates = [
            Candidate(label, {name: recipe.tensors[name] for name in unit.tensors} if recipe else {})
            for label, recipe in recipes.items()
        ]
        scores = scorer.score(unit, candidates, list(names))
        for row, label in enumerate(recipes):
            self.rows[label] = {name: float(scores.mean(name)[row]) for name in names}
            rates = {name: float(scores.truncated[name][row].float().mean()) for name in names}
            self.truncated[label] = {name: rate for name, rate in rates.items() if rate}


def plain_average(base: str, donors: Sequence[str], pool: Pool) -> Recipe:
    """The recipe that averages every tensor of the donors with equal weights."""
    weights = (1.0,) * len(donors)
    return Recipe(
        base,
        {
            name: Linear(tuple(Copy(donor, name) for donor in donors), weights, normalize=True)
            if pool[base].tensors[name].dtype.is_floating_point
            else Copy(base, name)
            for name in pool.tensors
        },
    )
