"""Whether a candidate is better than the incumbent, or was only lucky.

What is picked on some questions is tested on others: a paired t-test, one-sided (Student, Biometrika 6, 1908). The
k-th test since something was last accepted has to be passed at 6 / (pi k)^2 of the significance asked for; the sum
over all k is 1, so that a search without end accepts something worthless with that probability at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

Answers = Mapping[str, torch.Tensor]  # dataset -> scores of questions (n,), lower is better


@dataclass(frozen=True)
class Gain:
    """By how much the mean skill grows, its standard error, and the degrees of freedom of that."""

    mean: float
    error: float
    freedom: int

    @property
    def p(self) -> float:
        """How likely so large a gain is where there is none."""
        from scipy.stats import t

        if self.error == 0 and self.mean > 0:
            return 2.0 ** -(self.freedom + 1)  # as if each question had been a coin: few of them prove little
        if self.error == 0 or not math.isfinite(self.error):
            return 1.0
        return float(t.sf(self.mean / self.error, max(1, self.freedom)))

    @property
    def shrunk(self) -> float:
        """The gain that is to be expected of other questions: positive-part James-Stein (Efron and Morris, JASA 68,
        1973), which takes away the noise's share."""
        if self.error == 0:
            return self.mean
        return self.mean * max(0.0, 1 - (self.error / self.mean) ** 2) if self.mean and self.error < math.inf else 0.0


@dataclass(frozen=True)
class Scale:
    """How scores become skill: 1 is as good as a dataset's best donor, 0 as its worst; more than 1 counts as 1.

    `spans` maps the datasets that tell donors apart to (best, worst); `noise` a dataset to the difference between two
    scores of the same model that rounding alone makes.
    """

    spans: Mapping[str, tuple[float, float]]
    weights: Mapping[str, float] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)

    def weight(self, dataset: str) -> float:
        """The dataset's share of the whole."""
        total = sum(self.weights.get(name, 1.0) for name in self.spans)
        return self.weights.get(dataset, 1.0) / total if total else 0.0

    def credit(self, dataset: str, score: float) -> float:
        """The skill that a mean score on a dataset is worth, at most 1."""
        best, worst = self.spans[dataset]
        return min(1.0, (worst - score) / (worst - best))

    def skill(self, means: Mapping[str, float]) -> float:
        """The weighted mean credit of a model's mean scores; NaN if a dataset's is not finite."""
        found = math.fsum(self.weight(name) * self.credit(name, means[name]) for name in self.spans if name in means)
        used = math.fsum(self.weight(name) for name in self.spans if name in means)
        finite = all(math.isfinite(means[name]) for name in self.spans if name in means)
        return found / used if used and finite else math.nan

    def gain(self, new: Answers, old: Answers) -> Gain:
        """By how much the answers `new` are better than `old`, to the same questions."""
        mean, variance, freedom = 0.0, 0.0, math.inf
        for name, (best, worst) in self.spans.items():
            if name not in new or not len(new[name]):
                continue
            a, b, weight = new[name].double(), old[name].double(), self.weight(name)
            gained = self.credit(name, float(a.mean())) - self.credit(name, float(b.mean()))
            if abs(float(b.mean()) - float(a.mean())) > self.noise.get(name, 0.0):
                mean += weight * gained
            n = len(a)
            spread = float((b - a).std()) / math.sqrt(n) if n > 1 else math.inf
            variance += (weight * spread / (worst - best)) ** 2
            freedom = min(freedom, n - 1)
        return Gain(mean, math.sqrt(variance), 0 if freedom == math.inf else int(freedom))


def passes(gain: Gain, significance: float | None, n_tests: int) -> bool:
    """Whether a gain is accepted as the `n_tests`-th test since the last one that was; None: any gain is."""
    if significance is None:
        return gain.mean > 0
    return gain.mean > 0 and gain.p < significance * 6 / (math.pi * n_tests) ** 2
