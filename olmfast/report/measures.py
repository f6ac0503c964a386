"""What steps are compared by: skill retained where the donors' scores are known, else scores against the first's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from olmfast.report.history import History
from olmfast.search.log import Outcome

Span = tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """`spans` maps a dataset to the scores that count as 1 and 0; `words` say what is told."""

    words: str
    spans: Mapping[str, Span]
    higher_is_better: bool

    @classmethod
    def of(cls, history: History) -> Measure:
        """By the donors' scores on the questions that decided, or, where these do not tell, by the first step's."""
        first = history.steps[0].outcome if history.steps else None
        if first is None:
            return cls("", {}, True)
        if first.stage == "base":
            spans = {name: (own[0], own[1]) for name, own in first.spans.items()} or _between(first)
            spans = {name: span for name, span in spans.items() if _is_wide(span)}
            if spans:
                return cls("skill retained on the questions of each step", spans, True)
        known = _scores(first, first.winner)
        spans = {name: (score, 0.0) for name, score in known.items() if score}
        return cls("score by that of the first model (lower is better)", spans, False)

    def value(self, outcome: Outcome, label: str) -> float:
        """A candidate of a step: the mean over datasets; NaN where a score is missing."""
        scores = _scores(outcome, label)
        if not self.spans or any(name not in scores for name in self.spans):
            return math.nan
        shares = [(scores[name] - worst) / (best - worst) for name, (best, worst) in self.spans.items()]
        return math.fsum(shares) / len(shares)


def _between(first: Outcome) -> dict[str, Span]:
    """Dataset -> the best and the worst score of the donors."""
    found = {}
    for name, by in first.metrics.items():
        known = [score for score in by.values() if score is not None and math.isfinite(score)]
        if known:
            found[name] = (min(known), max(known))
    return found


def _is_wide(span: Span) -> bool:
    best, worst = span
    return best is not None and worst is not None and math.isfinite(worst - best) and worst - best > 1e-6 * abs(worst)


def _scores(outcome: Outcome, label: str) -> dict[str, float]:
    own = {name: by.get(label) for name, by in outcome.metrics.items()}
    return {name: score for name, score in own.items() if score is not None and math.isfinite(score)}
