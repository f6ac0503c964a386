"""Models side by side: scores and accuracy of each on each dataset, and how much of the donors' skill each retains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from olmfast.config.datasets import parse_datasets
from olmfast.config.run import RunConfig
from olmfast.errors import InputError
from olmfast.evaluation.open import Evaluation, Questions, Settings
from olmfast.evaluation.scorer import Candidate, Scorer
from olmfast.evaluation.scores import Scores
from olmfast.runs.inputs import Inputs
from olmfast.search.ranking import skill_retained
from olmfast.search.spans import real_spans
from olmfast.weights.adapters import open_model
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.digests import DigestCache
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe

AVERAGE = "plain average"
START = "start"  # the recipe that a search began from
RESULT = "merged"
DECIMALS = 7  # of a sample's score, as in the ledger


@dataclass
class Scoreboard:
    """`rows` maps a model's label to its mean score per dataset; `donors` are the labels that set the scale.

    By label and dataset there are also `truncated`, the share of generations that were cut off, if any; `accuracy`,
    the share of answers that are fully right, where the mode knows a right one; and `samples`, the score of each
    question. A row that an older version wrote has no `accuracy` and no `samples`.
    """

    donors: list[str]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    truncated: dict[str, dict[str, float]] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def datasets(self) -> list[str]:
        """The datasets, in order."""
        return list(next(iter(self.rows.values()), {}))

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """Dataset -> the (best, worst) score of the donors that have one; NaN if none is better beyond noise.

        Noise is known where `samples` are: see `real_spans`.
        """
        found = {}
        for name in self.datasets:
            known = [score for donor in self.donors if math.isfinite(score := self.rows[donor][name])]
            found[name] = (min(known), max(known)) if known else (math.nan, math.nan)
        if all(donor in self.samples for donor in self.donors):
            scores = {name: self.scores_of(self.donors, name) for name in found}
            found |= {name: (math.nan, math.nan) for name, span in real_spans(scores).items() if span is None}
        return found

    def scores_of(self, labels: Sequence[str], dataset: str) -> torch.Tensor:
        """(labels, questions), float64: the score of each question, of labels whose `samples` are known."""
        return torch.tensor([self.samples[label][dataset] for label in labels], dtype=torch.float64)

    def skill(self, label: str) -> dict[str, float]:
        """Dataset -> skill retained of one model, of the datasets that tell the donors apart."""
        row, left_out = self.rows[label], self.without_span()
        spans = {name: span for name, span in self.spans.items() if name not in left_out}
        return {name: skill_retained({name: row[name]}, {name: span}) for name, span in spans.items()}

    def retained(self, label: str) -> float:
        """Mean skill retained of one model; NaN if no dataset tells the donors apart."""
        return skill_retained(self.rows[label], self.spans)

    def n_questions(self, dataset: str) -> int | None:
        """How many questions the scores are the means of; None where an older version wrote them all."""
        return next((len(by[dataset]) for by in self.samples.values()), None)

    def heading(self, dataset: str, shown: str | None = None) -> str:
        """A dataset as tables name it (or as `shown`), with its number of questions."""
        n = self.n_questions(dataset)
        return (shown or dataset) + (f" (n={n})" if n is not None else "")

    def cell(self, label: str, dataset: str) -> str:
        """A score as tables show it, with accuracy, and the share of generations that were cut off, if any."""
        right, cut = (part.get(label, {}).get(dataset) for part in (self.accuracy, self.truncated))
        told = [f"{right:.0%} right"] if right is not None else []
        told += [f"{cut:.0%} cut off"] if cut else []
        return f"{self.rows[label][dataset]:.4f}" + (f" ({', '.join(told)})" if told else "")

    def without_span(self) -> list[str]:
        """Datasets on which no donor is better than another beyond noise, left out of `retained`."""
        return [name for name, span in self.spans.items() if math.isnan(skill_retained({name: 0.0}, {name: span}))]

    @property
    def has_scale(self) -> bool:
        """Whether any dataset tells the donors apart."""
        return len(self.without_span()) < len(self.datasets)

    def remark(self) -> str:
        """What readers of `retained` have to know, in a line; empty if nothing."""
        left_out, told = self.without_span(), []
        if len(self.donors) > 1 and left_out and not self.has_scale:
            return "no skill retained: no donor is better than another beyond noise; more questions may tell them apart"
        if len(self.donors) > 1 and left_out:
            names = ", ".join(left_out)
            told.append(f"left out of skill retained, no donor being better than another beyond noise: {names}")
        shown = [round(self.retained(label), 3) for label in self.rows] if self.has_scale else []
        if any(value > 1 for value in shown):
            told.append("skill retained above 1: better, on average, than the best donor of each dataset")
        if any(value < 0 for value in shown):
            told.append("skill retained below 0: worse, on average, than the worst donor of each dataset")
        return "; ".join(told)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, readable back by `from_json`; `skill_retained` is only for readers."""
        retained = {label: self.retained(label) for label in self.rows} if self.rows else {}
        means = {"donors": self.donors, "rows": self.rows, "truncated": self.truncated, "skill_retained": retained}
        return means | {"accuracy": self.accuracy, "samples": self.samples}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scoreboard:
        """Read what `to_json` wrote, through strict JSON: NaN and infinite scores have become null there."""
        rows = {label: dict(zip(row, _numbers(row.values()), strict=True)) for label, row in data["rows"].items()}
        samples = {
            label: {name: _numbers(scores) for name, scores in by.items()}
            for label, by in data.get("samples", {}).items()
        }
        return cls(list(data["donors"]), rows, dict(data["truncated"]), dict(data.get("accuracy", {})), samples)

    def score(self, scorer: Scorer, recipes: Mapping[str, Recipe | None], names: Sequence[str], pool: Pool) -> None:
        """Add a row per recipe (None: the current model)."""
        unit = pool.architecture.model_unit(pool.tensors)
        candidates = [Candidate(label, recipe=recipe) for label, recipe in recipes.items()]
        self.enter(list(recipes), scorer.score(unit, candidates, list(names)))

    def enter(self, labels: Sequence[str], scores: Scores) -> None:
        """Add a row per candidate of `scores`, all evaluated in full, or put it in place of the label's old one."""
        accuracy = {name: found for name in scores.samples if (found := scores.accuracy(name)) is not None}
        for row, label in enumerate(labels):
            self.rows[label] = {name: float(scores.mean(name)[row]) for name in scores.samples}
            rates = {name: float(scores.truncated[name][row].float().mean()) for name in scores.samples}
            self.truncated[label] = {name: rate for name, rate in rates.items() if rate}
            self.accuracy[label] = {name: float(shares[row]) for name, shares in accuracy.items()}
            self.samples[label] = {
                name: [round(score, DECIMALS) for score in values[row].tolist()]
                for name, values in scores.samples.items()
            }


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
    note: Callable[[str], None] = lambda _: None,
) -> Scoreboard:
    """Score a model on datasets (file -> the keys of a config's dataset entry), with donors if any are given.

    Models are folders or Hub ids in `models_dir`; missing Hub models are downloaded. With donors, the board also has
    their plain average, and skill retained is on their scale. `note` is told which samples are left out. Raises
    InputError naming what is unusable.
    """
    here, name, donors = Path.cwd(), str(model), [str(donor) for donor in against]
    entries = parse_datasets({str(file): entry for file, entry in datasets.items()}, where="evaluate")
    settings = Settings.of(device, dtype)
    pool = Pool.open(list(dict.fromkeys([*donors, name])), here / models_dir, here)
    _check_models(pool)
    questions = Questions.load(pool[name], here, entries)
    for text in questions.notes:
        note(text)
    return _scored(name, donors, pool, [questions], settings)[0]


def evaluate_like(
    config: RunConfig,
    model: str | Path,
    against: Sequence[str | Path] = (),
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Scoreboard]:
    """Score a model as a run of the config scores: `selection` and, if there are any, `holdout` -> a scoreboard.

    Datasets, samples, templates, device and dtype are the config's, and so is the tokenizer, its base's; a model that
    is none of its pool's kind has its own. `note` is told of that, and which samples are left out. A joint search's
    selection questions are those that it did not set aside. Raises InputError naming what is unusable.
    """
    name, donors = str(model), [str(donor) for donor in against]
    limits = {key: getattr(config, key) for key in ("batch_tokens", "max_ram", "max_vram", "scorer")}
    settings = Settings.of(config.device, config.dtype, **limits)
    names = list(dict.fromkeys([*donors, name]))
    digests, opened = DigestCache(), dict[str, Checkpoint]()
    found = [open_model(one, config.models_dir, Path.cwd(), digests, opened) for one in names]
    asks, pool = name, None
    try:
        base = config.base_name
        if base not in names:
            pool, asks = Pool([open_model(base, config.models_dir, config.config_dir, digests, opened), *found]), base
        else:
            asks = base
    except InputError as error:
        note(f"{name} is asked with its own tokenizer: {error}")
    pool = pool or Pool(found)
    _check_models(pool)
    questions = Questions.load(pool[asks], config.dataset_dir, config.questions)
    for text in questions.notes:
        note(text)
    inputs = Inputs(config, pool, questions, settings, ())
    parts = {"selection": inputs.selection, "holdout": inputs.holdout}
    parts = {part: asked for part, asked in parts.items() if asked.datasets}
    return dict(zip(parts, _scored(name, donors, pool, [*parts.values()], settings), strict=True))


def _scored(
    name: str, donors: Sequence[str], pool: Pool, asked: Sequence[Questions], settings: Settings
) -> list[Scoreboard]:
    """A scoreboard for each lot of questions: the donors, their plain average, and the model."""
    rows: dict[str, Recipe | None] = {donor: whole(donor, pool.tensors) for donor in donors}
    if len(donors) > 1:
        rows[AVERAGE] = plain_average(donors[0], donors, pool)
    rows[name] = None
    pool.check_finite()
    evaluation, boards = Evaluation(whole(name, pool.tensors), pool, settings), []
    for questions in asked:
        boards.append(Scoreboard(list(donors) or [name]))
        boards[-1].score(evaluation.scorer(questions), rows, list(questions.datasets), pool)
        _check_scores(boards[-1], settings)
    return boards


def _check_scores(board: Scoreboard, settings: Settings) -> None:
    for label, row in board.rows.items():
        for dataset, score in row.items():
            if math.isnan(score):
                raise InputError(f"{label}: its score on {dataset} is no number: it overflows in {settings.dtype}")


def _check_models(pool: Pool) -> None:
    if pool.blocks_only:
        raise InputError(f"{pool.blocks_only[0]}: is stored for another task and cannot be scored as a language model")


def _numbers(values: Iterable[float | None]) -> list[float]:
    """Numbers as strict JSON keeps them: null stands for NaN."""
    return [math.nan if value is None else value for value in values]
