"""How a model's loss changes along given directions of its weights: what a search by gradient needs.

The loss of a question is the mean cross-entropy of its lesson's tokens (`lessons.py`), whatever its dataset's mode:
every mode that has an expected answer falls as that does. The slope along a direction D of a weight W is <dL/dW, D>
(Frobenius); along a row of it, that row's share of this. Weights' gradients exist a block at a time: what enters each
block is kept. Blocks whose activations find room keep them too; the others are computed again on the way back (Chen et
al., arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pad_sequence

from olmfast.evaluation.blocks import BlockwiseModel, Passing
from olmfast.evaluation.encoding import Sample, make_batches
from olmfast.evaluation.lessons import Lesson, n_predicted
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Direction, Slopes
from olmfast.weights.architecture import Architecture

DETERMINISTIC: Any = torch.utils.deterministic  # its attributes are unknown to type checkers
HEAD_ROWS = 256  # predicted tokens whose logits exist at a time


Questions = Sequence[tuple[str, Lesson, float]]  # dataset, what is taught, its share in the loss
Known = Callable[[int], torch.Tensor]  # a question's number -> what enters a block, (tokens, hidden)


def logits_blockwise(
    blockwise: BlockwiseModel, samples: Sequence[Sample], batch_tokens: int, sweep_bytes: int = 0
) -> Iterator[tuple[int, torch.Tensor]]:
    """The index of each question and the logits of its predicted tokens (tokens, vocabulary), in batches, of which as
    many go through the blocks together as `sweep_bytes` hold; at least one."""
    inputs = [sample.prompt + sample.response[:-1] for sample in samples]
    for sweep in _sweeps(blockwise, inputs, batch_tokens, sweep_bytes, n_kept=1):
        with torch.no_grad():
            passing = [Passing(blockwise.enter(blockwise.pad([inputs[index] for index in batch]))) for batch in sweep]
            blockwise.run_together(passing, 0, len(blockwise.blocks))
            for batch, one in zip(sweep, passing, strict=True):
                for row, index in enumerate(batch):
                    begin = len(samples[index].prompt) - 1
                    own = one.hidden[row, begin : begin + n_predicted(samples[index])]
                    yield index, blockwise.head.all_logits(own)


def _sweeps(
    blockwise: BlockwiseModel, inputs: Sequence[Sequence[int]], batch_tokens: int, sweep_bytes: int, n_kept: int
) -> Iterator[list[list[int]]]:
    """Batches of inputs, by their indices, as many at a time as `sweep_bytes` hold activations of at `n_kept` places
    between blocks; at least one."""
    sweep: list[list[int]] = []
    room = sweep_bytes
    # As few as there can be: for each batch all directions are read from the donors' files.
    for batch in make_batches([len(ids) for ids in inputs], batch_tokens, overhead=batch_tokens):
        n_tokens = len(batch) * blockwise.width([len(inputs[index]) for index in batch])
        n_bytes = (n_kept + 1) * n_tokens * blockwise.hidden_bytes
        if sweep and n_bytes > room:
            yield sweep
            sweep, room = [], sweep_bytes
        sweep.append(batch)
        room -= n_bytes
    if sweep:
        yield sweep


def logits_plain(model: WorkingModel, samples: Sequence[Sample]) -> Iterator[tuple[int, torch.Tensor]]:
    """The reference of `logits_blockwise`: the module's own forward, one question after another."""
    for index, sample in enumerate(samples):
        with torch.no_grad():
            yield index, _logits(model, sample)


def _logits(model: WorkingModel, sample: Sample) -> torch.Tensor:
    """The module's own logits of a question's predicted tokens, (tokens, vocabulary)."""
    ids = torch.tensor([sample.prompt + sample.response[:-1]], device=model.device)
    begin = len(sample.prompt) - 1
    logits: torch.Tensor = model.module(input_ids=ids, use_cache=False).logits[0, begin : begin + n_predicted(sample)]
    return logits


def slopes_blockwise(
    model: WorkingModel,
    blockwise: BlockwiseModel,
    questions: Questions,
    directions: Mapping[str, Sequence[Direction]],
    batch_tokens: int,
    known: Known | None = None,
    sweep_bytes: int = 0,
    graph_bytes: int = 0,
) -> Slopes:
    """The slopes of the live model along directions of its tensors, in batches of `batch_tokens`, of which as many go
    through the blocks together as `sweep_bytes` hold; at least one. Activations inside blocks are kept up to
    `graph_bytes`, if the blocks stay in memory.

    Nothing below the lowest block with a direction is gone back through; `known` says what enters that block.
    """
    found = _Collected(model, directions, questions)
    lowest = lowest_block(model.architecture, directions)
    first, n_blocks = lowest or 0, len(blockwise.blocks)
    inputs = [lesson.sample.prompt + lesson.sample.response[:-1] for _, lesson, _ in questions]
    with found.open(), _repeatable():
        for sweep in _sweeps(blockwise, inputs, batch_tokens, sweep_bytes, n_kept=n_blocks - first):
            ids = [blockwise.pad([inputs[index] for index in batch]) for batch in sweep]
            with torch.no_grad():
                for own in ids:
                    blockwise.calls(own.shape[1])
                if known is None:
                    passing = [Passing(blockwise.enter(own)) for own in ids]
                    blockwise.run_together(passing, 0, first)
                else:
                    passing = [Passing(blockwise.pad_hidden([known(index) for index in batch])) for batch in sweep]
            trail = _Trail(blockwise, graph_bytes if directions and blockwise.is_resident else 0)
            for block in range(first, n_blocks):
                trail.go(block, passing)
            gradients = [
                _through_head(blockwise, one.hidden, [questions[index] for index in batch], found)
                for batch, one in zip(sweep, passing, strict=True)
            ]
            if not directions:
                continue  # the losses alone were asked for
            for block in reversed(range(first, n_blocks)):
                with blockwise.visit(block, max(first, block - 1)):  # whose parameters a gradient needs, too
                    for at, (hidden, out) in enumerate(trail.back()):
                        out = blockwise.run(hidden, block, block + 1) if out is None else out
                        gradients[at] = _backward(out, gradients[at], hidden)
                        del out
                        found.take()
            if lowest is not None:
                continue
            for own, gradient in zip(ids, gradients, strict=True):
                entered = blockwise.enter(own)
                if entered.requires_grad:
                    _backward(entered, gradient)
                    found.take()
    return found.result()


class _Trail:
    """What entered each block on the way up, and for the first, as far as `n_bytes` go, all that leads from there
    to what left them."""

    def __init__(self, blockwise: BlockwiseModel, n_bytes: int) -> None:
        self.blockwise, self.room = blockwise, n_bytes
        self._largest = 0  # of the blocks so far
        self._steps: list[list[tuple[torch.Tensor, torch.Tensor | None]]] = []

    def go(self, block: int, passing: Sequence[Passing]) -> None:
        """Bring batches through a block."""
        entered = [one.hidden.detach().requires_grad_() for one in passing]
        if self.room <= self._largest:
            with torch.no_grad():
                self.blockwise.run_together(passing, block, block + 1)
            self._steps.append([(hidden, None) for hidden in entered])
            return
        held = _Held(self.blockwise.blocks[block].parameters())
        leaving: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        with self.blockwise.visit(block), saved_tensors_hooks(held.note, held.give):
            for one, hidden in zip(passing, entered, strict=True):
                out = self.blockwise.run(hidden, block, block + 1)
                leaving.append((hidden, out))
                one.hidden = out.detach()
        self._steps.append(leaving)
        self._largest = max(self._largest, held.n_bytes)
        self.room -= held.n_bytes

    def back(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """What entered the highest block that is left, by batch, and what left it if that can be gone back from."""
        return self._steps.pop()


class _Held:
    """Counts the bytes that gradients hold, without those of parameters."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.n_bytes = 0

    def note(self, saved: torch.Tensor) -> torch.Tensor:
        """Called for each tensor that is held."""
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.n_bytes += storage.nbytes()
        return saved

    def give(self, saved: torch.Tensor) -> torch.Tensor:
        """Called for each tensor that is needed again."""
        return saved


def lowest_block(architecture: Architecture, tensors: Iterable[str]) -> int | None:
    """The lowest block that any of these tensors lies in; None where one lies in none, or there are none."""
    blocks = [architecture.block_of(name) for name in tensors]
    return min((block for block in blocks if block is not None), default=None) if None not in blocks else None


def slopes_plain(model: WorkingModel, questions: Questions, directions: Mapping[str, Sequence[Direction]]) -> Slopes:
    """The reference of `slopes_blockwise`: the module's own forward, one question after another."""
    found = _Collected(model, directions, questions)
    with found.open():
        for name, lesson, weight in questions:
            loss = _losses(_logits(model, lesson.sample), [(lesson, at) for at in range(lesson.n)]).mean()
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
        kind: Any = {"dtype": torch.float64, "device": model.device}
        self.along = {name: torch.zeros(len(own), *self._rows(name, own), **kind) for name, own in directions.items()}
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
                    product = gradient.to(wide) * difference
                    others = [d for d in range(product.dim()) if direction.axis is not None and d != direction.axis]
                    self.along[name][i] += product.sum(others or None, dtype=torch.float64)
            parameter.grad = None

    def _rows(self, name: str, directions: Sequence[Direction]) -> tuple[int, ...]:
        axes = {direction.axis for direction in directions}
        return tuple(self.model.live(name).shape[axis] for axis in axes if axis is not None)

    def add_loss(self, dataset: str, loss: float) -> None:
        """Enter the loss of a question."""
        self.losses[dataset].append(loss)

    def result(self) -> Slopes:
        """What has been collected."""
        along = {name: own.cpu() for name, own in self.along.items()}
        return Slopes({name: sum(own) / len(own) for name, own in self.losses.items() if own}, along)


def _through_head(
    blockwise: BlockwiseModel, hidden: torch.Tensor, questions: Questions, found: _Collected
) -> torch.Tensor:
    """The loss's gradient by what leaves the last block, (batch, width, hidden)."""
    hidden = hidden.detach()
    gradient = torch.zeros_like(hidden)
    predicted = [(lesson, at) for _, lesson, _ in questions for at in range(lesson.n)]
    places = [
        (row, len(lesson.sample.prompt) - 1 + at)
        for row, (_, lesson, _) in enumerate(questions)
        for at in range(lesson.n)
    ]
    rows, columns = torch.tensor(places, device=hidden.device).T
    shares = torch.tensor(
        [weight / lesson.n for _, lesson, weight in questions for _ in range(lesson.n)], dtype=torch.float64
    )
    lost: list[torch.Tensor] = []
    for begin in range(0, len(places), HEAD_ROWS):
        own = slice(begin, begin + HEAD_ROWS)
        taken = hidden[rows[own], columns[own]].requires_grad_()
        losses = _losses(blockwise.head.all_logits(taken), predicted[own])
        gradient[rows[own], columns[own]] = _backward((losses * shares[own].to(losses)).sum(), None, taken)
        found.take()
        lost.append(losses.detach())
    sums = [0.0] * len(questions)
    for (row, _), (lesson, _), loss in zip(places, predicted, torch.cat(lost).tolist(), strict=True):
        sums[row] += loss / lesson.n
    for row, (name, _, _) in enumerate(questions):
        found.add_loss(name, sums[row])
    return gradient


def _backward(out: torch.Tensor, gradient: torch.Tensor | None = None, of: torch.Tensor | None = None) -> torch.Tensor:
    """Go back from `out`; returns the gradient by `of`, where that is a leaf."""
    out.backward(gradient)  # type: ignore[no-untyped-call]
    return out.new_zeros(()) if of is None or of.grad is None else of.grad


def _losses(logits: torch.Tensor, predicted: Sequence[tuple[Lesson, int]]) -> torch.Tensor:
    """Cross-entropy of predicted tokens (lesson, place in its answer), one per row of logits (tokens, vocabulary);
    that of a multiple choice among its options alone."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    choices = [row for row, (lesson, _) in enumerate(predicted) if lesson.sample.options]
    if choices:
        left_out = torch.zeros(logits.shape, dtype=torch.bool)
        left_out[choices] = True
        for row in choices:
            left_out[row, list(predicted[row][0].sample.options)] = False
        logits = logits.masked_fill(left_out.to(logits.device), -torch.inf)
    # A lesson has as many tokens as its kind: what shorter ones lack has no share.
    tokens = pad_sequence([lesson.tokens[at] for lesson, at in predicted], batch_first=True)
    shares = pad_sequence([lesson.shares[at] for lesson, at in predicted], batch_first=True)
    chosen = logits.gather(1, tokens.to(logits.device)) - logits.logsumexp(dim=1, keepdim=True)
    shares = shares.to(chosen)
    return -(shares * chosen.masked_fill(shares == 0, 0)).sum(dim=1)


@contextmanager
def _repeatable() -> Iterator[None]:
    """The same gradients at every run: a GPU's attention adds them up in any order otherwise."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = DETERMINISTIC.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every new tensor would be filled with NaN first: half the time of a gradient on a CPU.
    DETERMINISTIC.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        DETERMINISTIC.fill_uninitialized_memory = filling
