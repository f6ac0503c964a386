"""Decisions of a joint search: what one half of the questions picks, the other half tests.

The two directions are tested together: the answers of each half's pick to the other half's questions, against the
incumbent's, so that every question tests and none has picked what it tests (cross-fitting, Chernozhukov et al.,
arXiv 1608.00060). What is committed after a passed test is what all questions pick, or the mean of what was trained
on each half. That mean has seen all questions: what is trained next goes on from what each half led to, and has to be
better than that on the other half. Beyond chance it has to be better than what was current when training began: how
far training goes is chosen among a few steps in a row, which few questions could not prove one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from olmfast.evaluation.scores import Scores
from olmfast.search.acceptance import Answers, Gain, Scale, passes
from olmfast.search.halves import Halves, Indices
from olmfast.search.log import Outcome
from olmfast.search.ranking import skill_retained

FIRST, SECOND, MEAN = 1, 2, 3  # rows of a step with trained candidates: see `CrossFit.of_trained`
TRAINED = ("by the first half", "by the second half", "mean of both")  # and what they are called


@dataclass(frozen=True)
class Decision:
    """The winning row; what it gains (None: nothing was tested)."""

    winner: int
    gain: Gain | None = None


@dataclass
class CrossFit:
    """The questions' halves, the scale of skill, and how many tests there were since one was last passed."""

    halves: Halves
    scale: Scale
    significance: float | None
    n_tests: int = 0

    def of_candidates(self, scores: Scores, rows: Sequence[int]) -> Decision:
        """Among candidates `rows`, 0 the incumbent, all scored on all questions."""
        picks = [self._pick(scores, rows, half) for half in self.halves]
        if picks == [0, 0]:
            return Decision(0)
        tested = [(pick, other) for pick, other in zip(picks, reversed(list(self.halves)), strict=True)]
        gain = self._gain(scores, tested, scores)
        best = self._pick(scores, rows, None)
        return self._decided(best, gain)

    def of_trained(self, scores: Scores, crossed: Scores | None = None) -> Decision:
        """Among the incumbent (row 0), what was trained on the first half and scored on the second (row 1), the other
        way round (row 2), and the mean of both, scored on all questions (row 3).

        Where the incumbent is such a mean, `crossed` are the scores of what was current before training, and of what
        the incumbent is the mean of: see `search/lines.py`.
        """
        tested = [(FIRST, self.halves.second), (SECOND, self.halves.first)]
        begun, last = (scores, scores) if crossed is None else (crossed.rows([0]), crossed.rows([1]))
        gain, in_all = self._gain(scores, tested, last), self._gain(scores, tested, begun)
        skills = [self.scale.skill(_means(scores, row)) for row in (0, MEAN)]
        is_better = skills[1] >= skills[0] and gain.mean > 0  # skills are at most 1: equal where both are
        return Decision(self._decided(MEAN if is_better else 0, in_all).winner, gain)

    def best(self, scores: Scores, rows: Sequence[int]) -> int:
        """The row with the highest expected skill, whether it would pass a test or not."""
        return self._pick(scores, rows, None)

    def _decided(self, best: int, gain: Gain) -> Decision:
        self.n_tests += 1
        if best == 0 or not passes(gain, self.significance, self.n_tests):
            return Decision(0, gain)
        self.n_tests = 0
        return Decision(best, gain)

    def _pick(self, scores: Scores, rows: Sequence[int], half: Indices | None) -> int:
        """The row with the highest expected skill on some questions (None: all); the lower of equals.

        Gains over the incumbent are shrunk towards their mean by their own noise: empirical Bayes with a normal prior
        (Efron and Morris, JASA 68, 1973).
        """
        others = [row for row in rows if row != 0]
        old = _answers(scores, 0, half)
        gains = [self.scale.gain(_answers(scores, row, half), old) for row in others]
        if not gains:
            return 0
        center = math.fsum(gain.mean for gain in gains) / len(gains)
        spread = math.fsum((gain.mean - center) ** 2 for gain in gains) / max(1, len(gains) - 1)
        noise = math.fsum(gain.error**2 for gain in gains) / len(gains)
        between = max(0.0, spread - noise) if math.isfinite(noise) else 0.0
        best, winner = 0.0, 0
        for row, gain in zip(others, gains, strict=True):
            own = gain.error**2
            trust = between / (between + own) if between + own > 0 and math.isfinite(own) else float(own == 0)
            expected = center + trust * (gain.mean - center) if between else gain.mean
            if expected > best:
                best, winner = expected, row
        return winner

    def _gain(self, scores: Scores, tested: Sequence[tuple[int, Indices]], before: Scores) -> Gain:
        """What rows gain over the first candidate of `before`, on the questions that test each of them, all
        together."""
        new: dict[str, list[torch.Tensor]] = {}
        old: dict[str, list[torch.Tensor]] = {}
        for row, half in tested:
            for name, answers in _answers(scores, row, half).items():
                new.setdefault(name, []).append(answers)
                old.setdefault(name, []).append(_answers(before, 0, half)[name])
        return self.scale.gain(*({name: torch.cat(parts) for name, parts in own.items()} for own in (new, old)))


def expected_skill(steps: Iterable[Outcome], spans: Mapping[str, tuple[float, float]]) -> float | None:
    """The skill retained that new questions may be expected to show of what the steps led to; None if unknown.

    It is that of what was trained on each half of the questions, scored on the other half. Any other step after it
    goes on from the mean of both, which has seen all questions: from then on the gains are added.
    """
    expected, is_mixed = None, False
    for outcome in steps:
        if not outcome.changed:
            continue
        crossed = {name: _crossed(outcome.metrics.get(name, {})) for name in spans}
        if crossed and not is_mixed and all(math.isfinite(mean) for mean in crossed.values()):
            expected = skill_retained(crossed, spans)
        elif expected is not None:
            expected, is_mixed = expected + (outcome.gain or 0.0), True
    return expected


def _crossed(means: Mapping[str, float | None]) -> float:
    """The mean score of what each half trained, on the other; NaN where nothing was trained, or has no score."""
    found = [means.get(label) for label in TRAINED[:2]]
    return math.fsum(found) / 2 if None not in found else math.nan  # type: ignore[arg-type]


def _answers(scores: Scores, row: int, questions: Indices | None) -> Answers:
    if questions is None:
        return {name: values[row] for name, values in scores.samples.items()}
    return {name: scores.samples[name][row, indices] for name, indices in questions.items()}


def _means(scores: Scores, row: int) -> dict[str, float]:
    return {name: float(scores.mean(name)[row]) for name in scores.samples}
