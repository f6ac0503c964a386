"""How a model's loss changes along given directions of its weights: what a search by gradient needs.

The loss of a question is the mean cross-entropy of its expected answer's tokens (of the options' letters for a
multiple choice), whatever its dataset's mode: every mode that has an expected answer falls as that does. Where there is
none, a text that a good model wrote takes its place (distillation, Kim and Rush, arXiv 1606.07947). The slope
along a direction D of a weight W is <dL/dW, D> (Frobenius). Weights' gradients exist a block at a time: what enters
each block is kept, and each block is computed again on the way back (Chen et al., arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.encoding import Dataset, Sample, make_batches
from olmfast.evaluation.generation import generate
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Direction, Slopes, Texts

TEXT_TOKENS = 128  # of a text that takes the place of an expected answer
HEAD_ROWS = 256  # predicted tokens whose logits exist at a time


Questions = Sequence[tuple[str, Sample, float]]  # dataset, question, its share in the loss


def needs_texts(mode: str) -> bool:
    """Whether a dataset's mode has no expected answers."""
    return mode in metrics.GENERATIVE


def chosen_questions(
    datasets: Mapping[str, Dataset],
    samples: Mapping[str, Sequence[int]],
    weights: Mapping[str, float],
    texts: Texts,
) -> list[tuple[str, Sample, float]]:
    """The questions that a loss is taken over: each dataset's mean, by its weight. `texts` replace answers."""

    def sample(name: str, index: int) -> Sample:
        own = datasets[name].samples[index]
        return own if name not in texts else Sample(own.prompt, texts[name][index])

    return [
        (name, sample(name, index), weights[name] / len(indices))
        for name, indices in samples.items()
        for index in indices
    ]


def written(
    module: Any,
    chosen: Mapping[str, tuple[Dataset, Sequence[int]]],
    batch_tokens: int,
    context: int,
    stop: Sequence[int],
) -> dict[str, dict[int, tuple[int, ...]]]:
    """What a module writes, greedily, to samples (indices) of datasets, at most `TEXT_TOKENS` of it."""
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, (dataset, indices) in chosen.items():
        own = found[name] = {}
        prompts = [dataset.samples[index].prompt for index in indices]
        longest = min(TEXT_TOKENS, dataset.config.max_new_tokens)
        for batch in make_batches([len(prompt) + longest for prompt in prompts], batch_tokens):
            limits = [min(longest, context - len(prompts[at])) for at in batch]
            generated = generate(module, [prompts[at] for at in batch], limits, context, stop)
            for row, at in enumerate(batch):
                length = int(generated.lengths[row]) + int(generated.stopped[row])
                own[indices[at]] = tuple(generated.tokens[row, :length].tolist())
    return found


def slopes_blockwise(
    model: WorkingModel,
    blockwise: BlockwiseModel,
    questions: Questions,
    directions: Mapping[str, Sequence[Direction]],
    batch_tokens: int,
) -> Slopes:
    """The slopes of the live model along directions of its tensors, in batches of `batch_tokens`."""
    found = _Collected(model, directions, questions)
    inputs = [sample.prompt + sample.response[:-1] for _, sample, _ in questions]
    with found.open(), _repeatable():
        for batch in make_batches([len(ids) for ids in inputs], batch_tokens):
            ids = blockwise.pad([inputs[index] for index in batch])
            entering = []
            with torch.no_grad():
                blockwise.calls(ids.shape[1])
                hidden = blockwise.enter(ids)
                for block in range(len(blockwise.blocks)):
                    entering.append(hidden)
                    hidden = blockwise.run(hidden, block, block + 1)
            gradient = _through_head(blockwise, hidden, [questions[index] for index in batch], found)
            if not directions:
                continue  # the losses alone were asked for
            for block in reversed(range(len(blockwise.blocks))):
                hidden = entering.pop().detach().requires_grad_()
                gradient = _backward(blockwise.run(hidden, block, block + 1), gradient, hidden)
                found.take()
            entered = blockwise.enter(ids)
            if entered.requires_grad:
                _backward(entered, gradient)
                found.take()
    return found.result()


def slopes_plain(model: WorkingModel, questions: Questions, directions: Mapping[str, Sequence[Direction]]) -> Slopes:
    """The reference of `slopes_blockwise`: the module's own forward, one question after another."""
    found = _Collected(model, directions, questions)
    with found.open():
        for name, sample, weight in questions:
            ids = torch.tensor([sample.prompt + sample.response[:-1]], device=model.device)
            logits = model.module(input_ids=ids, use_cache=False).logits[0, len(sample.prompt) - 1 :]
            loss = _losses(logits[: _n(sample)], [(sample, at) for at in range(_n(sample))]).mean()
            if directions:
                _backward(loss * weight)
            found.add_loss(name, float(loss.detach()))
            found.take()
    return found.result()


class _Collected:
    """Losses, and the slopes that gradients add up to; a gradient is let go as soon as it has been taken."""

    def __init__(
        self, model: WorkingModel, directions: Mapping[str, Sequence[Direction]], questions: Questions
    ) -> None:
        self.model, self.directions = model, directions
        self.along = {name: torch.zeros(len(own), dtype=torch.float64) for name, own in directions.items()}
        self.losses: dict[str, list[float]] = {name: [] for name, _, _ in questions}
        self._named = model.parameters_of(directions)

    @contextmanager
    def open(self) -> Iterator[None]:
        """While the parameters with directions have gradients."""
        parameters = [parameter for parameter, _ in self._named]
        try:
            for parameter in parameters:
                parameter.requires_grad_()
            with torch.enable_grad():
                yield
        finally:
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(False)

    def take(self) -> None:
        """Add the slopes of the gradients that there are."""
        for parameter, tensors in self._named:
            if parameter.grad is None:
                continue
            for name, view in tensors:
                gradient = view(parameter.grad)
                wide = torch.promote_types(gradient.dtype, torch.float32)
                for i, direction in enumerate(self.directions[name]):
                    difference = self.model.difference(direction.begin, direction.end, wide)
                    self.along[name][i] += float((gradient.to(wide) * difference).sum(dtype=torch.float64))
            parameter.grad = None

    def add_loss(self, dataset: str, loss: float) -> None:
        """Enter the loss of a question."""
        self.losses[dataset].append(loss)

    def result(self) -> Slopes:
        """What has been collected."""
        return Slopes({name: sum(own) / len(own) for name, own in self.losses.items() if own}, self.along)


def _through_head(
    blockwise: BlockwiseModel, hidden: torch.Tensor, questions: Questions, found: _Collected
) -> torch.Tensor:
    """The loss's gradient by what leaves the last block, (batch, width, hidden)."""
    hidden = hidden.detach()
    gradient = torch.zeros_like(hidden)
    places = [
        (row, len(sample.prompt) - 1 + at) for row, (_, sample, _) in enumerate(questions) for at in range(_n(sample))
    ]
    rows, columns = torch.tensor(places, device=hidden.device).T
    predicted = [(sample, at) for _, sample, _ in questions for at in range(_n(sample))]
    shares = torch.tensor(
        [weight / _n(sample) for _, sample, weight in questions for _ in range(_n(sample))],
        dtype=torch.float64,
    )
    sums = [0.0] * len(questions)
    for begin in range(0, len(places), HEAD_ROWS):
        own = slice(begin, begin + HEAD_ROWS)
        taken = hidden[rows[own], columns[own]].requires_grad_()
        losses = _losses(blockwise.head.all_logits(taken), predicted[own])
        gradient[rows[own], columns[own]] = _backward((losses * shares[own].to(losses)).sum(), None, taken)
        found.take()
        for (row, _), (sample, _), loss in zip(places[own], predicted[own], losses.detach().tolist(), strict=True):
            sums[row] += loss / _n(sample)
    for row, (name, _, _) in enumerate(questions):
        found.add_loss(name, sums[row])
    return gradient


def _backward(out: torch.Tensor, gradient: torch.Tensor | None = None, of: torch.Tensor | None = None) -> torch.Tensor:
    """Go back from `out`; returns the gradient by `of`, where that is a leaf."""
    out.backward(gradient)  # type: ignore[no-untyped-call]
    return out.new_zeros(()) if of is None or of.grad is None else of.grad


def _n(sample: Sample) -> int:
    """The predicted tokens of a question: those of its answer, or the one that names an option."""
    return 1 if sample.options else len(sample.response)


def _losses(logits: torch.Tensor, predicted: Sequence[tuple[Sample, int]]) -> torch.Tensor:
    """Cross-entropy of predicted tokens (question, place in its answer), one per row of logits (tokens, vocabulary);
    that of a multiple choice among its options alone."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    choices = [row for row, (sample, _) in enumerate(predicted) if sample.options]
    if choices:
        left_out = torch.zeros(logits.shape, dtype=torch.bool)
        left_out[choices] = True
        for row in choices:
            left_out[row, list(predicted[row][0].options)] = False
        logits = logits.masked_fill(left_out.to(logits.device), -torch.inf)
    labels = torch.tensor([sample.response[at] for sample, at in predicted], device=logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@contextmanager
def _repeatable() -> Iterator[None]:
    """The same gradients at every run: a GPU's attention adds them up in any order otherwise."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every new tensor would be filled with NaN first: half the time of a gradient on a CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling
