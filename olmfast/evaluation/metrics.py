"""The metrics: plain formulas over per-token probabilities or generated text. Lower is better in all of them.

p_t is the softmax of the logits that predict response token t, m_t = max p_t, c_t = p_t[expected],
CE_t = -log c_t. Arithmetic is float32 (float64 for a float64 model).

Logits that are no numbers give NaN in every metric, never the score of a wrong answer: a model that cannot be
scored must not pass for a bad one.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch

WORST_DIVERSITY = 4096.0
WORST_QUALITY = 2048.0


class ResponseLogits(NamedTuple):
    """What every metric needs of one response's logits; each field is (tokens,)."""

    max_logit: torch.Tensor
    label_logit: torch.Tensor
    logsumexp: torch.Tensor

    @property
    def max_prob(self) -> torch.Tensor:
        """m_t."""
        return torch.exp(self.max_logit - self.logsumexp)

    @property
    def is_top(self) -> torch.Tensor:
        """Whether the expected token is (one of) the most probable: c_t = m_t."""
        return self.label_logit >= self.max_logit

    @property
    def cross_entropy(self) -> torch.Tensor:
        """CE_t."""
        return self.logsumexp - self.label_logit


def response_logits(logits: torch.Tensor, labels: torch.Tensor) -> ResponseLogits:
    """Of logits (tokens, vocabulary), what metrics need of the labels (tokens,), in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    label = logits.gather(1, labels[:, None]).squeeze(1)
    return ResponseLogits(logits.amax(dim=1), label, torch.logsumexp(logits, dim=1))


def exact_match(max_prob: torch.Tensor, right: torch.Tensor, strict: bool) -> torch.Tensor:
    """Mean over t of 1 - m_t where the model's own token is the expected one, 1 + m_t where not (0..2).

    `strict`: 1 if any token is wrong, else mean(1 - m_t).
    """
    if strict and not bool(right.all()) and not bool(max_prob.isnan().any()):
        return torch.ones_like(max_prob[0])
    return torch.where(right, 1 - max_prob, 1 + max_prob).mean()


def bigram_loss(logits: ResponseLogits) -> torch.Tensor:
    """s_t = 1 if c_t < m_t else 1 - m_t; mean over i of s_i + s_{i+1}; one token alone scores 2 s_1."""
    max_prob = logits.max_prob
    single = torch.where(logits.is_top | max_prob.isnan(), 1 - max_prob, torch.ones_like(max_prob))
    return _pair_sums(single).mean()


def exact(logits: ResponseLogits) -> torch.Tensor:
    """Mean CE_t."""
    return logits.cross_entropy.mean()


def perplexity(logits: ResponseLogits) -> torch.Tensor:
    """exp(mean CE_t)."""
    return logits.cross_entropy.mean().exp()


def bigram(logits: ResponseLogits) -> torch.Tensor:
    """exp(mean over t of CE_t + CE_{t+1}); one token alone counts twice."""
    return _pair_sums(logits.cross_entropy).mean().exp()


def choice(option_logits: torch.Tensor, answer: int) -> torch.Tensor:
    """0 if the right option's letter is the likeliest of the letters, else 1. Ties go to the first letter."""
    wrong = float(int(option_logits.argmax()) != answer)
    score = wrong if bool(option_logits.max().isfinite()) else torch.nan
    return torch.tensor(score, dtype=torch.promote_types(option_logits.dtype, torch.float32))


def likelihood(option_logits: torch.Tensor, answer: int) -> torch.Tensor:
    """-log of the right option's share among the letters: what `choice` counts, without its steps."""
    logits = option_logits.to(torch.promote_types(option_logits.dtype, torch.float32))
    return logits.logsumexp(dim=0) - logits[answer]


def diversity(text: str, forbid: str | None) -> float:
    """4096 / unique whitespace-separated words (at least 1); 4096 if `forbid` (a pattern) is found."""
    if forbid is not None and re.search(forbid, text):
        return WORST_DIVERSITY
    return WORST_DIVERSITY / max(len(set(text.split())), 1)


def quality(text: str, forbid: str | None) -> float:
    """1 / (min(words, 2048)/2048 * (unique/words)^2); 2048 below 100 words or if `forbid` is found."""
    words = text.split()
    if len(words) < 100 or (forbid is not None and re.search(forbid, text)):
        return WORST_QUALITY
    return 1 / (min(len(words), 2048) / 2048 * (len(set(words)) / len(words)) ** 2)


def _pair_sums(values: torch.Tensor) -> torch.Tensor:
    return values[:-1] + values[1:] if len(values) > 1 else 2 * values


# What is asked of the model, said here alone. Beside these there are `exact_match` (its own tokens are held against
# the response's).
# The response is read along:
TEACHER_FORCED = {"bigram_loss": bigram_loss, "exact": exact, "perplexity": perplexity, "bigram": bigram}
# A text is written, and the response is ignored:
GENERATIVE = {"diversity": diversity, "quality": quality}

# An option is picked:
CHOICES = {"choice": choice, "likelihood": likelihood}

# Modes whose scores lie in a fixed range, of which a question's take up about half: see `standard_error`.
BOUNDED = frozenset({"exact_match", "bigram_loss", "choice"})
SPREAD = 0.5


def standard_error(n_questions: int) -> float:
    """What a bounded mode's mean over so many questions is likely to be off by, in shares of its usual range.

    It assumes that a question's score differs from the mean by half that range, as right and wrong answers do where
    half of them are right; it is measured on no model.
    """
    return SPREAD / math.sqrt(n_questions)
