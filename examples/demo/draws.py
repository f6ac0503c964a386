"""Hold several runs of the same models, each on another draw of the questions, against the best static merges.

    python examples/demo/draws.py CONFIG...

Each run decides by its own questions, and so does each grid of static merges (those of compare.py): what scores best on
a draw's selection questions is scored, beside the run's result, on that draw's held-out ones. A question that several
draws have is put to a merge once.

Intervals are of the runs' mean skill retained minus a rival's: 95 %, by a paired Bayesian bootstrap (Rubin, Annals of
Statistics 9, 1981) that gives each question a random weight, the same for all models and draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from compare import GRIDS, RESAMPLES, SEED, Recipes, ancestor_of, merged, skill, skill_retained, telling
from rich.console import Console
from rich.table import Table

from olmfast import load_config
from olmfast.evaluation.encoding import Dataset, Sample
from olmfast.evaluation.open import Evaluation, Questions
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.observer import Observer
from olmfast.runs.inputs import Inputs
from olmfast.runs.scoreboard import AVERAGE, RESULT
from olmfast.search.record import Record
from olmfast.weights.expressions import whole
from olmfast.weights.recipe import Recipe

Places = Mapping[str, Sequence[tuple[str, int]]]
"""Dataset -> for each of its questions the dataset of `Asked` that it is in, and its number there."""


@dataclass(frozen=True)
class Draw:
    """A run, and where its questions are."""

    inputs: Inputs
    record: Record
    selection: Places
    holdout: Places

    @property
    def result(self) -> Recipe:
        """What the run has made."""
        found = self.record.validated or self.record.recipe
        assert found is not None
        return found


class Asked:
    """The questions of all draws, those that are scored alike in one dataset, and what models have answered."""

    def __init__(self) -> None:
        self.datasets: dict[str, Dataset] = {}
        self._known: dict[str, dict[Sample, int]] = {}
        self._scores: dict[str, Scores] = {}

    def place(self, questions: Questions) -> Places:
        """Where these questions are; new ones are added."""
        places = {}
        for name, dataset in questions.datasets.items():
            kind = dataset.config.model_dump_json()
            known = self._known.setdefault(kind, {})
            for sample in dataset.samples:
                known.setdefault(sample, len(known))
            places[name] = [(kind, known[sample]) for sample in dataset.samples]
            self.datasets[kind] = replace(dataset, name=kind, samples=tuple(known))
        return places

    def score(self, evaluation: Evaluation, questions: Questions, recipes: Recipes, places: Sequence[Places]) -> None:
        """Have models answer the questions at these places that they have not answered yet."""
        scorer = evaluation.scorer(replace(questions, datasets=self.datasets))
        pool = evaluation.sources.pool
        unit = pool.architecture.model_unit(pool.tensors)
        wanted = {kind: set[int]() for kind in self.datasets}
        for kind, index in (place for one in places for own in one.values() for place in own):
            wanted[kind].add(index)
        for label, recipe in recipes.items():
            known = self._scores.get(label)
            samples = {
                kind: sorted(i for i in own if known is None or not known.evaluated[kind][0, i])
                for kind, own in wanted.items()
            }
            samples = {kind: own for kind, own in samples.items() if own}
            if samples:
                found = scorer.score(unit, [Candidate(label, recipe=recipe)], list(samples), samples)
                whole_row = Scores.empty(1, self.datasets, torch.float64)
                for kind, own in found.samples.items():
                    whole_row.samples[kind], whole_row.evaluated[kind] = own.double(), found.evaluated[kind]
                self._scores[label] = whole_row if known is None else known.filled_by(whole_row)

    def of(self, labels: Sequence[str], places: Places) -> Scores:
        """What models have answered, as the scores of a draw's datasets."""
        found = Scores({}, {}, {})
        for name, own in places.items():
            for part, source in ((found.samples, "samples"), (found.evaluated, "evaluated")):
                rows = [getattr(self._scores[label], source) for label in labels]
                part[name] = torch.stack([torch.stack([row[kind][0, index] for kind, index in own]) for row in rows])
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """Random weights of the questions, (resamples, questions) float64 for each dataset."""
        generator = torch.Generator().manual_seed(SEED)
        shapes = {kind: (RESAMPLES, len(dataset.samples)) for kind, dataset in self.datasets.items()}
        return {
            kind: torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
            for kind, shape in shapes.items()
        }


def drawn_skill(scores: Scores, places: Places, weights: Mapping[str, torch.Tensor], n_donors: int) -> torch.Tensor:
    """(resamples, models): skill retained where questions count by their weights."""
    means = {}
    for name, samples in telling(scores, n_donors).samples.items():
        own = torch.stack([weights[kind][:, index] for kind, index in places[name]], dim=1)
        means[name] = (own / own.sum(dim=1, keepdim=True)) @ samples.T
    return skill_retained(means, n_donors)


def main() -> None:
    """Search the grids for each draw, then print a table of all draws."""
    parser = argparse.ArgumentParser(description="Hold runs on several draws of questions against static merges.")
    parser.add_argument("configs", nargs="+", type=Path, help="of the runs, all of the same models")
    parser.add_argument("--merges", type=int, help="in each grid; default: as many as the runs have spent evaluations")
    arguments = parser.parse_args()
    asked, draws = Asked(), list[Draw]()
    for path in arguments.configs:
        config = load_config(path)
        inputs = Inputs.open(config, Observer())
        places = asked.place(inputs.selection), asked.place(inputs.holdout)
        draws.append(Draw(inputs, Record.load(config.output_dir), *places))
    first = draws[0].inputs
    donors = {name: whole(name, first.pool.tensors) for name in first.pool.names}
    for path, draw in zip(arguments.configs, draws, strict=True):
        if list(draw.inputs.pool.names) != list(donors):
            raise SystemExit(f"{path}: models: expected those of {arguments.configs[0]}, {', '.join(donors)}")
    evaluation = Evaluation(donors[first.config.base_name], first.pool, first.settings, draws[0].record.folder)
    count = arguments.merges or max(int(draw.record.evaluations) for draw in draws)

    def ask(recipes: Recipes, places: Sequence[Places]) -> None:
        asked.score(evaluation, first.selection, recipes, places)

    average = {AVERAGE: merged("linear", list(donors.values()))}
    selections, holdouts = [draw.selection for draw in draws], [draw.holdout for draw in draws]
    ask({**donors, **average}, [*selections, *holdouts])
    rows: dict[str, list[str]] = {label: [label] * len(draws) for label in (*donors, AVERAGE)}
    ancestor = ancestor_of(draws[0].record, donors)
    for method, grid in GRIDS.items():
        recipes = {f"{method}: {label}": recipe for label, recipe in grid(donors, count, ancestor).items()}
        ask(recipes, selections)
        row = f"best of {len(recipes)} {method}"
        rows[row] = []
        for number, draw in enumerate(draws):
            found = skill(asked.of([*donors, *recipes], draw.selection), len(donors))[len(donors) :]
            rows[row].append(list(recipes)[int(found.argmax())])
            print(f"draw {number}: {rows[row][-1]}, {float(found.max()):.3f} on the selection questions", flush=True)
            ask({rows[row][-1]: recipes[rows[row][-1]]}, [draw.holdout])
    rows[RESULT] = [f"{RESULT} {number}" for number in range(len(draws))]
    for label, draw in zip(rows[RESULT], draws, strict=True):
        ask({label: draw.result}, [draw.holdout])
    show(asked, draws, rows, len(donors))


def show(asked: Asked, draws: Sequence[Draw], rows: Mapping[str, Sequence[str]], n_donors: int) -> None:
    """Print the skill retained of each row's model in each draw, and by how much the runs lead in the mean."""
    weights = asked.weights()
    skills, drawn = [], []
    for number, draw in enumerate(draws):
        scores = asked.of([labels[number] for labels in rows.values()], draw.holdout)
        skills.append(skill(scores, n_donors))
        drawn.append(drawn_skill(scores, draw.holdout, weights, n_donors))
    mean, lead = torch.stack(skills).mean(dim=0), torch.stack(drawn).mean(dim=0)
    low, high = (lead[:, -1:] - lead).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    heads = [f"draw {number}" for number in range(len(draws))]
    title = "Skill retained on held-out questions"
    table = Table("model", *heads, "mean", "runs minus this one, 95 %", title=title, title_justify="left")
    for row, label in enumerate(rows):
        cells = [f"{own[row]:.3f}" for own in skills]
        told = f"{mean[-1] - mean[row]:+.3f} [{low[row]:+.3f}, {high[row]:+.3f}]" if label != RESULT else ""
        table.add_row(label, *cells, f"{mean[row]:.3f}", told)
    expected = [draw.record.values.get("expected") for draw in draws]
    known = [value for value in expected if value is not None]
    cells = ["" if value is None else f"{value:.3f}" for value in expected]
    table.add_row("expected by the run", *cells, f"{sum(known) / len(known):.3f}" if known else "", "")
    Console(width=160, markup=False).print(table)


if __name__ == "__main__":
    main()
