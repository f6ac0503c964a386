"""The plain reference of every Scorer: candidate by candidate, every dataset in full, batched over samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.encoding import Dataset, Sample, make_batches
from olmfast.evaluation.generation import generate
from olmfast.evaluation.lessons import Lessons
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate, Direction, Slopes
from olmfast.evaluation.scores import Answer, Scores, picked, wanted_samples
from olmfast.evaluation.slopes import logits_plain, slopes_plain
from olmfast.weights.architecture import Unit
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression


class SequentialScorer:
    """One candidate after another, in place on the working model, which is left as it was."""

    def __init__(
        self,
        model: WorkingModel,
        datasets: Mapping[str, Dataset],
        tokenizer: Any,
        stop_tokens: Sequence[int],
        batch_tokens: int,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.datasets, self.tokenizer = model, datasets, tokenizer
        self.sizes = {name: len(dataset.samples) for name, dataset in datasets.items()}
        self.stop_tokens, self.batch_tokens, self.progress = tuple(stop_tokens), batch_tokens, progress
        self.state: Mapping[str, Any] = {}
        self.lessons = Lessons(model, datasets, batch_tokens, self.stop_tokens, partial(logits_plain, model))

    def score(
        self,
        unit: Unit,  # noqa: ARG002 (the reference evaluates whole models)
        candidates: Sequence[Candidate],
        datasets: Sequence[str] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
    ) -> Scores:
        """See `Scorer.score`. Samples not asked for are NaN and marked as not evaluated."""
        wanted = wanted_samples(self.datasets, datasets, samples)
        result = Scores.empty(len(candidates), {name: self.datasets[name] for name in wanted}, self.model.dtype)
        for row, candidate in enumerate(candidates):
            with self.model.trial(candidate):
                if row + 1 < len(candidates):
                    self.model.sources.prefetch(candidates[row + 1].values.values())
                for name, indices in wanted.items():
                    if not indices:
                        continue
                    answers = self._score_dataset(self.datasets[name], indices)
                    for index, answer in zip(indices, answers, strict=True):
                        result.set(row, name, index, answer)
            self.progress(candidate.label)
        return result

    def slopes(
        self,
        candidate: Candidate,
        directions: Mapping[str, Sequence[Direction]],
        samples: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        teachers: Mapping[str, Candidate],
    ) -> Slopes:
        """See `Scorer.slopes`."""
        questions = self.lessons.of(samples, weights, teachers)
        with self.model.trial(candidate):
            return slopes_plain(self.model, questions, directions)

    def value(self, expression: Expression) -> torch.Tensor:
        """See `Scorer.value`."""
        return self.model.sources.value(expression)

    def commit(self, recipe: Recipe, label: str | None = None) -> None:  # noqa: ARG002
        """See `Scorer.commit`. Nothing is kept from one step to the next here."""
        self.model.set_recipe(recipe)

    def _score_dataset(self, dataset: Dataset, wanted: list[int]) -> list[Answer]:
        samples = [dataset.samples[index] for index in wanted]
        mode = dataset.config.mode
        if mode in metrics.GENERATIVE:
            return self._generate(dataset, samples)
        if mode == "exact_match":
            return self._exact_match(dataset, samples)
        return self._teacher_forced(mode, samples)

    @torch.inference_mode()
    def _teacher_forced(self, mode: str, samples: list[Sample]) -> list[Answer]:
        """Right-padded: padding comes after every scored token and so cannot reach it (causal attention)."""
        found: dict[int, Answer] = {}
        inputs = [sample.prompt + sample.response[:-1] for sample in samples]
        for batch in make_batches([len(ids) for ids in inputs], self.batch_tokens):
            width = len(inputs[batch[0]])
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, : len(inputs[index])] = torch.tensor(inputs[index])
            logits = self.model.module(input_ids=ids.to(self.model.device), use_cache=False).logits
            for row, index in enumerate(batch):
                sample = samples[index]
                rows = logits[row, len(sample.prompt) - 1 : len(inputs[index])]
                found[index] = _score_response(mode, rows, sample)
        return [found[index] for index in range(len(samples))]

    def _exact_match(self, dataset: Dataset, samples: list[Sample]) -> list[Answer]:
        found: dict[int, Answer] = {}
        lengths = [len(sample.prompt) + len(sample.response) for sample in samples]
        for batch in make_batches(lengths, self.batch_tokens, overhead=self.batch_tokens):
            chosen = [samples[index] for index in batch]
            limits = [len(s.response) for s in chosen]
            generated = generate(self.model.module, [s.prompt for s in chosen], limits, self.model.context)
            tokens, max_prob = generated.tokens.cpu(), generated.max_prob.cpu()
            for row, (index, sample) in enumerate(zip(batch, chosen, strict=True)):
                n = len(sample.response)
                right = tokens[row, :n] == torch.tensor(sample.response)
                score = metrics.exact_match(max_prob[row, :n], right, dataset.config.strict)
                found[index] = Answer(score, bool(right.all()))
        return [found[index] for index in range(len(samples))]

    def _generate(self, dataset: Dataset, samples: list[Sample]) -> list[Answer]:
        """A generation that reaches `max_new_tokens`, or the model's context, is counted as truncated."""
        found: dict[int, Answer] = {}
        formula = metrics.GENERATIVE[dataset.config.mode]
        longest = dataset.config.max_new_tokens
        lengths = [len(sample.prompt) + longest for sample in samples]
        for batch in make_batches(lengths, self.batch_tokens, overhead=self.batch_tokens):
            prompts = [samples[index].prompt for index in batch]
            limits = [min(longest, self.model.context - len(prompt)) for prompt in prompts]
            generated = generate(self.model.module, prompts, limits, self.model.context, self.stop_tokens)
            for row, index in enumerate(batch):
                length = int(generated.lengths[row])
                text = self.tokenizer.decode(generated.tokens[row, :length].tolist(), skip_special_tokens=True)
                failed = bool(generated.max_prob[row, : length + 1].isnan().any())
                score = torch.nan if failed else formula(text, dataset.config.forbid)
                found[index] = Answer(score, truncated=not bool(generated.stopped[row]))
        return [found[index] for index in range(len(samples))]


def _score_response(mode: str, logits: torch.Tensor, sample: Sample) -> Answer:
    if mode in metrics.CHOICES:
        options = torch.tensor(sample.options, device=logits.device)
        return picked(mode, logits[0, options], sample)
    found = metrics.response_logits(logits, torch.tensor(sample.response, device=logits.device))
    return Answer(metrics.TEACHER_FORCED[mode](found), bool(found.is_top.all()))
