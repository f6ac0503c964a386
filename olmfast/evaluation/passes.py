"""Forward passes of several candidates on a batch of tasks: what one pass tells is scored, the rest decoded on.

On a GPU the next passes are queued before the host reads what the last ones found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.blocks import BlockwiseModel, Needed, Passing, Recorder
from olmfast.evaluation.cache import Kept
from olmfast.evaluation.cohort import Cohort, Statistics
from olmfast.evaluation.decoding import Rollout
from olmfast.evaluation.encoding import make_batches
from olmfast.evaluation.memory import Memory, Shares, is_out_of_memory
from olmfast.evaluation.suffix import Suffix
from olmfast.evaluation.tasks import OwnTokens, Task
from olmfast.evaluation.trajectories import Trajectories
from olmfast.evaluation.transit import Fetched, sent

# Device type -> passes that may be queued on it and not read yet. Their keys and values are kept until they are.
PASSES_AHEAD = {"cuda": 1}
MEASURED_TOKENS = 512  # in the pass whose memory is measured


@dataclass
class _Batch:
    """A batch of tasks that candidates (places in the cohort) are still to go through, and what is left to decode of
    those that have."""

    places: list[int]
    numbers: list[int]
    rollouts: list[Rollout] = field(default_factory=list)
    suffix: Suffix | None = None


@dataclass
class _Found:
    """What a pass of some candidates (places) has computed, on its way to the host."""

    batch: _Batch
    places: list[int]
    suffix: Suffix
    recorder: Recorder | None
    choices: Fetched  # per task that is a choice: its options' logits, (K, options)
    tokens: Fetched | None  # of all labels of the others: TokenScores, (K, labels) each


class Passes:
    """Runs a cohort's candidates on tasks, given by their numbers, over the blocks that differ."""

    def __init__(
        self, blockwise: BlockwiseModel, trajectories: Trajectories, shares: Shares, statistics: Statistics
    ) -> None:
        self.blockwise, self.trajectories = blockwise, trajectories
        self.shares, self.statistics = shares, statistics

    def measure(self, memory: Memory) -> tuple[int, int]:
        """The bytes that a small pass over all blocks takes, and its tokens."""
        blockwise, tasks = self.blockwise, self.trajectories.tasks
        shortest = min(range(len(tasks)), key=lambda number: len(tasks[number].ids))
        rows = -(-min(self.shares.pass_tokens, MEASURED_TOKENS) // len(tasks[shortest].ids))
        ids = blockwise.pad([tasks[shortest].ids] * rows)
        blockwise.calls(ids.shape[1])
        needed = self._needed([shortest] * rows)
        taken = memory.taken_by(
            lambda: blockwise.run(blockwise.enter(ids), 0, len(blockwise.blocks), Recorder(), needed)
        )
        return taken, ids.numel()

    def entering(self, first: int | None, numbers: Sequence[int]) -> torch.Tensor:
        """What enters block `first`, (tasks, width, hidden), once the prefix is there; None: the first of all."""
        tasks = [self.trajectories.tasks[number] for number in numbers]
        if first is None:
            return self.blockwise.enter(self.blockwise.pad([task.ids for task in tasks]))
        places = [self.trajectories.place_of(number) for number in numbers]
        kept = [(batch.hidden[first][row], len(task.ids)) for (batch, row), task in zip(places, tasks, strict=True)]
        return self.blockwise.pad_hidden([hidden[:length] for hidden, length in kept])

    def run(
        self, cohort: Cohort, part: Sequence[Sequence[int]], let_go: Callable[[], bool] = lambda: False
    ) -> Iterator[list[Rollout]]:
        """Score a cohort's candidates on batches of tasks; yields for each what is to be decoded on.

        As many passes go through the blocks together as `sweep_bytes` hold: one, where nothing has to be fetched. What
        does not fit the memory, nor what `let_go` gives back (if it does), is halved, and goes on.
        """
        waiting = [_Batch(list(range(len(cohort.rows))), list(numbers)) for numbers in part]
        unread: deque[_Found] = deque()
        ahead = PASSES_AHEAD.get(self.blockwise.device.type, 0)
        while waiting:
            planned, fits, gave = self._planned(cohort.first or 0, waiting), True, False
            try:
                self._sweep(cohort, planned, unread)
                while unread and (len(unread) > ahead or not planned):
                    self._read(cohort, unread[0])
                    unread.popleft()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                for found in reversed(unread):  # they are done again
                    found.batch.places[:0] = found.places
                unread.clear()
                left = next(batch for batch in waiting if batch.places)
                gave = let_go()
                if not gave and not ahead and len(planned) <= 1 and len(left.places) == len(left.numbers) == 1:
                    raise
                fits = False
            while waiting and not waiting[0].places and not any(found.batch is waiting[0] for found in unread):
                yield waiting.pop(0).rollouts
            if not fits:  # out of the handler, whose traceback holds what has been computed
                self.statistics.splits += 1
                for batch in waiting:
                    batch.suffix = None
                if gave:
                    continue
                if not ahead:
                    self._halve(waiting, len(planned))
                ahead = 0  # what was kept unread may have been too much

    def _planned(self, first: int, waiting: Sequence[_Batch]) -> list[tuple[_Batch, list[int]]]:
        """The passes that go through the blocks next: a batch each, and candidates."""
        planned: list[tuple[_Batch, list[int]]] = []
        room, share_above = self.shares.sweep_bytes, 1 - first / len(self.blockwise.blocks)
        for batch in waiting:
            tasks = [self.trajectories.tasks[number] for number in batch.numbers]
            n_tokens = len(tasks) * self.blockwise.width([len(task.ids) for task in tasks])
            of_token = 2.0 * self.blockwise.hidden_bytes
            if any(task.runs_freely for task in tasks):
                of_token += share_above * self.blockwise.state_bytes
            per_pass = max(1, self.shares.pass_tokens // n_tokens)
            for begin in range(0, len(batch.places), per_pass):
                chosen = batch.places[begin : begin + per_pass]
                room -= int(len(chosen) * n_tokens * of_token)
                if planned and room < 0:
                    return planned
                planned.append((batch, chosen))
        return planned

    def _sweep(self, cohort: Cohort, planned: Sequence[tuple[_Batch, list[int]]], unread: deque[_Found]) -> None:
        """Passes of some candidates on a batch each, all of them through one block before the next."""
        if not planned:
            return
        passes: list[tuple[_Batch, list[int], Suffix, Passing]] = []
        first = cohort.first or 0
        with self.blockwise.visit(first):
            for batch, places in planned:
                suffix = batch.suffix
                if suffix is None:
                    hidden = self.entering(cohort.first, batch.numbers)
                    suffix = Suffix(self.blockwise, first, hidden, cohort.leaves, self._needed(batch.numbers))
                    batch.suffix = suffix
                free = any(self.trajectories.tasks[number].runs_freely for number in batch.numbers)
                passes.append((batch, places, suffix, suffix.begin(places, Recorder() if free else None)))
                if places[-1] == batch.places[-1]:
                    suffix.forget()
        self.blockwise.run_together([passing for *_, passing in passes], first + 1, len(self.blockwise.blocks))
        while passes:
            batch, places, suffix, passing = passes.pop(0)
            unread.append(self._found(batch, places, suffix, passing))
            batch.places = batch.places[len(places) :]

    def _halve(self, waiting: list[_Batch], n_passes: int) -> None:
        """What the passes together took did not fit; nor, where there was but one, what that took."""
        if n_passes > 1:
            self.shares.halve_sweeps()
            return
        self.shares.halve_passes()
        batch = waiting.pop(0)
        middle = len(batch.places) // 2 or len(batch.numbers) // 2
        if len(batch.places) > 1:
            halves = [(batch.places[:middle], batch.numbers), (batch.places[middle:], batch.numbers)]
        else:
            halves = [(batch.places, batch.numbers[:middle]), (batch.places, batch.numbers[middle:])]
        waiting[:0] = [_Batch(places, numbers) for places, numbers in halves]
        waiting[0].rollouts += batch.rollouts

    def _found(self, batch: _Batch, places: list[int], suffix: Suffix, passing: Passing) -> _Found:
        """Have computed and sent to the host what a pass of some candidates tells."""
        tasks, k = [self.trajectories.tasks[number] for number in batch.numbers], len(places)
        hidden = passing.hidden
        n_blocks = len(self.blockwise.blocks) - suffix.first
        self.statistics.passes += 1
        self.statistics.tokens += k * n_blocks * sum(len(task.ids) for task in tasks)
        self.statistics.padded += n_blocks * hidden.shape[:2].numel()
        taken = suffix.needed.of(hidden)
        needed = torch.split(taken.view(k, -1, taken.shape[-1]), [len(task.labels) for task in tasks], dim=1)
        choices = [
            self.blockwise.head.logits(at_labels[:, 0], sent(task.sample.options, hidden.device))
            for task, at_labels in zip(tasks, needed, strict=True)
            if task.sample.options
        ]
        others = [(task, at_labels) for task, at_labels in zip(tasks, needed, strict=True) if not task.sample.options]
        tokens = None
        if others:
            labels = sent([label for task, _ in others for label in task.labels], hidden.device)
            flat = torch.cat([at_labels for _, at_labels in others], dim=1).flatten(0, 1)
            tokens = Fetched([part.view(k, -1) for part in self.blockwise.head.token_scores(flat, labels.repeat(k))])
        return _Found(batch, places, suffix, passing.recorder, Fetched(choices), tokens)

    def _read(self, cohort: Cohort, found: _Found) -> None:
        """Score what a pass tells; what it does not is the batch's to decode."""
        numbers, places, suffix = found.batch.numbers, found.places, found.suffix
        tasks = [self.trajectories.tasks[number] for number in numbers]
        for task, of_options in zip([task for task in tasks if task.sample.options], found.choices.wait(), strict=True):
            for i, place in enumerate(places):
                cohort.scores.set(cohort.rows[place], task.name, task.index, task.choice(of_options[i]))
        left: list[tuple[int, int, OwnTokens]] = []  # places among the candidates and the tasks, and what is followed
        for at, logits, argmax in _by_task(tasks, found.tokens):
            task, number = tasks[at], numbers[at]
            for i, place in enumerate(places):
                of_one = metrics.ResponseLogits(*(part[i] for part in logits))
                if not task.runs_freely:
                    cohort.scores.set(cohort.rows[place], task.name, task.index, task.teacher_forced(of_one, argmax[i]))
                    continue
                own = task.follow(argmax[i], of_one.max_prob)
                if task.is_over(own, self.trajectories.stop_tokens):
                    self.trajectories.finish(cohort, place, number, own)
                else:
                    left.append((i, at, own))
        if found.recorder is None or not left:
            return
        self._find_states_below([numbers[at] for _, at, _ in left], suffix)
        rollouts: list[Rollout] = []
        for i, at, own in left:
            task, number = tasks[at], numbers[at]
            n_states = len(task.sample.prompt) + len(own.tokens) - 1  # of all tokens but the last
            states, limit = list(suffix.states_below[number]), task.limit - len(own.tokens)
            rollouts.append(Rollout(places[i], number, own, states, n_states, limit))
        self._take_along(rollouts, [i * len(tasks) + at for i, at, _ in left], found.recorder, suffix.first)
        found.batch.rollouts += rollouts

    def _needed(self, numbers: Sequence[int]) -> Needed:
        """The positions that predict the tasks' labels, task by task."""
        tasks, device = [self.trajectories.tasks[number] for number in numbers], self.blockwise.device
        rows = [torch.full((len(task.labels),), row) for row, task in enumerate(tasks)]
        columns = [torch.arange(len(task.labels)) + len(task.sample.prompt) - 1 for task in tasks]
        return Needed(len(tasks), sent(torch.cat(rows), device), sent(torch.cat(columns), device))

    def _take_along(self, rollouts: Sequence[Rollout], rows: Sequence[int], recorder: Recorder, first: int) -> None:
        """Keep the keys and values of these rows of a pass, from block `first` on, and let the others go."""
        width = max(one.n_states for one in rollouts)
        chosen = sent(rows, self.blockwise.device)
        for block in range(first, len(self.blockwise.blocks)):
            keys, values = recorder.states[block]
            at = chosen % len(keys)  # what all candidates share is recorded once
            keys, values = (part[:, :, :width].index_select(0, at) for part in (keys, values))
            for row, one in enumerate(rollouts):
                one.states.append(Kept(keys, values, row))

    def _find_states_below(self, numbers: Sequence[int], suffix: Suffix) -> None:
        """Have the suffix know these tasks' keys and values in the blocks below it: kept, or computed once more, for as
        many tasks at a time as a pass may have."""
        missing: list[int] = []
        for number in dict.fromkeys(numbers):
            if number in suffix.states_below:
                continue
            batch, row = self.trajectories.place_of(number)
            if len(batch.states) >= suffix.first:
                of_batch = batch.states[: suffix.first]
                suffix.states_below[number] = [Kept(keys, values, row) for keys, values in of_batch]
            else:
                missing.append(number)
        lengths = [len(self.trajectories.tasks[number].ids) for number in missing]
        for rows in make_batches(lengths, self.shares.pass_tokens, self.shares.pass_overhead):
            recorder, below = Recorder(), [missing[row] for row in rows]
            ids = self.blockwise.pad([self.trajectories.tasks[number].ids for number in below])
            self.blockwise.run(self.blockwise.enter(ids), 0, suffix.first, recorder)
            of_blocks = [recorder.states[block] for block in sorted(recorder.states)]
            for row, number in enumerate(below):
                suffix.states_below[number] = [Kept(keys, values, row) for keys, values in of_blocks]


def _by_task(
    tasks: Sequence[Task], found: Fetched | None
) -> Iterator[tuple[int, metrics.ResponseLogits, torch.Tensor]]:
    """Per task that is no choice: its place, its logits and the argmax at its labels, (K, labels)."""
    if found is None:
        return
    places = [at for at, task in enumerate(tasks) if not task.sample.options]
    parts = [torch.split(part, [len(tasks[at].labels) for at in places], dim=1) for part in found.wait()]
    for at, max_logit, argmax, logsumexp, label_logit in zip(places, *parts, strict=True):
        yield at, metrics.ResponseLogits(max_logit, label_logit, logsumexp), argmax
