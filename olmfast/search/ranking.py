"""Which candidate wins: by ranks (Copeland, or their average), or the weighted mean of scaled scores; and the guard.

All functions are pure and deterministic: equal input gives an equal choice in every process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from olmfast.evaluation.scores import Scores


@dataclass(frozen=True)
class Rules:
    """How scores are compared. `spans` maps a dataset to the donors' (best, worst) score on it."""

    selection: str
    tie_tolerance: float
    significance: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def weight(self, dataset: str) -> float:
        """The dataset's weight, 1 unless the config says otherwise."""
        return self.weights.get(dataset, 1.0)

    def tells_apart(self, dataset: str) -> bool:
        """Whether the donors' scores on the dataset differ at all."""
        best, worst = self.spans[dataset]
        return _is_less(best, worst, self.tie_tolerance)


def order(scores: Scores, candidates: Sequence[int], rules: Rules) -> list[int]:
    """The given candidates (rows of `scores`), best first. Row 0 is the incumbent, and wins ties."""
    left, result = list(candidates), []
    while left:
        winner = choose(scores, left, rules)
        result.append(winner)
        left.remove(winner)
    return result


def choose(scores: Scores, candidates: Sequence[int], rules: Rules) -> int:
    """The winning row among `candidates`, which must have finite scores on every dataset."""
    comparison = Comparison(scores, rules)
    if rules.selection == "average_rank":
        return comparison.best_by_average_rank(candidates)
    chosen = comparison.best_by_mean(candidates) if rules.selection == "mean" else None
    return comparison.best_by_copeland(candidates) if chosen is None else chosen


class Comparison:
    """Compares the candidates of one step. Candidates are rows of `scores`."""

    def __init__(self, scores: Scores, rules: Rules) -> None:
        self.scores, self.rules = scores, rules
        self.means: dict[str, list[float]] = {name: scores.mean(name).tolist() for name in scores.samples}

    def is_better(self, dataset: str, i: int, j: int) -> bool:
        """Whether i scores lower than j by more than the tie tolerance and, if requested, than noise."""
        a, b = self.means[dataset][i], self.means[dataset][j]
        if not _is_less(a, b, self.rules.tie_tolerance):
            return False
        return self.rules.significance is None or self._p(dataset, i, j) < self.rules.significance

    def is_worse(self, dataset: str, i: int, j: int) -> bool:
        """Whether i scores higher than j by more than the tie tolerance, as the guard requires."""
        return _is_less(self.means[dataset][j], self.means[dataset][i], self.rules.tie_tolerance)

    def chance_to_beat(self, i: int, leader: int, sizes: Mapping[str, int]) -> float:
        """How likely i is to come out before the leader once all `sizes[dataset]` samples are scored, 0..1.

        The mean over all N samples is predicted from the n scored so far: Student's t around their mean, with
        standard error s sqrt(1/n - 1/N) (Cochran, "Sampling Techniques", chapter 2). Datasets are independent.
        """
        if self.rules.selection == "mean" and any(self.rules.tells_apart(name) for name in self.means):
            gains = self._scaled_gains(i, leader)
            variance = sum(_predicted_error(gain, sizes[name]) ** 2 for name, gain in gains.items())
            mean, n = self._mean_gain(i, leader), min(map(len, gains.values()))
            return _chance_above(0.0, mean, math.sqrt(variance), n)
        balances = {0.0: 1.0}  # weight of the datasets on which i is better less that of the others -> chance
        for name in self.means:
            better, worse = self._chances(name, i, leader, sizes[name])
            outcomes = {1: better, -1: worse, 0: max(0.0, 1 - better - worse)}
            spread: dict[float, float] = {}
            for balance, before in balances.items():
                for sign, chance in outcomes.items():
                    after = balance + sign * self.rules.weight(name)
                    spread[after] = spread.get(after, 0.0) + before * chance
            balances = spread
        return sum(chance for balance, chance in balances.items() if balance > 0)

    def _chances(self, dataset: str, i: int, j: int, size: int) -> tuple[float, float]:
        """The chances that i will be better than j on a dataset, and that it will be worse."""
        gain = self._gain(dataset, i, j)
        mean, error, margin = float(gain.mean()), _predicted_error(gain, size), 0.0
        if self.rules.significance is not None:
            from scipy.stats import t

            margin = t.isf(self.rules.significance / 2, size - 1) * _standard_error(gain) * math.sqrt(len(gain) / size)
        return _chance_above(margin, mean, error, len(gain)), _chance_above(margin, -mean, error, len(gain))

    def best_by_copeland(self, candidates: Sequence[int]) -> int:
        """Most wins in pairs (i beats j when it ranks better on more, by weight, of the datasets).

        Ties go to the lowest rank sum (Borda), then to the lower row: the incumbent, then pool order.
        """
        ranks = {dataset: self._ranks(dataset, candidates) for dataset in self.means}
        weight = self.rules.weight

        def beats(i: int, j: int) -> bool:
            return sum(weight(d) * ((r[i] < r[j]) - (r[j] < r[i])) for d, r in ranks.items()) > 0

        wins = {i: sum(beats(i, j) for j in candidates if j != i) for i in candidates}
        borda = {i: sum(weight(d) * rank[i] for d, rank in ranks.items()) for i in candidates}
        return min(candidates, key=lambda i: (-wins[i], borda[i], i))

    def best_by_average_rank(self, candidates: Sequence[int]) -> int:
        """The lowest mean rank over the datasets, by weight (Borda); ties go to the lower row."""
        sums = dict.fromkeys(candidates, 0.0)
        for dataset in self.means:
            for i, rank in self._ranks(dataset, candidates).items():
                sums[i] += self.rules.weight(dataset) * rank
        return min(candidates, key=lambda i: (sums[i], i))

    def best_by_mean(self, candidates: Sequence[int]) -> int | None:
        """Lowest weighted mean of scaled scores; None if no dataset tells the donors apart."""
        values = {
            i: scaled_mean({name: means[i] for name, means in self.means.items()}, self.rules) for i in candidates
        }
        if any(math.isnan(value) for value in values.values()):
            return None
        lowest = min(values.values())
        best = next(i for i in candidates if values[i] <= lowest + self.rules.tie_tolerance)
        if 0 in candidates and best != 0:
            tied = values[best] >= values[0] - self.rules.tie_tolerance
            if tied or not self._mean_is_significant(best, 0):
                return 0
        return best

    def _ranks(self, dataset: str, candidates: Sequence[int]) -> dict[int, int]:
        """1 + the number of candidates that are better; ties share the better rank."""
        return {i: 1 + sum(self.is_better(dataset, j, i) for j in candidates if j != i) for i in candidates}

    def _gain(self, dataset: str, i: int, j: int) -> torch.Tensor:
        samples = self.scores.samples[dataset].double()
        return samples[j] - samples[i]

    def _p(self, dataset: str, i: int, j: int) -> float:
        gain = self._gain(dataset, i, j)
        return _paired_p(float(gain.mean()), _standard_error(gain), len(gain))

    def _mean_is_significant(self, i: int, j: int) -> bool:
        return self.rules.significance is None or self._mean_p(i, j) < self.rules.significance

    def _mean_gain(self, i: int, j: int) -> float:
        """By how much the weighted mean of scaled scores is lower for i than for j."""
        return sum(float(gain.mean()) for gain in self._scaled_gains(i, j).values())

    def _mean_p(self, i: int, j: int) -> float:
        """A paired test of the weighted mean: the datasets' variances add, the smallest sample counts."""
        gains = list(self._scaled_gains(i, j).values())
        variance = sum(_standard_error(gain) ** 2 for gain in gains)
        return _paired_p(self._mean_gain(i, j), math.sqrt(variance), min(len(gain) for gain in gains))

    def _scaled_gains(self, i: int, j: int) -> dict[str, torch.Tensor]:
        used = [name for name in self.means if self.rules.tells_apart(name)]
        total = sum(self.rules.weight(name) for name in used)
        spans = {name: self.rules.spans[name] for name in used}
        return {
            name: self._gain(name, i, j) * (self.rules.weight(name) / total / (worst - best))
            for name, (best, worst) in spans.items()
        }


def is_degraded(value: float, base: float, now: float, improve_all: str, names: Sequence[str], rules: Rules) -> bool:
    """Whether the guard `improve_all` drops a candidate that scores `value` on a dataset.

    `base` guards every dataset against the base's score; `all`, or one of the dataset's `names` (its mode, its
    file), guards the datasets it names against the base and against `now`, the incumbent's score.
    """
    if improve_all not in ("all", "base", *names):
        return False
    limits = [base] if improve_all == "base" else [base, now]
    return any(_is_less(limit, value, rules.tie_tolerance) for limit in limits)


def scaled_mean(means: Mapping[str, float], rules: Rules) -> float:
    """Weighted mean over datasets of (score - best donor) / (worst donor - best donor); lower is better.

    Datasets on which all donors score alike are left out; NaN if that is all of them.
    """
    total, weights = 0.0, 0.0
    for dataset, value in means.items():
        best, worst = rules.spans[dataset]
        if rules.tells_apart(dataset):
            total += rules.weight(dataset) * (value - best) / (worst - best)
            weights += rules.weight(dataset)
    return total / weights if weights else math.nan


def skill_retained(means: Mapping[str, float], spans: Mapping[str, tuple[float, float]]) -> float:
    """Mean over datasets of (worst donor - score) / (worst donor - best donor): 1 = as good as each specialist.

    Unweighted; datasets on which all donors score alike are left out; NaN if that is all of them.
    """
    return 1 - scaled_mean(means, Rules("mean", 1e-6, spans=spans))


def _is_less(a: float, b: float, tolerance: float) -> bool:
    return a < b - tolerance * max(abs(a), abs(b))


def _standard_error(gain: torch.Tensor) -> float:
    n = len(gain)
    return float(gain.std(unbiased=True)) / math.sqrt(n) if n > 1 else math.inf


def _predicted_error(gain: torch.Tensor, size: int) -> float:
    """Standard error of the mean over all `size` samples, of which `gain` (n,) are known."""
    return _standard_error(gain) * math.sqrt(max(0.0, 1 - len(gain) / size))


def _chance_above(limit: float, mean: float, error: float, n: int) -> float:
    """The chance that what n samples predict turns out larger than the limit; 1/2 where they tell nothing."""
    from scipy.stats import t

    if not math.isfinite(error) or (error == 0 and mean == limit):
        return 0.5
    return float(t.sf((limit - mean) / error, n - 1)) if error else float(mean > limit)


def _paired_p(mean: float, standard_error: float, n: int) -> float:
    """Two-sided p of a paired t-test with n - 1 degrees of freedom (Student, Biometrika 6, 1908)."""
    from scipy.stats import t

    if standard_error == 0:
        return 0.0 if mean else 1.0
    if not math.isfinite(standard_error):
        return 1.0
    return float(2 * t.sf(abs(mean) / standard_error, n - 1))
