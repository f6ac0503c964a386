"""Models side by side: the score of each on each dataset, and how much of the donors' skill each retains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmfast.config.run import parse_datasets
from olmfast.evaluation.open import Evaluation, Questions, Settings
from olmfast.evaluation.scorer import Candidate, Scorer
from olmfast.search.ranking import skill_retained
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe

AVERAGE = "plain average"
RESULT = "merged"
START = "start"  # of a joint search


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
        """Dataset -> the (best, worst) score of the donors that have one; NaN if none has."""
        finite = {
            name: [score for donor in self.donors if math.isfinite(score := self.rows[donor][name])]
            for name in self.datasets
        }
        return {name: (min(known), max(known)) if known else (math.nan, math.nan) for name, known in finite.items()}

    def retained(self, label: str) -> float:
        """Mean skill retained of one model; NaN if no dataset tells the donors apart."""
        return skill_retained(self.rows[label], self.spans)

    def cell(self, label: str, dataset: str) -> str:
        """A score as tables show it, with the share of generations that were cut off, if any."""
        rate = self.truncated.get(label, {}).get(dataset, 0.0)
        return f"{self.rows[label][dataset]:.4f}" + (f" ({rate:.0%} cut off)" if rate else "")

    def alike(self) -> list[str]:
        """Datasets on which all donors score alike, left out of `retained`."""
        return [name for name, span in self.spans.items() if math.isnan(skill_retained({name: 0.0}, {name: span}))]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, readable back by `from_json`; `retained` is only for readers."""
        retained = {label: self.retained(label) for label in self.rows} if self.rows else {}
        return {"donors": self.donors, "rows": self.rows, "truncated": self.truncated, "skill_retained": retained}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scoreboard:
        """Read what `to_json` wrote, through strict JSON: NaN and infinite scores have become null there."""
        rows = {
            label: {name: math.nan if score is None else score for name, score in row.items()}
            for label, row in data["rows"].items()
        }
        return cls(list(data["donors"]), rows, dict(data["truncated"]))

    def score(self, scorer: Scorer, recipes: Mapping[str, Recipe | None], names: Sequence[str], pool: Pool) -> None:
        """Add a row per recipe (None: the current model)."""
        unit = pool.architecture.model_unit(pool.tensors)
        candidates = [Candidate(label, recipe=recipe) for label, recipe in recipes.items()]
        scores = scorer.score(unit, candidates, list(names))
        for row, label in enumerate(recipes):
            self.rows[label] = {name: float(scores.mean(name)[row]) for name in names}
            rates = {name: float(scores.truncated[name][row].float().mean()) for name in names}
            self.truncated[label] = {name: rate for name, rate in rates.items() if rate}


def plain_average(base: str, donors: Sequence[str], pool: Pool) -> Recipe:
    """The recipe that averages every tensor of the donors with equal weights."""
    return Recipe(
        base,
        {
            name: merge("linear", [Copy(donor, name) for donor in donors])
            if pool[base].tensors[name].dtype.is_floating_point
            else Copy(base, name)
            for name in pool.tensors
        },
    )


def evaluate(
    model: str | Path,
    datasets: Mapping[str, Mapping[str, Any]] | Mapping[Path, Mapping[str, Any]],
    against: Sequence[str | Path] = (),
    *,
    models_dir: str | Path = "models",
    device: str = "auto",
    dtype: str = "auto",
) -> Scoreboard:
    """Score a model on datasets (file -> the keys of a config's dataset entry), with donors if any are given.

    Models are folders or Hub ids in `models_dir`; missing Hub models are downloaded. With donors, the board also has
    their plain average, and skill retained is on their scale. Raises InputError naming what is unusable.
    """
    here, name, donors = Path.cwd(), str(model), [str(donor) for donor in against]
    entries = parse_datasets({str(file): entry for file, entry in datasets.items()}, where="evaluate")
    settings = Settings.of(device, dtype)
    pool = Pool.open(list(dict.fromkeys([*donors, name])), here / models_dir, here)
    questions = Questions.load(pool[name], here, entries)
    rows: dict[str, Recipe | None] = {donor: whole(donor, pool.tensors) for donor in donors}
    if len(donors) > 1:
        rows[AVERAGE] = plain_average(donors[0], donors, pool)
    rows[name] = None
    board = Scoreboard(donors or [name])
    evaluation = Evaluation(whole(name, pool.tensors), pool, settings)
    board.score(evaluation.scorer(questions), rows, list(questions.datasets), pool)
    return board
