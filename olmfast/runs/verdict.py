"""Whether a model is better than those beside it: differences of skill retained with 95 % intervals, in words.

Of each question, a model's lead over a rival is (rival's score - its own) / the donors' span on the dataset, which is
taken as fixed. The difference is the mean over datasets of the mean lead; questions are paired, datasets independent,
so that with D datasets its variance is the sum of s_d^2 / n_d / D^2. The interval is Student's t with the degrees of
freedom of Welch and Satterthwaite (Welch, Biometrika 34, 1947).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from olmfast.runs.scoreboard import AVERAGE, RESULT, START, Scoreboard

HELD_OUT, SELECTION = "held-out", "selection"  # questions that chose nothing, and those that chose the result
WANTED = 0.05  # half the width of an interval that tells most merges apart
NORMAL = 1.959964  # half the width of a 95 % interval, in standard errors, once there are many questions
WITH_ARTICLE = (AVERAGE, START)
NO_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True)
class Comparison:
    """The model's skill retained less a rival's, with its 95 % interval; NaN where one of them has no score.

    `n_needed` is about how many questions, spread over the datasets as they are, give an interval of +-`WANTED`.
    """

    rival: str
    difference: float
    low: float
    high: float
    n_needed: int

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds zero, as it is told: what rounding makes of equal models is no difference."""
        return not (_rounded(self.low) > 0 or _rounded(self.high) < 0)

    @property
    def is_better(self) -> bool:
        """Whether the model is better beyond noise."""
        return _rounded(self.low) > 0

    def words(self, shown: Mapping[str, str] = NO_NAMES) -> str:
        """The comparison in a line; `shown` maps labels to shorter ones."""
        rival = _named(self.rival, shown)
        if math.isnan(self.difference):
            return f"not comparable with {rival}: a question has no score"
        difference, low, high = map(_rounded, (self.difference, self.low, self.high))
        if self.is_better:
            return f"better than {rival} by {difference:.3f} ({low:.3f} to {high:.3f})"
        if not self.holds_zero:
            return f"worse than {rival} by {-difference:.3f} ({-high:.3f} to {-low:.3f})"
        if low == high:
            return f"no different from {rival}: equal scores"
        return f"no different from {rival}: {difference:+.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True)
class Verdict:
    """How a model compares with each other row of its scoreboard.

    `n_questions` are those of the datasets that tell the donors apart, and `skill` is what the model retains on each;
    `kind` says which questions they are: held-out, selection, or nothing. `expected` is the mean skill that a search
    expected of new questions, by those that chose: see `expected_skill`.
    """

    model: str
    kind: str
    n_questions: int
    best_donor: str
    skill: dict[str, float]
    comparisons: tuple[Comparison, ...]
    expected: float | None = None

    @property
    def warning(self) -> str:
        """What is to be done about a model that is not better than its start and best donor; empty if it is."""
        return self._warning(NO_NAMES)

    def lines(self, shown: Mapping[str, str] = NO_NAMES) -> list[str]:
        """The verdict in words; `shown` maps labels of models and datasets to shorter ones."""
        model, warning = _named(self.model, shown), self._warning(shown)
        mean = sum(self.skill.values()) / len(self.skill)
        questions = self._questions(self.n_questions) + (", which chose it" if self.kind == SELECTION else "")
        skill = ", ".join(f"{_named(name, shown)} {value:.3f}" for name, value in self.skill.items())
        told = f"{model} retains {mean:.3f} of the donors' skill on {questions}: {skill}"
        if math.isnan(mean):
            told = f"{model} has no score on one of {questions}: {skill}"
        warnings = [f"warning: {warning}"] if warning else []
        return [told, *self.foretold, *(one.words(shown) for one in self.comparisons), *warnings]

    @property
    def foretold(self) -> list[str]:
        """The line that tells `expected`, where it is known."""
        if self.expected is None:
            return []
        return [f"expected of new questions: {self.expected:.3f} (each half of the selection questions, by the other)"]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values for readers."""
        against = {
            one.rival: {
                "difference": one.difference,
                "interval": [one.low, one.high],
                "holds_zero": one.holds_zero,
                "words": one.words(),
            }
            for one in self.comparisons
        }
        told = {"questions": self.kind, "n_questions": self.n_questions, "skill": self.skill}
        told |= {"expected": self.expected}
        return told | {"against": against, "warning": self.warning}

    def _questions(self, n: int) -> str:
        return " ".join(part for part in (f"{n:,}", self.kind, "questions") if part)

    def _warning(self, shown: Mapping[str, str]) -> str:
        bars = {START: _named(START, shown), self.best_donor: f"its best donor {_named(self.best_donor, shown)}"}
        missed = [one for one in self.comparisons if one.rival in bars and not one.is_better]
        if not missed:
            return ""
        n_needed = max(one.n_needed for one in missed)
        advice = "a better merge may need more selection questions or other candidates"
        if n_needed > self.n_questions:
            advice = f"an interval of +-{WANTED} needs about {self._questions(n_needed)}; {advice}"
        return f"not better than {' or '.join(bars[one.rival] for one in missed)}; {advice}"


def verdict_on(model: str, board: Scoreboard, kind: str = "") -> Verdict | None:
    """How a model (a row of the board) compares with each other row; `kind` says which questions the board is of.

    None where that cannot be said: no dataset tells two donors apart, or the scores of the questions are not known.
    """
    rivals = [label for label in board.rows if label != model]
    donors = [label for label in board.donors if label != model and math.isfinite(board.retained(label))]
    skill = board.skill(model) if model in board.rows else {}
    if not skill or not donors or any(label not in board.samples for label in board.rows):
        return None
    best = max(donors, key=board.retained)
    n_questions = sum(len(board.samples[model][name]) for name in skill)
    return Verdict(model, kind, n_questions, best, skill, tuple(_compare(model, rival, board) for rival in rivals))


def of_run(selection: Scoreboard, holdout: Scoreboard, expected: float | None = None) -> Verdict | None:
    """The verdict on a run's result: on its held-out questions if it has any, else on those that chose it."""
    if not holdout.rows and RESULT not in selection.rows:
        return None
    board, kind = (holdout, HELD_OUT) if holdout.rows else (selection, SELECTION)
    verdict = verdict_on(RESULT, board, kind)
    return verdict and replace(verdict, expected=expected)


def _compare(model: str, rival: str, board: Scoreboard) -> Comparison:
    spans, leads = board.spans, []
    for name in board.skill(model):
        best, worst = spans[name]
        own, other = board.scores_of([model, rival], name)
        leads.append((other - own) / (worst - best))
    difference, error, freedom = mean_of_means(leads)
    if math.isnan(difference):
        return Comparison(rival, math.nan, math.nan, math.nan, 0)
    half = half_width(error, freedom)
    n_needed = math.ceil(sum(map(len, leads)) * (NORMAL * error / WANTED) ** 2) if math.isfinite(error) else 0
    return Comparison(rival, difference, difference - half, difference + half, n_needed)


def mean_of_means(samples: Sequence[torch.Tensor]) -> tuple[float, float, float]:
    """The mean of independent samples' means, its standard error, and the error's degrees of freedom.

    A sample of one value says nothing of its noise: the error is infinite then.
    """
    mean = sum(float(sample.mean()) for sample in samples) / len(samples)
    if any(len(sample) < 2 for sample in samples):
        return mean, math.inf, 1.0
    variances = [float(sample.var()) / len(sample) / len(samples) ** 2 for sample in samples]
    total = sum(variances)
    spent = sum(own**2 / (len(sample) - 1) for own, sample in zip(variances, samples, strict=True))
    return mean, math.sqrt(total), total**2 / spent if spent else math.inf


def half_width(error: float, freedom: float, confidence: float = 0.95) -> float:
    """Half of an interval of Student's t, for a standard error and its degrees of freedom."""
    from scipy.stats import t

    return float(t.isf((1 - confidence) / 2, freedom)) * error if error else 0.0


def _rounded(value: float) -> float:
    return round(value, 3) + 0.0  # no minus before a zero


def _named(label: str, shown: Mapping[str, str]) -> str:
    return f"the {label}" if label in WITH_ARTICLE else shown.get(label, label)
