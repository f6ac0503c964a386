"""What a search by gradient teaches: the answer expected of a question, softened by what a teacher thinks of it.

Half of a lesson is the answer; half are, for every token of it, the `LIKELIEST` tokens that the teacher would go on
with, and their probabilities (distillation: Hinton et al., arXiv 1503.02531). They say more than the answer does, so
that fewer questions are enough and less of what is learnt is luck. A dataset without expected answers is answered by
the teacher (Kim and Rush, arXiv 1606.07947).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.encoding import Dataset, Sample, make_batches
from olmfast.evaluation.generation import generate
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate

TEXT_TOKENS = 128  # of an answer that a teacher writes
LIKELIEST = 128  # tokens that a teacher's view is kept of: two kilobytes for each token of an answer
EXPECTED = 0.5  # the share of the answer itself: a teacher may be wrong, and a merge better than its teacher


@dataclass(frozen=True)
class Lesson:
    """An answer and how likely its tokens and their rivals are.

    `tokens` int64 and `shares` float64 are (predicted tokens, k); the shares of a predicted token add up to 1.
    """

    sample: Sample
    tokens: torch.Tensor
    shares: torch.Tensor

    @property
    def n(self) -> int:
        """See `n_predicted`."""
        return len(self.tokens)


def plain_lesson(sample: Sample) -> Lesson:
    """The expected answer and nothing else."""
    answer = sample.response[: n_predicted(sample)]
    return Lesson(sample, torch.tensor(answer)[:, None], torch.ones(len(answer), 1, dtype=torch.float64))


def seen_by(teacher: torch.Tensor, sample: Sample) -> Lesson:
    """The answer, and what a teacher thinks of it, whose logits are (predicted tokens, vocabulary); of a multiple
    choice, among its options."""
    if sample.options:
        tokens = torch.tensor([sample.options])
        logits = teacher[:1, list(sample.options)]
    else:
        logits, tokens = teacher.topk(min(LIKELIEST, teacher.shape[1]), dim=1)
    expected, seen = plain_lesson(sample), logits.softmax(dim=1, dtype=torch.float64).cpu()
    return Lesson(
        sample,
        torch.cat([expected.tokens, tokens.cpu()], dim=1),
        torch.cat([EXPECTED * expected.shares, (1 - EXPECTED) * seen], dim=1),
    )


# The index of each question and its predicted tokens' logits, computed by the live model.
LogitsOf = Callable[[Sequence[Sample]], Iterable[tuple[int, torch.Tensor]]]


class Lessons:
    """The lessons of datasets, each taught by one model. They are kept: a teacher is asked once."""

    def __init__(
        self,
        model: WorkingModel,
        datasets: Mapping[str, Dataset],
        batch_tokens: int,
        stop_tokens: Sequence[int],
        logits_of: LogitsOf,
    ) -> None:
        self.model, self.datasets, self.logits_of = model, datasets, logits_of
        self.batch_tokens, self.stop_tokens = batch_tokens, tuple(stop_tokens)
        self._taught: dict[str, tuple[Candidate, list[Lesson]]] = {}

    def of(
        self,
        samples: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        teachers: Mapping[str, Candidate],
    ) -> list[tuple[str, Lesson, float]]:
        """Dataset, lesson and share in the loss of each question: a dataset's mean counts by its weight."""
        found = []
        for name, indices in samples.items():
            own = self._dataset(name, teachers.get(name))
            found += [(name, own[index], weights[name] / len(indices)) for index in indices]
        return found

    def _dataset(self, name: str, teacher: Candidate | None) -> list[Lesson]:
        dataset = self.datasets[name]
        if teacher is None:
            return [plain_lesson(sample) for sample in dataset.samples]
        known, lessons = self._taught.get(name, (None, []))
        if known != teacher:
            with self.model.trial(teacher):
                samples = self._answered(dataset)
                seen = {index: seen_by(logits, samples[index]) for index, logits in self.logits_of(samples)}
            lessons = [seen[index] for index in range(len(samples))]
            self._taught[name] = teacher, lessons
        return lessons

    def _answered(self, dataset: Dataset) -> list[Sample]:
        """The questions with expected answers: what the live model writes where a mode has none."""
        if not _is_written(dataset.config.mode):
            return list(dataset.samples)
        answers = written(self.model.module, dataset, self.batch_tokens, self.model.context, self.stop_tokens)
        return [Sample(own.prompt, text) for own, text in zip(dataset.samples, answers, strict=True)]


def written(
    module: Any, dataset: Dataset, batch_tokens: int, context: int, stop: Sequence[int]
) -> list[tuple[int, ...]]:
    """What a module writes, greedily, to a dataset's questions, at most `TEXT_TOKENS` of it; the token that ends a
    text is included."""
    prompts = [sample.prompt for sample in dataset.samples]
    longest = min(TEXT_TOKENS, dataset.config.max_new_tokens)
    found: dict[int, tuple[int, ...]] = {}
    for batch in make_batches([len(prompt) + longest for prompt in prompts], batch_tokens, overhead=batch_tokens):
        limits = [min(longest, context - len(prompts[at])) for at in batch]
        generated = generate(module, [prompts[at] for at in batch], limits, context, stop)
        for row, at in enumerate(batch):
            length = int(generated.lengths[row]) + int(generated.stopped[row])
            found[at] = tuple(generated.tokens[row, :length].tolist())
    return [found[at] for at in range(len(prompts))]


def _is_written(mode: str) -> bool:
    return mode in metrics.GENERATIVE


def n_predicted(sample: Sample) -> int:
    """The predicted tokens of a question: those of its answer, or the one that names an option."""
    return 1 if sample.options else len(sample.response)
