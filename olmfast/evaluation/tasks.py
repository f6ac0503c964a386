"""One sample of one dataset as the fast Scorer sees it: an input, the positions that matter, and what they score.

Whatever the mode, an input is a prompt and the tokens that are expected to follow it. Where a mode lets the model
run freely, these are a *trajectory*: the greedy tokens of the current model. A candidate that agrees with all of
them has been followed in one pass; one that does not has to be decoded from its first other token on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.encoding import Dataset, Sample
from olmfast.evaluation.scores import Answer, picked

NO_LABEL = -100


@dataclass
class OwnTokens:
    """A candidate's own greedy tokens, as far as they are known, and their probabilities (tokens,)."""

    tokens: list[int]
    max_prob: torch.Tensor


@dataclass
class Task:
    """One sample of one dataset, and the tokens that a candidate is verified along."""

    name: str
    index: int
    dataset: Dataset
    context: int
    expected: tuple[int, ...] | None  # None: the trajectory is not known yet
    latest: tuple[int, ...] | None = None  # the current model's own tokens, which are to be expected next

    @classmethod
    def of(cls, name: str, index: int, dataset: Dataset, context: int) -> Task:
        """The task of a dataset's sample. What is teacher-forced expects the response."""
        task = cls(name, index, dataset, context, None)
        if not task.runs_freely:
            task.expected = task.sample.response
        return task

    @property
    def sample(self) -> Sample:
        """The tokens of prompt and response."""
        return self.dataset.samples[self.index]

    @property
    def mode(self) -> str:
        """The dataset's mode."""
        return self.dataset.config.mode

    @property
    def generates(self) -> bool:
        """Whether a text is generated, which a stop token ends."""
        return self.mode in metrics.GENERATIVE

    @property
    def runs_freely(self) -> bool:
        """Whether the candidate's own tokens are fed back. `strict` asks only whether all are the response's."""
        return self.generates or (self.mode == "exact_match" and not self.dataset.config.strict)

    @property
    def ids(self) -> tuple[int, ...]:
        """The input: the prompt and all but the last of the expected tokens."""
        return self.sample.prompt + (self.expected or ())[:-1]

    @property
    def labels(self) -> tuple[int, ...]:
        """One per position that matters; these begin with the prompt's last."""
        return self.expected or (NO_LABEL,)

    @property
    def limit(self) -> int:
        """How many tokens a free run has at most."""
        if self.generates:
            return min(self.dataset.config.max_new_tokens, self.context - len(self.sample.prompt))
        return len(self.sample.response)

    def teacher_forced(self, logits: metrics.ResponseLogits, argmax: torch.Tensor) -> Answer:
        """The answer to a task that does not run freely; all fields are (labels,)."""
        if self.mode == "exact_match":
            right = argmax == torch.tensor(self.labels)
            return Answer(metrics.exact_match(logits.max_prob, right, strict=True), bool(right.all()))
        return Answer(metrics.TEACHER_FORCED[self.mode](logits), bool(logits.is_top.all()))

    def choice(self, option_logits: torch.Tensor) -> Answer:
        """The answer to a multiple choice from the logits of its options (options,)."""
        return picked(self.mode, option_logits, self.sample)

    def follow(self, argmax: torch.Tensor, max_prob: torch.Tensor) -> OwnTokens:
        """The candidate's own tokens up to where it first leaves the trajectory; both are (labels,)."""
        agrees = argmax == torch.tensor(self.labels)
        n = len(agrees) if bool(agrees.all()) else int(agrees.int().argmin()) + 1
        return OwnTokens(argmax[:n].tolist(), max_prob[:n])

    def is_over(self, own: OwnTokens, stop: Collection[int]) -> bool:
        """Whether a free run ends with these tokens: by a stop token, its limit, or a score that is no number."""
        stopped = self.generates and own.tokens[-1] in stop
        return stopped or len(own.tokens) >= self.limit or bool(own.max_prob.isnan().any())

    def free_run(self, own: OwnTokens, tokenizer: Any, stop: Collection[int]) -> Answer:
        """The answer of a free run that is over; it was cut off if its limit ended it."""
        failed = bool(own.max_prob.isnan().any())
        if self.mode == "exact_match":
            right = torch.tensor(own.tokens) == torch.tensor(self.sample.response[: len(own.tokens)])
            complete = len(own.tokens) == len(self.sample.response)
            return Answer(metrics.exact_match(own.max_prob, right, strict=False), complete and bool(right.all()))
        stopped = own.tokens[-1] in stop
        text = tokenizer.decode(own.tokens[:-1] if stopped else own.tokens, skip_special_tokens=True)
        score = metrics.GENERATIVE[self.mode](text, self.dataset.config.forbid)
        return Answer(torch.nan if failed else score, truncated=not stopped)
