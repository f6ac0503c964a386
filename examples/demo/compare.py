"""Hold the demo's result against the best static merges that as many evaluations find.

    python examples/demo/compare.py

Needs the demo's result (`make demo`), or with `--config` that of another run (`--count 0`: of any, without fresh
questions). Linear, slerp, task-arithmetic, TIES and DARE-TIES merges of the same donors are scored on the questions
that the run was decided by: a grid of each method, of as many merges as the run evaluated candidates. The best of
each grid is scored, beside the run's result, on questions by which nothing was chosen: the held-out ones, and fresh
ones of three seeds. The best is always the one with the most skill retained, as in the run (`selection: mean`).

Intervals are of the run's skill retained minus a rival's: 95 %, by a paired bootstrap that draws the questions of
each dataset anew 10,000 times, for all models alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from math import comb
from pathlib import Path
from typing import Any

import torch
from fresh import CONFIG, COUNT, SEEDS, fresh_datasets
from rich.console import Console
from rich.table import Table

from olmfast import load_config
from olmfast.evaluation.encoding import Dataset
from olmfast.evaluation.open import Evaluation, Questions
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.observer import Observer
from olmfast.runs.inputs import Inputs
from olmfast.runs.scoreboard import AVERAGE, RESULT
from olmfast.search.record import Record
from olmfast.search.spans import real_spans
from olmfast.weights.expressions import merge, whole
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression

RESAMPLES, SEED = 10_000, 0
LAMBDAS = (0.5, 0.75, 1.0, 1.25, 1.5)
DENSITY = 0.5  # where a grid has only one

Recipes = Mapping[str, Recipe]
"""Label -> recipe."""


def merged(method: str, terms: Sequence[Recipe], base: Recipe | None = None, **settings: Any) -> Recipe:
    """A static merge of whole models, every tensor alike."""

    def tensor(name: str) -> Expression:
        drawn: dict[str, Any] = {"seed": SEED, "stream": name} if method == "dare_ties" else {}
        values = [one.tensors[name] for one in terms]
        return merge(method, values, base.tensors[name] if base else None, **settings, **drawn)

    return Recipe(terms[0].base, {name: tensor(name) for name in terms[0].tensors})


def linear(donors: Recipes, count: int, ancestor: str | None = None) -> Recipes:  # noqa: ARG001
    """Weights on the finest lattice of the donors' simplex that has at most `count` points."""
    n, steps = len(donors), 1
    while comb(steps + n, n - 1) <= count:
        steps += 1
    found = {}
    for parts in product(range(steps + 1), repeat=n):
        if sum(parts) == steps:
            label = ", ".join(f"{part / steps:.2f} {donor}" for part, donor in zip(parts, donors, strict=True) if part)
            found[label] = merged("linear", list(donors.values()), weight=tuple(part / steps for part in parts))
    return found


def slerp(donors: Recipes, count: int, ancestor: str | None = None) -> Recipes:  # noqa: ARG001
    """Pairs, and pairs of pairs, at the finest even spacing of t that has at most `count` merges."""
    pairs = list(combinations(donors, 2))
    splits = [(one, other) for one, other in combinations(pairs, 2) if not set(one) & set(other)]
    n = 1
    while len(pairs) * (n + 1) + len(splits) * (n + 1) ** 3 <= count:
        n += 1
    points = [(i + 1) / (n + 1) for i in range(n)]
    arcs = {(pair, t): merged("slerp", [donors[one] for one in pair], t=t) for pair, t in product(pairs, points)}
    found = {f"{pair[0]} {t:.2f} {pair[1]}": arc for (pair, t), arc in arcs.items()}
    for (one, other), t, u, v in product(splits, points, points, points):
        label = f"({one[0]} {t:.2f} {one[1]}) {v:.2f} ({other[0]} {u:.2f} {other[1]})"
        found[label] = merged("slerp", [arcs[one, t], arcs[other, u]], t=v)
    return found


def from_a_base(method: str, donors: Recipes, count: int, ancestor: str | None = None) -> Recipes:
    """The donors' ancestor as the base, or where none is known each donor and the average; lambdas, densities, and
    weights: alike, or one of them double."""
    bases = {**donors, "average": merged("linear", list(donors.values()))}
    if ancestor is not None:
        bases = {ancestor: donors[ancestor]}
    terms = {base: [donor for donor in donors if donor != base] for base in bases}
    n_weights = sum(len(others) + 1 for others in terms.values())
    lambdas = LAMBDAS[: max(1, count // n_weights)]
    n_densities = max(1, count // (len(lambdas) * n_weights)) if method != "task_arithmetic" else 1
    found = {}
    for base, others in terms.items():
        for scale, i, double in product(lambdas, range(n_densities), [None, *others]):
            settings = {"lambda": scale, "weight": tuple(2.0 if donor == double else 1.0 for donor in others)}
            if method != "task_arithmetic":
                settings["density"] = (i + 1) / n_densities if n_densities > 1 else DENSITY
            told = ", ".join(f"{name} {value:.3g}" for name, value in settings.items() if name != "weight")
            label = f"base {base}, {told}" + (f", {double} twice" if double else "")
            found[label] = merged(method, [donors[donor] for donor in others], bases[base], **settings)
    return found


GRIDS: Mapping[str, Callable[[Recipes, int, str | None], Recipes]] = {
    "linear": linear,
    "slerp": slerp,
    "task arithmetic": partial(from_a_base, "task_arithmetic"),
    "TIES": partial(from_a_base, "ties"),
    "DARE-TIES": partial(from_a_base, "dare_ties"),
}


def ancestor_of(record: Record, donors: Recipes) -> str | None:
    """The donor that the others were made from, as the run found it."""
    name = record.values.get("anchor", {}).get("model")
    return name if name in donors else None


def score(evaluation: Evaluation, recipes: Recipes, questions: Questions) -> Scores:
    """Of each recipe, in order."""
    pool = evaluation.sources.pool
    unit = pool.architecture.model_unit(pool.tensors)
    return evaluation.scorer(questions).score(unit, [Candidate(label, recipe=one) for label, one in recipes.items()])


def skill_retained(means: Mapping[str, torch.Tensor], n_donors: int) -> torch.Tensor:
    """Means per dataset, (..., models) with the donors first -> (..., models)."""
    shares = []
    for mean in means.values():
        best, worst = mean[..., :n_donors].amin(-1, keepdim=True), mean[..., :n_donors].amax(-1, keepdim=True)
        shares.append((worst - mean) / (worst - best))
    return torch.stack(shares).mean(0)


def telling(scores: Scores, n_donors: int) -> Scores:
    """The scores on datasets that tell the donors apart; all where none does."""
    spans = real_spans({name: samples[:n_donors] for name, samples in scores.samples.items()})
    return scores.only([name for name, span in spans.items() if span is not None] or list(spans))


def skill(scores: Scores, n_donors: int) -> torch.Tensor:
    """(models,): skill retained on the datasets that tell the donors apart."""
    scores = telling(scores, n_donors)
    return skill_retained({name: scores.mean(name).double() for name in scores.samples}, n_donors)


def intervals(scores: Scores, n_donors: int) -> torch.Tensor:
    """(2, models): the 2.5 and 97.5 % quantiles of the last model's skill retained minus each one's."""
    generator = torch.Generator().manual_seed(SEED)
    means = {}
    for name, samples in telling(scores, n_donors).samples.items():
        n = samples.shape[1]
        drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
        counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        means[name] = counts @ samples.double().T / n
    drawn_skill = skill_retained(means, n_donors)
    lead = drawn_skill[:, -1:] - drawn_skill
    return lead.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)


def show(title: str, scores: Scores, labels: Sequence[str], n_donors: int) -> None:
    """Print the models' scores, their skill retained, and the last one's lead with its interval."""
    retained, (low, high) = skill(scores, n_donors), intervals(scores, n_donors)
    columns = [Path(name).stem.removesuffix("_holdout") for name in scores.samples]
    table = Table("model", *columns, "skill retained", "run minus this one, 95 %", title=title, title_justify="left")
    for row, label in enumerate(labels):
        lead = f"{retained[-1] - retained[row]:+.3f} [{low[row]:+.3f}, {high[row]:+.3f}]"
        lead += " holds zero" if low[row] <= 0 <= high[row] else ""
        cells = [f"{scores.mean(name)[row]:.4f}" for name in scores.samples]
        table.add_row(label, *cells, f"{retained[row]:.3f}", lead if row < len(labels) - 1 else "")
    Console(width=160, markup=False).print(table)


def fresh_questions(inputs: Inputs, count: int) -> Questions:
    """The held-out datasets' fresh questions, those of all seeds together."""
    config, known = inputs.config, Questions(None, (), {})
    for seed in SEEDS:
        entries = fresh_datasets(config, seed, count)
        new = Questions.load(inputs.pool[config.base_name], config.dataset_dir, entries)
        joined: dict[str, Dataset] = {}
        for name, dataset in new.datasets.items():
            short = Path(name).stem
            before = known.datasets[short].samples if short in known.datasets else ()
            joined[short] = replace(dataset, samples=(*before, *dataset.samples))
        known = replace(new, datasets=joined)
    return known


def main() -> None:
    """Search the grids, then print a table on the held-out questions and one on all fresh ones."""
    parser = argparse.ArgumentParser(description="Hold the demo's result against the best static merges.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the run; default: the demo's")
    parser.add_argument("--evaluations", type=int, help="merges in each grid; default: what the run has spent")
    parser.add_argument("--count", type=int, default=COUNT, help="fresh questions per skill and seed; 0: none")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    record = Record.load(config.output_dir)
    assert record.recipe is not None
    inputs = Inputs.open(config, Observer())
    donors = {name: whole(name, inputs.pool.tensors) for name in inputs.pool.names}
    evaluation = Evaluation(donors[config.base_name], inputs.pool, inputs.settings, config.output_dir)

    finalists = {**donors, AVERAGE: merged("linear", list(donors.values()))}
    for method, grid in GRIDS.items():
        started = time.monotonic()
        count = arguments.evaluations or int(record.evaluations)
        recipes = grid(donors, count, ancestor_of(record, donors))
        found = skill(score(evaluation, {**donors, **recipes}, inputs.selection), len(donors))[len(donors) :]
        label = list(recipes)[int(found.argmax())]
        finalists[f"best {method}"] = recipes[label]
        best, seconds = float(found.max()), time.monotonic() - started
        told = f"{method}: best of {len(recipes)} on the selection questions {best:.3f}: {label} ({seconds:.0f} s)"
        print(told, flush=True)
    finalists[RESULT] = record.validated or record.recipe

    asked = {"Held-out questions": inputs.holdout}
    if arguments.count:
        seeds = ", ".join(map(str, SEEDS))
        asked[f"Fresh questions, seeds {seeds}"] = fresh_questions(inputs, arguments.count)
    for title, questions in asked.items():
        show(title, score(evaluation, finalists, questions), list(finalists), len(donors))


if __name__ == "__main__":
    main()
