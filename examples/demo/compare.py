"""Hold the demo's result against the best static merges that as many evaluations find.

    python examples/demo/compare.py

Needs the demo's result (`make demo`). Linear, slerp and TIES merges of the same donors are scored on the questions
that the run was decided by: a grid of each method, of as many merges as the run evaluated candidates. The best of
each grid is scored, beside the run's result, on questions by which nothing was chosen: the held-out ones, and fresh
ones of three seeds. The best is always the one with the most skill retained, as in the run (`selection: mean`).

Intervals are of the run's skill retained minus a rival's: 95 %, by a paired bootstrap that draws the questions of
each dataset anew 10,000 times, for all models alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from math import comb
from pathlib import Path
from typing import Any

import torch
from fresh import SEEDS, fresh_datasets
from rich.console import Console
from rich.table import Table

from olmfast.config.run import load_config
from olmfast.evaluation.encoding import Dataset, load_datasets
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.observer import Observer
from olmfast.runs.inputs import Inputs
from olmfast.runs.scoreboard import AVERAGE, RESULT, plain_average
from olmfast.runs.session import SCORERS
from olmfast.search.record import Record
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression, Sources

DEMO = Path(__file__).parent
RESAMPLES, SEED = 10_000, 0
LAMBDAS = (0.5, 0.75, 1.0, 1.25, 1.5)


class Grid:
    """Static merges of whole models, every tensor alike: label -> recipe."""

    def __init__(self, donors: list[str], tensors: list[str]) -> None:
        self.donors, self.tensors = donors, tensors

    def linear(self, count: int) -> dict[str, Recipe]:
        """Weights on the finest lattice of the donors' simplex that has at most `count` points."""
        n, steps = len(self.donors), 1
        while comb(steps + n, n - 1) <= count:
            steps += 1
        found = {}
        for parts in product(range(steps + 1), repeat=n):
            if sum(parts) == steps:
                label = ", ".join(f"{part / steps:.2f} {d}" for part, d in zip(parts, self.donors, strict=True) if part)
                found[label] = self._recipe("linear", self.donors, weight=tuple(part / steps for part in parts))
        return found

    def slerp(self, count: int) -> dict[str, Recipe]:
        """Pairs, and pairs of pairs, at the finest even spacing of t that has at most `count` merges."""
        pairs = list(combinations(self.donors, 2))
        splits = [(one, other) for one, other in combinations(pairs, 2) if not set(one) & set(other)]
        n = 1
        while len(pairs) * (n + 1) + len(splits) * (n + 1) ** 3 <= count:
            n += 1
        points = [(i + 1) / (n + 1) for i in range(n)]
        arcs = {(pair, t): self._recipe("slerp", pair, t=t) for pair, t in product(pairs, points)}
        found = {f"{pair[0]} {t:.2f} {pair[1]}": arc for (pair, t), arc in arcs.items()}
        for (one, other), t, u, v in product(splits, points, points, points):
            label = f"({one[0]} {t:.2f} {one[1]}) {v:.2f} ({other[0]} {u:.2f} {other[1]})"
            found[label] = self._recipe("slerp", [arcs[one, t], arcs[other, u]], t=v)
        return found

    def ties(self, count: int) -> dict[str, Recipe]:
        """Each donor and the average as the base; lambdas, densities, and weights: alike, or one of them double."""
        bases: list[str | Recipe] = [*self.donors, self._recipe("linear", self.donors)]
        terms = [[donor for donor in self.donors if donor != base] for base in bases]
        n_densities = max(1, count // (len(LAMBDAS) * sum(len(others) + 1 for others in terms)))
        found = {}
        for base, others in zip(bases, terms, strict=True):
            for scale, i, double in product(LAMBDAS, range(n_densities), [None, *others]):
                density, name = (i + 1) / n_densities, base if isinstance(base, str) else "average"
                label = f"base {name}, lambda {scale:g}, density {density:.2f}" + (
                    f", {double} twice" if double else ""
                )
                weights = tuple(2.0 if donor == double else 1.0 for donor in others)
                settings = {"density": density, "lambda": scale, "weight": weights}
                found[label] = self._recipe("ties", others, base, **settings)
        return found

    def _recipe(
        self, method: str, terms: Sequence[str | Recipe], base: str | Recipe | None = None, **settings: Any
    ) -> Recipe:
        def source(model: str | Recipe, name: str) -> Expression:
            return Copy(model, name) if isinstance(model, str) else model.tensors[name]

        return Recipe(
            self.donors[0],
            {
                name: merge(method, [source(t, name) for t in terms], base and source(base, name), **settings)
                for name in self.tensors
            },
        )


def skill_retained(means: Mapping[str, torch.Tensor], n_donors: int) -> torch.Tensor:
    """Means per dataset, (..., models) with the donors first -> (..., models)."""
    shares = []
    for mean in means.values():
        best, worst = mean[..., :n_donors].amin(-1, keepdim=True), mean[..., :n_donors].amax(-1, keepdim=True)
        shares.append((worst - mean) / (worst - best))
    return torch.stack(shares).mean(0)


def intervals(scores: Scores, n_donors: int) -> torch.Tensor:
    """(2, models): the 2.5 and 97.5 % quantiles of the last model's skill retained minus each one's."""
    generator = torch.Generator().manual_seed(SEED)
    means = {}
    for name, samples in scores.samples.items():
        n = samples.shape[1]
        drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
        counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        means[name] = counts @ samples.double().T / n
    skill = skill_retained(means, n_donors)
    return (skill[:, -1:] - skill).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)


class Judge:
    """Scores recipes on datasets, one set of questions after another."""

    def __init__(self, inputs: Inputs, folder: Path) -> None:
        self.inputs, pool = inputs, inputs.pool
        self.donors = {name: whole(name, pool.tensors) for name in pool.names}
        self.model = WorkingModel(next(iter(self.donors.values())), Sources(pool, folder), inputs.device, inputs.dtype)

    def score(self, recipes: Mapping[str, Recipe], datasets: Mapping[str, Dataset]) -> Scores:
        """The donors' scores, then those of the recipes."""
        inputs, config = self.inputs, self.inputs.config
        scorer = SCORERS[config.scorer](self.model, datasets, inputs.tokenizer, inputs.stop_tokens, config.batch_tokens)
        unit = inputs.pool.architecture.model_unit(inputs.pool.tensors)
        every = {**self.donors, **recipes}
        return scorer.score(
            unit, [Candidate(label, {n: recipe.tensors[n] for n in unit.tensors}) for label, recipe in every.items()]
        )

    def skill(self, scores: Scores) -> torch.Tensor:
        """(models,): skill retained on the scores' datasets."""
        return skill_retained({name: scores.mean(name).double() for name in scores.samples}, len(self.donors))


def show(judge: Judge, title: str, recipes: Mapping[str, Recipe], datasets: Mapping[str, Dataset]) -> None:
    """Print the models' scores on the datasets, their skill retained, and the run's lead with its interval."""
    scores = judge.score(recipes, datasets)
    skill, (low, high) = judge.skill(scores), intervals(scores, len(judge.donors))
    columns = [Path(name).stem.removesuffix("_holdout") for name in datasets]
    table = Table("model", *columns, "skill retained", "run minus this one, 95 %", title=title, title_justify="left")
    labels = [*judge.donors, *recipes]
    for row, label in enumerate(labels):
        lead = f"{skill[-1] - skill[row]:+.3f} [{low[row]:+.3f}, {high[row]:+.3f}]"
        lead += " holds zero" if low[row] <= 0 <= high[row] else ""
        cells = [f"{scores.mean(name)[row]:.4f}" for name in datasets]
        table.add_row(label, *cells, f"{skill[row]:.3f}", lead if row < len(labels) - 1 else "")
    Console(width=160, markup=False).print(table)


def main() -> None:
    """Search the grids, then print a table on the held-out questions and one on all fresh ones."""
    parser = argparse.ArgumentParser(description="Hold the demo's result against the best static merges.")
    parser.add_argument("--evaluations", type=int, help="merges in each grid; default: what the run has spent")
    arguments = parser.parse_args()
    config = load_config(DEMO / "olm_config.yaml")
    report = Record.load(config.output_dir)
    count = arguments.evaluations or report.evaluations
    inputs = Inputs.open(config, Observer())
    judge, pool = Judge(inputs, config.output_dir), inputs.pool
    grid = Grid(pool.names, list(pool.tensors))

    finalists = {AVERAGE: plain_average(pool.names[0], pool.names, pool)}
    for method, merges in (("linear", grid.linear), ("slerp", grid.slerp), ("TIES", grid.ties)):
        started = time.monotonic()
        recipes = merges(count)
        skill = judge.skill(judge.score(recipes, inputs.datasets))[len(pool) :]
        best = int(skill.argmax())
        label = list(recipes)[best]
        finalists[f"best {method}"] = recipes[label]
        seconds = time.monotonic() - started
        print(
            f"{method}: best of {len(recipes)} on the selection questions {skill[best]:.3f}: {label} ({seconds:.0f} s)"
        )
    assert report.recipe is not None
    finalists[RESULT] = report.recipe

    show(judge, "Held-out questions", finalists, inputs.holdout)
    fresh: dict[str, Dataset] = {}
    for seed in SEEDS:
        found = load_datasets(
            config.dataset_dir, fresh_datasets(config, seed), inputs.tokenizer, pool.architecture.context
        )
        for name, dataset in found.items():
            short = Path(name).stem
            known = fresh[short].samples if short in fresh else []
            fresh[short] = replace(dataset, samples=[*known, *dataset.samples])
    show(judge, f"Fresh questions, seeds {', '.join(map(str, SEEDS))}", finalists, fresh)


if __name__ == "__main__":
    main()
