"""MMLU as a table: accuracy, the likelihood of the right letter and the questions' perplexity, per subject and of all.

All of them is the plain mean over subjects, as published tables have it (`mmlu_results.json`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmfast.errors import InputError, show, told
from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.letters import encode, letter_logits, mean_losses
from olmfast.evaluation.mmlu import Style, Subject, read_mmlu
from olmfast.evaluation.open import Evaluation, Settings, load_tokenizer
from olmfast.weights.expressions import whole
from olmfast.weights.files import read_text
from olmfast.weights.pool import Pool

RESULTS = "mmlu_results.json"
KEYS = ("average_accuracy", "average_perplexity", "per_subject_accuracy", "per_subject_perplexity")
Z = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class SubjectScore:
    """One subject: how many of its `n` questions are right; the mean probability of the right letter among the four,
    the mean of its negative logarithm; and exp of the mean over questions of the mean loss of a question's tokens."""

    n: int
    accuracy: float
    likelihood: float
    loss: float
    perplexity: float
    cut: int = 0

    @property
    def variance(self) -> float:
        """That of the accuracy as an estimate."""
        return self.accuracy * (1 - self.accuracy) / (self.n - 1) if self.n > 1 else 0.25


@dataclass(frozen=True)
class Board:
    """The scores of one model, asked in one style after so many worked examples."""

    model: str
    style: Style
    shots: int
    subjects: Mapping[str, SubjectScore]

    def average(self, of: Callable[[SubjectScore], float]) -> float:
        """The plain mean over subjects."""
        return math.fsum(map(of, self.subjects.values())) / len(self.subjects)

    @property
    def accuracy(self) -> float:
        """The mean accuracy of the subjects."""
        return self.average(lambda one: one.accuracy)

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of the mean accuracy."""
        return Z * math.sqrt(math.fsum(one.variance for one in self.subjects.values())) / len(self.subjects)

    @property
    def letters(self) -> str:
        """Which letters were compared, in words."""
        return (
            "bare letters (A), the prompt of pruning by merging"
            if self.style == "seed"
            else "letters after a space ( A)"
        )

    def results(self) -> dict[str, Any]:
        """What `mmlu_results.json` holds."""
        return {
            "average_accuracy": self.accuracy,
            "average_perplexity": self.average(lambda one: one.perplexity),
            "per_subject_accuracy": {name: one.accuracy for name, one in self.subjects.items()},
            "per_subject_perplexity": {name: one.perplexity for name, one in self.subjects.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the keys of `mmlu_results.json`, and the rest."""
        return self.results() | {
            "model": self.model,
            "letters": self.style,
            "shots": self.shots,
            "interval": [self.accuracy - self.margin, self.accuracy + self.margin],
            "average_likelihood": self.average(lambda one: one.likelihood),
            "average_loss": self.average(lambda one: one.loss),
            "per_subject_likelihood": {name: one.likelihood for name, one in self.subjects.items()},
            "questions": {name: one.n for name, one in self.subjects.items()},
            "fewer_shots": {name: one.cut for name, one in self.subjects.items() if one.cut},
        }


@dataclass(frozen=True)
class Compared:
    """Another model's `mmlu_results.json`: the accuracy of each subject, and what a model scored here gains on it."""

    name: str
    accuracy: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> Compared:
        """Read a file. Raises InputError for one that is no `mmlu_results.json`."""
        try:
            data = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not readable as JSON: {told(error)}") from error
        missing = [key for key in KEYS if not isinstance(data, dict) or key not in data]
        if missing:
            raise InputError(f"{path}: is no {RESULTS}: {missing[0]} is missing")
        accuracy = data["per_subject_accuracy"]
        if not isinstance(accuracy, dict) or not accuracy:
            raise InputError(f"{path}: per_subject_accuracy: expected an object of subjects, got {show(accuracy)}")
        for subject, value in accuracy.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(
                    f"{path}: per_subject_accuracy.{subject}: expected a number from 0 to 1, got {show(value)}"
                )
        return cls(str(path), accuracy)

    def gain(self, board: Board) -> tuple[float, float, int]:
        """By how much the board's mean accuracy is higher on the subjects that both have, half of its 95 % interval as
        if other questions had been asked, and how many subjects these are."""
        both = [(one, self.accuracy[name]) for name, one in board.subjects.items() if name in self.accuracy]
        if not both:
            return math.nan, math.nan, 0
        mean = math.fsum(one.accuracy - theirs for one, theirs in both) / len(both)
        other = (theirs * (1 - theirs) / max(1, one.n - 1) for one, theirs in both)
        variance = math.fsum(one.variance for one, _ in both) + math.fsum(other)
        return mean, Z * math.sqrt(variance) / len(both), len(both)


def evaluate_mmlu(
    model: str,
    folder: Path,
    *,
    subjects: Sequence[str] | None = None,
    shots: int = 5,
    style: Style = "spaced",
    models_dir: Path = Path("models"),
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> Board:
    """Score a model (folder or Hub id in `models_dir`) on the questions of MMLU's `folder`.

    Raises InputError naming what is unusable.
    """
    here = Path.cwd()
    read = read_mmlu(folder, subjects, shots, style=style)
    settings = Settings.of(device, dtype)
    pool = Pool.open([model], here / models_dir, here)
    pool.check_finite()
    evaluation = Evaluation(whole(model, pool.tensors), pool, settings)
    return score_mmlu(model, evaluation, read, shots, progress)


def score_mmlu(
    label: str,
    evaluation: Evaluation,
    subjects: Sequence[Subject],
    shots: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Board:
    """Score the model of an evaluation; `progress` is told each subject that is done."""
    model, batch_tokens = evaluation.model, evaluation.settings.batch_tokens
    tokenizer, _ = load_tokenizer(model.sources.pool[model.recipe.base])
    asked = [encode(subject, tokenizer, model.context, shots) for subject in subjects]
    with torch.inference_mode():
        blockwise = BlockwiseModel(model.module, model.architecture, model.residency)
    found = {}
    for one in asked:
        logits = letter_logits(model, blockwise, one, batch_tokens)
        losses = mean_losses(blockwise, one.texts, batch_tokens)
        if not bool(logits.isfinite().all()) or bool(losses.isnan().any()):
            raise InputError(f"{label}: its logits on {one.name} are no numbers: it overflows in {model.dtype}")
        right = torch.tensor(one.right)
        of_right = logits.double().log_softmax(dim=1).gather(1, right[:, None])[:, 0]
        mean = float(losses.mean())
        found[one.name] = SubjectScore(
            len(right),
            float((logits.argmax(dim=1) == right).double().mean()),
            float(of_right.exp().mean()),
            -float(of_right.mean()),
            math.exp(mean) if mean < 700 else math.inf,
            sum(map(bool, one.fewer)),
        )
        progress(one.name)
    return Board(label, subjects[0].style, shots, found)
