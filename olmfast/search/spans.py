"""Which datasets tell the donors apart: skill is measured on the span from the best to the worst of them.

A span that is no wider than the noise of the questions measures luck, and whoever is lucky on it gets many times the
skill of the best donor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

REAL_BELOW = 0.05  # the p value, corrected for how many pairs of donors there are


def real_spans(samples: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float] | None]:
    """Dataset -> the donors' (best, worst) mean score, or None where no donor is better than another beyond noise.

    `samples` holds scores (donors, questions), lower is better. A span is real when the paired one-sided t-test of
    the worst donor against the best (Student, Biometrika 6, 1908) has p below `REAL_BELOW` after Bonferroni's
    correction for the number of pairs of donors; donors with equal scores count as one, those with a score that is
    not finite are left out.
    """
    return {name: _real_span(scores.double()) for name, scores in samples.items()}


def _real_span(scores: torch.Tensor) -> tuple[float, float] | None:
    distinct = {tuple(row) for row in scores[scores.isfinite().all(dim=1)].tolist()}
    if len(distinct) < 2:
        return None
    scores = torch.tensor(sorted(distinct), dtype=torch.float64)
    means = scores.mean(dim=1)
    best, worst = int(means.argmin()), int(means.argmax())
    p = one_sided_p(scores[worst] - scores[best]) * math.comb(len(scores), 2)
    return (float(means[best]), float(means[worst])) if p < REAL_BELOW else None


def one_sided_p(differences: torch.Tensor) -> float:
    """How likely differences (questions,) of so high a mean are where the true mean is 0: Student's t, one-sided."""
    from scipy.stats import t

    n, mean = len(differences), float(differences.mean())
    error = float(differences.std()) / math.sqrt(n) if n > 1 else math.nan
    if math.isnan(error):
        return 1.0  # one question tells nothing of its noise
    if error == 0:
        return 2.0**-n if mean > 0 else 1.0  # as if each question had been a coin: few of them prove little
    return float(t.sf(mean / error, n - 1))
