"""By how much a path is better than the model that it is compared with: shares of that model's own error.

A gain is (the model's score - the path's) / (the model's score - a perfect one), so that 0 is no gain and 1 is
perfect, whatever a dataset is scored by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from olmfast.evaluation.scores import Scores
from olmfast.runs.verdict import half_width, mean_of_means
from olmfast.search.acceptance import Scale, passes
from olmfast.search.halves import Indices

PERFECT = {"perplexity": 1.0, "bigram": 1.0, "quality": 1.0}  # of modes whose best score is not 0
Spans = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Gain:
    """By how much better a range is than the model, as a share of the model's error: the mean over datasets, with a
    paired 95 % interval over the questions; `n` questions of each dataset at least."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, leads: Sequence[torch.Tensor], confidence: float = 0.95) -> Gain:
        """From the gain on each question (questions,) of each dataset."""
        if not leads or not all(map(len, leads)):
            return cls(math.nan, math.nan, math.nan, 0)
        mean, error, freedom = mean_of_means(leads)
        half = half_width(error, freedom, confidence)
        return cls(mean, mean - half, mean + half, min(map(len, leads)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"gain": self.mean, "interval": [self.low, self.high], "questions": self.n}


def own_spans(means: Mapping[str, float], modes: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Dataset -> (a perfect score, the model's), where the model is not perfect."""
    spans = {name: (PERFECT.get(modes[name], 0.0), mean) for name, mean in means.items()}
    return {name: span for name, span in spans.items() if span[1] - span[0] > 1e-9}


def leads_of(scores: Scores, row: int, spans: Spans, base: int = 0) -> list[torch.Tensor]:
    """Dataset by dataset, the gain of a row over the row `base` on each question (questions,) that both have."""
    leads = []
    for name, (best, worst) in spans.items():
        if name in scores.samples:
            values = scores.samples[name].double()
            lead = (values[base] - values[row]) / (worst - best)
            leads.append(lead[lead.isfinite()])
    return leads


def is_better(scores: Scores, half: Indices, scale: Scale, required_p: float | None, n_tests: int) -> bool:
    """Whether the last row is better than the first on these questions, in the `n_tests`-th test since one passed."""
    new, old = ({name: scores.samples[name][row, own] for name, own in half.items()} for row in (-1, 0))
    return passes(scale.gain(new, old), required_p, n_tests)


def compared(
    scores: Scores, rows: Sequence[Mapping[str, Any]], modes: Mapping[str, str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """`rows`, which say what was scored in the rows behind the first, with gains over that one; and its own scores."""
    own = {name: float(scores.mean(name)[0]) for name in scores.samples}
    spans, found = own_spans(own, modes), []
    for place, entry in enumerate(rows, 1):
        told = dict(entry)
        if spans:
            leads = leads_of(scores, place, spans)
            every = Gain.of(leads, 1 - 0.05 / len(rows))
            told |= Gain.of(leads).to_json() | {"interval of all": [every.low, every.high]}
        found.append({**told, "scores": {name: float(scores.mean(name)[place]) for name in scores.samples}})
    return found, own
