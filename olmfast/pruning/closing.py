"""What pruned models keep and what they cost, beside what a search went by: the rest of its closing table.

Answers that are generated, the perplexities of answers and of the questions' own texts, parameters, and tokens per
second. A perplexity is exp of the mean over datasets of the mean cross-entropy, in which each question counts alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from olmfast.config.datasets import DatasetConfig
from olmfast.config.run import RunConfig
from olmfast.evaluation.encoding import Dataset
from olmfast.evaluation.metrics import CHOICES, GENERATIVE
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.open import Evaluation, Questions
from olmfast.evaluation.scorer import Candidate
from olmfast.runs.scoreboard import Scoreboard
from olmfast.runs.verdict import NORMAL
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.recipe import Recipe

GENERATED, ANSWERS, TEXTS = "generated", "answers", "questions"
MODES = {GENERATED: "exact_match", ANSWERS: "exact", TEXTS: "exact"}
TIMED, LENGTH, TIMES = 8, 64, 4  # texts of so many tokens, passed through as often: the fastest pass counts
HEAD = ("model", "score", "lower than it by", "generated right", "perplexity of answers", "of questions")


@dataclass(frozen=True)
class Closing:
    """`board` has models' scores, `kept` the rest, of `PART: DATASET`; both are of questions that chose nothing where
    there are any (`held_out`). A model's score is the mean over datasets by `weights`. `parameters` and `tokens_per_s`
    are by model: passes, not generation.
    """

    held_out: bool
    board: Scoreboard
    weights: Mapping[str, float]
    kept: Scoreboard
    parameters: Mapping[str, int]
    tokens_per_s: Mapping[str, float]

    @classmethod
    def score(
        cls, board: Scoreboard, asked: Asked, evaluation: Evaluation, rows: Mapping[str, Recipe | None]
    ) -> Closing:
        """Score models beside what `board` has of them; `rows` are their recipes."""
        kept, names = Scoreboard(list(board.donors)), list(asked.questions.datasets)
        if names:
            kept.score(evaluation.scorer(asked.questions), rows, names, evaluation.sources.pool)
        return cls(asked.held_out, board, asked.weights, kept, *_costs(evaluation.model, rows))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the board, which is told where it belongs."""
        costs = {"parameters": dict(self.parameters), "tokens_per_s": dict(self.tokens_per_s)}
        return {"held_out": self.held_out, "weights": dict(self.weights), "kept": self.kept.to_json(), **costs}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], board: Scoreboard) -> Closing:
        """Read what `to_json` wrote."""
        kept = Scoreboard.from_json(data["kept"])
        return cls(data["held_out"], board, data["weights"], kept, data["parameters"], data["tokens_per_s"])

    def perplexity(self, part: str, label: str) -> float:
        """That of a model on answers or questions; NaN where there are none, infinite where it is."""
        losses = [self.kept.rows[label][name] for name in self._of(part)]
        mean = math.fsum(losses) / len(losses) if losses else math.nan
        return math.exp(mean) if not mean > 700 else math.inf

    def gain(self, label: str, other: str) -> tuple[float, float]:
        """By how much `label` scores lower than `other`, a mean over datasets, and half of its paired 95 % interval."""
        pairs = {name: self.board.scores_of([label, other], name) for name in self.board.datasets}
        return self._within({name: scores - own for name, (own, scores) in pairs.items()})

    def table(self) -> list[list[str]]:
        """A head, and a row per model; the gains are those of the last one, the result."""
        *_, result = labels = list(self.board.rows)
        rows = [[*HEAD, "parameters", "tokens/s"]]
        for label in labels:
            gain = "" if label == result else "{:+.4f} ± {:.4f}".format(*self.gain(result, label))
            answers, texts = (_shown(self.perplexity(part, label)) for part in (ANSWERS, TEXTS))
            score = "{:.4f} ± {:.4f}".format(*self._within(self._scores(label)))
            costs = [f"{self.parameters[label]:,}", f"{self.tokens_per_s[label]:,.0f}"]
            rows.append([label, score, gain, self._generated(label), answers, texts, *costs])
        rows[0][2] = f"{result} is lower by"
        return rows

    def _generated(self, label: str) -> str:
        """The share of answers that are right where they are generated, a mean over datasets, within its interval."""
        shares = {name: self.kept.accuracy[label][name] for name in self._of(GENERATED)}
        if not shares:
            return "-"
        mean = math.fsum(shares.values()) / len(shares)
        variance = math.fsum(
            share * (1 - share) / len(self.kept.samples[label][name]) for name, share in shares.items()
        )
        return f"{mean:.1%} ± {NORMAL * math.sqrt(variance) / len(shares):.1%}"

    def _of(self, part: str) -> list[str]:
        return [name for name in self.kept.datasets if name.startswith(f"{part}: ")]

    def _scores(self, label: str) -> dict[str, torch.Tensor]:
        return {name: self.board.scores_of([label], name)[0] for name in self.board.datasets}

    def _within(self, scores: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """The mean over datasets of questions' scores, and half of its 95 % interval."""
        total = math.fsum(self.weights[name] for name in scores)
        shares = {name: self.weights[name] / total if total else 1 / len(scores) for name in scores}
        mean = math.fsum(shares[name] * float(own.mean()) for name, own in scores.items())
        errors = {name: float(own.var()) / len(own) if len(own) > 1 else math.nan for name, own in scores.items()}
        return mean, NORMAL * math.sqrt(math.fsum(shares[name] ** 2 * errors[name] for name in scores))


@dataclass(frozen=True)
class Asked:
    """What a closing table asks: the questions of a part of a search, under `PART: DATASET`."""

    held_out: bool
    weights: Mapping[str, float]
    questions: Questions

    @classmethod
    def load(cls, config: RunConfig, base: Checkpoint, part: Questions, held_out: bool) -> Asked:
        """Read the questions of `part`, each once. Datasets that no answer is expected of have a text alone."""
        folder, entries = config.dataset_dir, {name: config.questions[name] for name in part.datasets}
        every = dict(_once(folder, entries))
        answered = {name: entry for name, entry in every.items() if entry.mode not in GENERATIVE}
        asked = {name: entry.model_copy(update=_read_as(entry, False)) for name, entry in answered.items()}
        texts = {name: entry.model_copy(update=_read_as(entry, True)) for name, entry in every.items()}
        loaded = {TEXTS: Questions.load(base, folder, texts), ANSWERS: Questions.load(base, folder, asked)}
        loaded[GENERATED] = loaded[ANSWERS]
        datasets = {
            f"{kind}: {name}": dataset
            for kind, mode in MODES.items()
            for name, dataset in _of_part(loaded[kind], part, mode)
        }
        questions = Questions(part.tokenizer, part.stop_tokens, datasets)
        return cls(held_out, {name: entry.weight for name, entry in entries.items()}, questions)


def _once(folder: Path, entries: Mapping[str, DatasetConfig]) -> Iterator[tuple[str, DatasetConfig]]:
    """The datasets, of those that are the same questions scored in several ways the first."""
    seen: list[Any] = []
    for name, entry in entries.items():
        same = (entry.path(folder, name), entry.lm_eval, entry.split, entry.subjects, entry.samples, entry.fields)
        if same not in seen:
            seen.append(same)
            yield name, entry


def _read_as(entry: DatasetConfig, of_question: bool) -> dict[str, Any]:
    """What of an entry differs where answers, or the questions' texts, are scored: items of a choice list options."""
    mode = entry.mode if entry.mode in CHOICES else "exact"
    return {"mode": mode, "of_question": of_question, "strict": False, "weight": 1.0}


def _of_part(read: Questions, part: Questions, mode: str) -> Iterator[tuple[str, Dataset]]:
    """The datasets in another mode, and of their questions those that a part has."""
    for name, dataset in read.datasets.items():
        wanted = {sample.number for sample in part.datasets[name].samples}
        config = dataset.config.model_copy(update={"mode": mode})
        samples = tuple(replace(sample, options=()) for sample in dataset.samples if sample.number in wanted)
        if samples:
            yield name, replace(dataset, config=config, samples=samples)


def _costs(model: WorkingModel, rows: Mapping[str, Recipe | None]) -> tuple[dict[str, int], dict[str, float]]:
    """Parameters and tokens per second by model. Those that are built alike are timed once: they differ by noise."""
    alike: dict[str, tuple[int, float]] = {}
    parameters, rates = {}, {}
    for label, recipe in rows.items():
        own = recipe or model.recipe
        key = repr((own.base, own.config_edits))
        if key not in alike:
            with model.trial(Candidate(label, recipe=own)):
                n = sum(parameter.numel() for parameter in model.module.parameters())
                alike[key] = (n, _tokens_per_s(model))
        parameters[label], rates[label] = alike[key]
    return parameters, rates


@torch.inference_mode()
def _tokens_per_s(model: WorkingModel) -> float:
    length, best = min(LENGTH, model.context), math.inf
    ids = torch.zeros(TIMED, length, dtype=torch.long, device=model.device)
    for _ in range(TIMES):
        began = time.perf_counter()
        model.module(ids, use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        best = min(best, time.perf_counter() - began)
    return ids.numel() / best


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}" if value < 100 else f"{value:.4g}"
