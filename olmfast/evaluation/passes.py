"""Forward passes of several candidates on a batch of tasks: what one pass tells is scored, the rest decoded on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.blocks import BlockwiseModel, Needed, Recorder
from olmfast.evaluation.cache import Kept
from olmfast.evaluation.cohort import Cohort, Statistics
from olmfast.evaluation.generation import Rollout
from olmfast.evaluation.memory import Memory, Shares, is_out_of_memory
from olmfast.evaluation.suffix import Suffix
from olmfast.evaluation.tasks import Task
from olmfast.evaluation.trajectories import Trajectories

MEASURED_TOKENS = 512  # in the pass whose memory is measured


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

    def run(self, cohort: Cohort, places: Sequence[int], numbers: list[int]) -> list[Rollout]:
        """Score candidates (places in the cohort) on a batch of tasks; returns what is to be decoded on.

        What does not fit the memory is halved, and goes on.
        """
        rollouts: list[Rollout] = []
        done = 0
        try:
            hidden = self.entering(cohort.first, numbers)
            suffix = Suffix(self.blockwise, cohort.first or 0, hidden, cohort.leaves, self._needed(numbers))
            per_pass = max(1, self.shares.pass_tokens // hidden.shape[:2].numel())
            while done < len(places):
                rollouts += self._pass(cohort, list(places[done : done + per_pass]), numbers, suffix)
                done += per_pass
            return rollouts
        except (RuntimeError, MemoryError) as error:
            left = places[done:]
            if not is_out_of_memory(error) or (len(left) == len(numbers) == 1):
                raise
        self.statistics.splits += 1
        self.shares.halve_passes()
        if len(left) > 1:
            halves = [(left[: len(left) // 2], numbers), (left[len(left) // 2 :], numbers)]
        else:
            halves = [(left, numbers[: len(numbers) // 2]), (left, numbers[len(numbers) // 2 :])]
        return rollouts + [one for places, tasks in halves for one in self.run(cohort, places, tasks)]

    def _pass(self, cohort: Cohort, places: list[int], numbers: list[int], suffix: Suffix) -> list[Rollout]:
        """One forward pass of some candidates."""
        tasks, k = [self.trajectories.tasks[number] for number in numbers], len(places)
        recorder = Recorder() if any(task.runs_freely for task in tasks) else None
        hidden = suffix.run(places, recorder)
        n_blocks = len(self.blockwise.blocks) - suffix.first
        self.statistics.passes += 1
        self.statistics.tokens += k * n_blocks * sum(len(task.ids) for task in tasks)
        self.statistics.padded += n_blocks * hidden.shape[:2].numel()
        taken = suffix.needed.of(hidden)
        needed = torch.split(taken.view(k, -1, taken.shape[-1]), [len(task.labels) for task in tasks], dim=1)
        self._score_choices(cohort, places, tasks, needed)
        rollouts: list[Rollout] = []
        leaving: list[int] = []  # their rows in the pass
        for at, logits, argmax in self._logits(needed, tasks):
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
                    n_states = len(task.sample.prompt) + len(own.tokens) - 1  # of all tokens but the last
                    states = self._states_below(number, suffix)
                    rollouts.append(Rollout(place, number, own, states, n_states, task.limit - len(own.tokens)))
                    leaving.append(i * len(tasks) + at)
        if recorder is not None and rollouts:
            self._take_along(rollouts, leaving, recorder, suffix.first)
        return rollouts

    def _needed(self, numbers: Sequence[int]) -> Needed:
        """The positions that predict the tasks' labels, task by task."""
        tasks, device = [self.trajectories.tasks[number] for number in numbers], self.blockwise.device
        rows = [torch.full((len(task.labels),), row) for row, task in enumerate(tasks)]
        columns = [torch.arange(len(task.labels)) + len(task.sample.prompt) - 1 for task in tasks]
        return Needed(len(tasks), torch.cat(rows).to(device), torch.cat(columns).to(device))

    def _score_choices(
        self, cohort: Cohort, places: Sequence[int], tasks: Sequence[Task], needed: Sequence[torch.Tensor]
    ) -> None:
        """Score what is a choice. `needed` holds per task what leaves the last block there, (K, labels, hidden)."""
        for task, at_labels in zip(tasks, needed, strict=True):
            if task.sample.options:
                options = torch.tensor(task.sample.options, device=at_labels.device)
                logits = self.blockwise.head.logits(at_labels[:, 0], options).cpu()
                for i, place in enumerate(places):
                    cohort.scores.set(cohort.rows[place], task.name, task.index, task.choice(logits[i]))

    def _logits(
        self, needed: Sequence[torch.Tensor], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, metrics.ResponseLogits, torch.Tensor]]:
        """Per task that is no choice: its place, its logits and the argmax at its labels, (K, labels) on the CPU."""
        places = [at for at, task in enumerate(tasks) if not task.sample.options]
        if not places:
            return
        hidden = torch.cat([needed[at] for at in places], dim=1)
        labels = torch.tensor([label for at in places for label in tasks[at].labels], device=hidden.device)
        found = self.blockwise.head.token_scores(hidden.flatten(0, 1), labels.repeat(len(hidden)))
        counts = [len(tasks[at].labels) for at in places]
        parts = [torch.split(part.cpu().view(len(hidden), -1), counts, dim=1) for part in found]
        for at, max_logit, argmax, logsumexp, label_logit in zip(places, *parts, strict=True):
            yield at, metrics.ResponseLogits(max_logit, label_logit, logsumexp), argmax

    def _take_along(self, rollouts: Sequence[Rollout], rows: Sequence[int], recorder: Recorder, first: int) -> None:
        """Keep the keys and values of these rows of a pass, from block `first` on, and let the others go."""
        width = max(one.n_states for one in rollouts)
        for block in range(first, len(self.blockwise.blocks)):
            keys, values = recorder.states[block]
            at = torch.tensor(rows, device=keys.device) % len(keys)  # what all candidates share is recorded once
            keys, values = (part[:, :, :width].index_select(0, at) for part in (keys, values))
            for row, one in enumerate(rollouts):
                one.states.append(Kept(keys, values, row))

    def _states_below(self, number: int, suffix: Suffix) -> list[Kept]:
        """Keys and values in the blocks below the suffix: kept, or computed once more."""
        batch, row = self.trajectories.place_of(number)
        if len(batch.states) >= suffix.first:
            return [Kept(keys, values, row) for keys, values in batch.states[: suffix.first]]
        if number not in suffix.states_below:
            recorder = Recorder()
            hidden = self.blockwise.enter(self.blockwise.pad([self.trajectories.tasks[number].ids]))
            self.blockwise.run(hidden, 0, suffix.first, recorder)
            found = [Kept(keys, values, 0) for _, (keys, values) in sorted(recorder.states.items())]
            suffix.states_below[number] = found
        return list(suffix.states_below[number])
