"""The fast Scorer: all candidates of a unit at once, over the blocks that the unit can change.

The same scores as the sequential Scorer's, but for the rounding of sums taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.blocks import Decoder, Needed, Recorder
from olmfast.evaluation.encoding import Dataset, make_batches
from olmfast.evaluation.generation import Cut, resume
from olmfast.evaluation.memory import Memory, is_out_of_memory
from olmfast.evaluation.model import WorkingModel, builds_alike
from olmfast.evaluation.prefix import Batch, Prefix
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores, wanted_samples
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.evaluation.stacked import Leaf, Start, is_stackable, stack_leaves
from olmfast.evaluation.tasks import Followed, Task
from olmfast.weights.architecture import Architecture, Unit
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression

MEASURED_TOKENS = 512  # in the pass whose memory is measured
# Shares of the memory left beside the model; the rest is slack for what comes and goes.
PREFIX_SHARE, STACK_SHARE, PASS_SHARE = 0.4, 0.2, 0.25
CPU_TOKENS = 1024  # in one pass on a CPU: the activations of more do not stay in its caches


@dataclass
class Statistics:
    """What has been computed so far."""

    tokens: int = 0  # of inputs, times the blocks they went through
    padded: int = 0  # the same with their batches' padding
    passes: int = 0  # forward passes
    decoded: int = 0  # tokens decoded after leaving a trajectory
    splits: int = 0  # times that something did not fit the memory and was halved

    @property
    def padding(self) -> float:
        """The share of padding in what was computed."""
        return 1 - self.tokens / self.padded if self.padded else 0.0


@dataclass
class _Work:
    """Candidates (rows of `scores`) to be evaluated together on tasks (by number)."""

    scores: Scores
    rows: Sequence[int]
    labels: Sequence[str]
    tasks: Sequence[int]
    first: int | None  # the first block that differs from the current model; None: the embedding does
    leaves: Sequence[Leaf]  # where the candidates' values are stacked; empty: they are live


@dataclass
class _Open:
    """A candidate (by its place in the work) that left the trajectory of a task and is to be decoded on."""

    place: int
    task: int
    followed: Followed
    cut: Cut


class BatchedScorer:
    """Scores candidates together where their values can be stacked, and one after another where not."""

    def __init__(
        self,
        model: WorkingModel,
        datasets: Mapping[str, Dataset],
        tokenizer: Any,
        stop_tokens: Sequence[int],
        batch_tokens: int,
        progress: Callable[[str], None] = lambda _: None,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.datasets, self.tokenizer = model, datasets, tokenizer
        self.sizes = {name: len(dataset.samples) for name, dataset in datasets.items()}
        self.stop_tokens, self.batch_tokens, self.progress = tuple(stop_tokens), batch_tokens, progress
        self.memory = memory or Memory(model.device)
        self._pass_tokens = min(batch_tokens, CPU_TOKENS) if model.device.type == "cpu" else batch_tokens
        self._decode_tokens = batch_tokens
        self._room = self.memory.room  # shared out once: what is split how must not depend on the moment
        self.statistics = Statistics()
        self._tasks = [
            Task.of(name, index, dataset, model.context)
            for name, dataset in datasets.items()
            for index in range(len(dataset.samples))
        ]
        self._numbers = {(task.name, task.index): number for number, task in enumerate(self._tasks)}
        self._followed: dict[str, dict[int, list[int]]] = {}  # candidate -> task -> its own greedy tokens
        self._keeps_states = True
        self._take_apart()

    @torch.inference_mode()
    def score(
        self,
        unit: Unit,
        candidates: Sequence[Candidate],
        datasets: Sequence[str] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
    ) -> Scores:
        """See `Scorer.score`. Samples not asked for are NaN and marked as not evaluated."""
        wanted = wanted_samples(self.datasets, datasets, samples)
        scores = Scores.empty(len(candidates), {name: self.datasets[name] for name in wanted}, self.model.dtype)
        tasks = [self._numbers[name, index] for name, indices in wanted.items() for index in indices]
        if self._decoder.module is not self.model.module:
            self._take_apart()
        left = list(range(len(candidates)))
        current = next((row for row in left if candidates[row].is_current), None)
        if any(self._tasks[number].expected is None for number in tasks):
            self._find_trajectories(unit, candidates, current, tasks, scores)
            left = [row for row in left if row != current]
        self._expect_latest_where_it_pays(len(left), self._first_block(unit) or 0)
        alone, stacks = self._together(unit, candidates, left)
        for row in alone:
            self._score_alone(unit, candidates[row], row, tasks, scores, wanted)
        for rows in stacks:
            self._bring_to(unit.blocks[0], tasks)
            n = self._fitting([candidates[row].values for row in rows])
            for begin in range(0, len(rows), n):
                self._score_stack(unit, candidates, rows[begin : begin + n], tasks, scores)
        return scores

    def value(self, expression: Expression) -> torch.Tensor:
        """See `Scorer.value`."""
        return self.model.sources.value(expression)

    def commit(self, recipe: Recipe, label: str | None = None) -> None:
        """See `Scorer.commit`. What the candidate generated is what the next ones are expected to."""
        self.model.set_recipe(recipe)
        for number, tokens in (self._followed.get(label, {}) if label is not None else {}).items():
            self._tasks[number].latest = tuple(tokens)
        self._followed = {}

    @property
    def state(self) -> Mapping[str, Any]:
        """Per task that runs freely, the tokens that are expected and those of the current model."""
        return {
            f"{task.name}/{task.index}": [
                list(tokens) if tokens is not None else None for tokens in (task.expected, task.latest)
            ]
            for task in self._tasks
            if task.runs_freely
        }

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        free = [task for task in self._tasks if task.runs_freely]
        for task in free:
            pair = state[f"{task.name}/{task.index}"]
            task.expected, task.latest = (tuple(tokens) if tokens is not None else None for tokens in pair)
        self._arrange({task.name for task in free})

    @torch.inference_mode()
    def _take_apart(self) -> None:
        self._decoder = Decoder(self.model.module, self.model.sources.pool.architecture)
        self._prefix = Prefix(self.model, self._decoder, limit=int(PREFIX_SHARE * self._room))
        self._places: dict[int, tuple[Batch, int]] = {}  # task -> its batch, and its row there
        self._fit_passes()
        self._arrange(set(self.datasets))

    def _fit_passes(self) -> None:
        """Measure what a small pass takes, and keep passes and decoding within their share of the memory."""
        decoder = self._decoder
        shortest = min(range(len(self._tasks)), key=lambda number: len(self._tasks[number].ids))
        rows = -(-min(self._pass_tokens, MEASURED_TOKENS) // len(self._tasks[shortest].ids))
        ids = decoder.pad([self._tasks[shortest].ids] * rows)
        decoder.calls(ids.shape[1])
        needed = self._needed([shortest] * rows)
        taken = self.memory.taken_by(
            lambda: decoder.run(decoder.enter(ids), 0, len(decoder.blocks), Recorder(), needed)
        )
        share = int(PASS_SHARE * self._room)
        self._pass_tokens = min(self._pass_tokens, _power_of_two(share * ids.numel() // max(taken, 1)))
        # Decoding holds the states of its tokens twice: those handed over, and its cache.
        self._decode_tokens = min(self._decode_tokens, _power_of_two(share // (2 * decoder.state_bytes)))
        longest = sum(len(task.sample.prompt) + task.limit for task in self._tasks if task.runs_freely)
        self._keeps_states = decoder.state_bytes * longest <= self._prefix.limit / 2

    def _arrange(self, names: Collection[str]) -> None:
        """Put the tasks of these datasets into new batches."""
        old = {id(batch) for number, (batch, _) in self._places.items() if self._tasks[number].name in names}
        self._prefix.batches = [batch for batch in self._prefix.batches if id(batch) not in old]
        for name in self.datasets:
            if name not in names:
                continue
            numbers = [number for number, task in enumerate(self._tasks) if task.name == name]
            for rows in make_batches([len(self._tasks[number].ids) for number in numbers], self._pass_tokens):
                tasks = [self._tasks[numbers[row]] for row in rows]
                batch = Batch([task.ids for task in tasks], self._keeps_states and tasks[0].runs_freely)
                self._prefix.batches.append(batch)
                self._places.update({numbers[row]: (batch, place) for place, row in enumerate(rows)})

    @property
    def _architecture(self) -> Architecture:
        return self.model.sources.pool.architecture

    # Trajectories

    def _find_trajectories(
        self, unit: Unit, candidates: Sequence[Candidate], current: int | None, tasks: Sequence[int], scores: Scores
    ) -> None:
        """Score what is there, which finds its greedy tokens; others are verified along them."""
        if current is not None:
            label, row, into = candidates[current].label, current, scores
        else:
            tasks = [number for number in tasks if self._tasks[number].expected is None]
            label, row = "", 0
            into = Scores.empty(1, self.datasets, self.model.dtype)
        first = self._first_block(unit)
        if first is not None:
            self._bring_to(first, tasks)
        self._evaluate(_Work(into, [row], [label], tasks, first, []))
        for number, tokens in self._followed.get(label, {}).items():
            self._tasks[number].latest = tuple(tokens)
        self._expect_latest({number for number, task in enumerate(self._tasks) if task.latest is not None})
        if current is not None:
            self.progress(label)

    def _expect_latest_where_it_pays(self, n_candidates: int, first: int) -> None:
        """Follow the current model's tokens where decoding what leaves the old ones would cost more.

        A batch in which tokens change goes through the blocks below `first` again; one in which they do not
        change has its inputs decoded for every candidate.
        """
        n_blocks = len(self._decoder.blocks)
        chosen: set[int] = set()
        for batch in self._prefix.batches:
            numbers = [number for number, (own, _) in self._places.items() if own is batch]
            changed = [n for n in numbers if self._tasks[n].latest not in (None, self._tasks[n].expected)]
            decoding = n_candidates * n_blocks * sum(len(self._tasks[number].labels) for number in changed)
            if changed and decoding >= first * sum(map(len, batch.ids)):
                chosen.update(changed)
        self._expect_latest(chosen)

    def _expect_latest(self, numbers: Collection[int]) -> None:
        longer: set[str] = set()
        for number in numbers:
            task, (batch, row) = self._tasks[number], self._places[number]
            if task.expected == task.latest:
                continue
            before, task.expected = task.ids, task.latest
            if len(task.ids) != len(before):
                longer.add(task.name)
            batch.ids[row] = task.ids
            batch.forget()
        self._arrange(longer)

    # Which candidates go together, and how

    def _together(
        self, unit: Unit, candidates: Sequence[Candidate], rows: Sequence[int]
    ) -> tuple[list[int], list[list[int]]]:
        """Rows that are scored alone, and those whose values can be stacked."""
        alone: list[int] = []
        stacks: dict[tuple[str, ...], list[int]] = {}
        for row in rows:
            names = tuple(sorted(candidates[row].values))
            if names and len(unit.blocks) == 1 and all(is_stackable(self.model, name) for name in names):
                stacks.setdefault(names, []).append(row)
            else:
                alone.append(row)
        return alone, list(stacks.values())

    def _first_block(self, unit: Unit) -> int | None:
        blocks = [self._architecture.block_of(name) for name in unit.tensors]
        return None if None in blocks else min(block for block in blocks if block is not None)

    def _fitting(self, values: Sequence[Mapping[str, Expression]]) -> int:
        """How many candidates' values are stacked at a time."""
        one = sum(self.model.live(name).nbytes for name in values[0])
        return max(1, int(STACK_SHARE * self._room) // max(one, 1))

    def _score_stack(
        self, unit: Unit, candidates: Sequence[Candidate], rows: Sequence[int], tasks: Sequence[int], scores: Scores
    ) -> None:
        leaves: list[Leaf] | None
        try:
            leaves = stack_leaves(self.model, [candidates[row].values for row in rows])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
            leaves = None
        if leaves is None:  # out of the handler, whose traceback holds what has been stacked
            self.statistics.splits += 1
            middle = len(rows) // 2
            self._score_stack(unit, candidates, rows[:middle], tasks, scores)
            self._score_stack(unit, candidates, rows[middle:], tasks, scores)
            return
        labels = [candidates[row].label for row in rows]
        self._evaluate(_Work(scores, rows, labels, tasks, unit.blocks[0], leaves))
        for label in labels:
            self.progress(label)

    def _score_alone(
        self,
        unit: Unit,
        candidate: Candidate,
        row: int,
        tasks: Sequence[int],
        scores: Scores,
        wanted: Mapping[str, Sequence[int]],
    ) -> None:
        """One candidate, whose values are made the live ones meanwhile."""
        model, whole = self.model, candidate.recipe
        if whole is not None and not builds_alike(model.recipe, whole, model.sources.pool):
            plain = SequentialScorer(self.model, self.datasets, self.tokenizer, self.stop_tokens, self.batch_tokens)
            scores.put(row, plain.score(unit, [candidate], list(wanted), wanted))
        else:
            first = self._first_block(unit)
            if first is not None:
                self._bring_to(first, tasks)  # while the current model's values are live
            with self.model.trial(candidate):
                self._evaluate(_Work(scores, [row], [candidate.label], tasks, first, []))
        self.progress(candidate.label)

    # Evaluation

    def _bring_to(self, first: int, tasks: Sequence[int]) -> None:
        """Compute what enters a block. What does not fit the memory is halved: batches, and what is kept beside."""
        while True:
            wanted = {id(self._places[number][0]) for number in tasks}
            batches = [batch for batch in self._prefix.batches if id(batch) in wanted]
            try:
                self._prefix.bring_to(first, batches)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or all(len(batch.ids) == 1 for batch in batches):
                    raise
            self.statistics.splits += 1
            self._pass_tokens, self._prefix.limit = self._pass_tokens // 2, self._prefix.limit // 2
            self._arrange(set(self.datasets))

    def _entering(self, first: int | None, tasks: Sequence[int]) -> torch.Tensor:
        """What enters the first block to be run: (tasks, width, hidden)."""
        if first is None:
            return self._decoder.enter(self._decoder.pad([self._tasks[number].ids for number in tasks]))
        kept = [(*self._places[number], len(self._tasks[number].ids)) for number in tasks]
        return self._decoder.pad_hidden([batch.hidden[first][row, :length] for batch, row, length in kept])

    def _evaluate(self, work: _Work) -> None:
        opened: list[_Open] = []
        batches = make_batches([len(self._tasks[number].ids) for number in work.tasks], self._pass_tokens)
        for batch in batches:
            opened += self._go_through(work, list(range(len(work.rows))), [work.tasks[i] for i in batch])
            while self._fills_a_batch(opened):
                opened = self._decode(work, opened)
        while opened:
            opened = self._decode(work, opened)

    def _go_through(self, work: _Work, places: Sequence[int], numbers: list[int]) -> list[_Open]:
        """Passes of these candidates on a batch of tasks. What does not fit the memory is halved, and goes on."""
        opened: list[_Open] = []
        done = 0
        try:
            hidden = self._entering(work.first, numbers)
            start = Start(self._decoder, work.first or 0, hidden, work.leaves, self._needed(numbers))
            per_pass = max(1, self._pass_tokens // hidden.shape[:2].numel())
            while done < len(places):
                opened += self._pass(work, list(places[done : done + per_pass]), numbers, start)
                done += per_pass
            return opened
        except (RuntimeError, MemoryError) as error:
            left = places[done:]
            if not is_out_of_memory(error) or (len(left) == len(numbers) == 1):
                raise
        self.statistics.splits += 1
        self._pass_tokens = max(1, self._pass_tokens // 2)
        if len(left) > 1:
            halves = [(left[: len(left) // 2], numbers), (left[len(left) // 2 :], numbers)]
        else:
            halves = [(left, numbers[: len(numbers) // 2]), (left, numbers[len(numbers) // 2 :])]
        return opened + [one for places, tasks in halves for one in self._go_through(work, places, tasks)]

    def _pass(self, work: _Work, places: list[int], numbers: list[int], start: Start) -> list[_Open]:
        """One forward pass of some candidates on a batch of tasks; returns what it left open."""
        decoder, tasks, k = self._decoder, [self._tasks[number] for number in numbers], len(places)
        recorder = Recorder() if any(task.runs_freely for task in tasks) else None
        hidden = decoder.run(start.run(places, recorder), start.block + 1, len(decoder.blocks), recorder, start.needed)
        n_blocks = len(decoder.blocks) - start.block
        self.statistics.passes += 1
        self.statistics.tokens += k * n_blocks * sum(len(task.ids) for task in tasks)
        self.statistics.padded += n_blocks * hidden.shape[:2].numel()
        taken = start.needed.of(hidden)
        needed = torch.split(taken.view(k, -1, taken.shape[-1]), [len(task.labels) for task in tasks], dim=1)
        for task, at_labels in zip(tasks, needed, strict=True):
            if task.sample.options:
                options = torch.tensor(task.sample.options, device=taken.device)
                logits = decoder.logits(at_labels[:, 0], options).cpu()
                for i, place in enumerate(places):
                    work.scores.set(work.rows[place], task.name, task.index, task.choice(logits[i]))
        opened: list[_Open] = []
        for at, scores, argmax in self._token_scores(needed, tasks):
            task = tasks[at]
            for i, place in enumerate(places):
                own = metrics.TokenScores(*(part[i] for part in scores))
                if not task.runs_freely:
                    work.scores.set(work.rows[place], task.name, task.index, task.teacher_forced(own, argmax[i]))
                    continue
                followed = task.follow(argmax[i], own.max_prob)
                if task.is_over(followed, self.stop_tokens):
                    self._finish(work, place, numbers[at], followed)
                else:
                    assert recorder is not None
                    states = self._states(start, recorder, i * len(tasks) + at, numbers[at], followed)
                    cut = Cut(place, followed.tokens[-1], states, task.limit - len(followed.tokens))
                    opened.append(_Open(place, numbers[at], followed, cut))
        return opened

    def _needed(self, numbers: Sequence[int]) -> Needed:
        """The positions that predict the tasks' labels, task by task."""
        tasks, device = [self._tasks[number] for number in numbers], self.model.device
        rows = [torch.full((len(task.labels),), row) for row, task in enumerate(tasks)]
        columns = [torch.arange(len(task.labels)) + len(task.sample.prompt) - 1 for task in tasks]
        return Needed(len(tasks), torch.cat(rows).to(device), torch.cat(columns).to(device))

    def _token_scores(
        self, needed: Sequence[torch.Tensor], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, metrics.TokenScores, torch.Tensor]]:
        """Per task that is no choice: its place, the scores and the argmax at its labels, (K, labels) on the CPU.

        `needed` holds for each task what leaves the last block there, (K, labels, hidden).
        """
        places = [at for at, task in enumerate(tasks) if not task.sample.options]
        if not places:
            return
        hidden = torch.cat([needed[at] for at in places], dim=1)
        labels = torch.tensor([label for at in places for label in tasks[at].labels], device=hidden.device)
        found = self._decoder.token_scores(hidden.flatten(0, 1), labels.repeat(len(hidden)))
        counts = [len(tasks[at].labels) for at in places]
        parts = [torch.split(part.cpu().view(len(hidden), -1), counts, dim=1) for part in found]
        for at, max_logit, argmax, logsumexp, label_logit in zip(places, *parts, strict=True):
            yield at, metrics.TokenScores(max_logit, label_logit, logsumexp), argmax

    def _states(
        self, start: Start, recorder: Recorder, row: int, number: int, followed: Followed
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of all tokens but the last that a candidate has followed, per block."""
        n = len(self._tasks[number].sample.prompt) + len(followed.tokens) - 1
        states = [(keys[:, :n], values[:, :n]) for keys, values in self._states_below(number, start)]
        for block in range(start.block, len(self._decoder.blocks)):
            keys, values = recorder.states[block]
            own = row % len(keys)  # what is shared by all candidates is recorded once
            states.append((keys[own, :, :n].clone(), values[own, :, :n].clone()))
        return states

    def _states_below(self, number: int, start: Start) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the blocks below the start, (heads, tokens, head size): kept, or computed once more."""
        batch, place = self._places[number]
        if len(batch.states) >= start.block:
            return [(keys[place], values[place]) for keys, values in batch.states[: start.block]]
        if number not in start.states_below:
            recorder = Recorder()
            hidden = self._decoder.enter(self._decoder.pad([self._tasks[number].ids]))
            self._decoder.run(hidden, 0, start.block, recorder)
            start.states_below[number] = [(keys[0], values[0]) for _, (keys, values) in sorted(recorder.states.items())]
        return start.states_below[number]

    def _fills_a_batch(self, opened: Sequence[_Open]) -> bool:
        return bool(opened) and len(opened) * max(map(self._length, opened)) >= self._decode_tokens

    def _length(self, one: _Open) -> int:
        return len(self._tasks[one.task].sample.prompt) + len(one.followed.tokens) + one.cut.limit

    def _decode(self, work: _Work, opened: Sequence[_Open]) -> list[_Open]:
        """Decode as many as fit a batch, those with most tokens to go first; returns the others."""
        ordered = sorted(opened, key=lambda one: -one.cut.limit)
        n = max(1, self._decode_tokens // max(map(self._length, ordered)))
        chosen, rest = ordered[:n], ordered[n:]
        generative = [self._tasks[one.task].mode in metrics.GENERATIVE for one in chosen]
        if any(generative) and not all(generative):  # stop tokens end a generation, and nothing else
            kind = generative[0]
            rest = [one for one, own in zip(chosen, generative, strict=True) if own != kind] + rest
            chosen = [one for one, own in zip(chosen, generative, strict=True) if own == kind]
        stop = self.stop_tokens if generative[0] else ()
        try:
            tails = resume(self._decoder.module, [one.cut for one in chosen], work.leaves, self._decoder.context, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(chosen) == 1:
                raise
            self.statistics.splits += 1
            self._decode_tokens = max(1, self._decode_tokens // 2)
            return [*chosen, *rest]
        for one, tail in zip(chosen, tails, strict=True):
            self.statistics.decoded += len(tail.tokens)
            tokens = [*one.followed.tokens, *tail.tokens.tolist()]
            followed = Followed(tokens, torch.cat([one.followed.max_prob, tail.max_prob]))
            self._finish(work, one.place, one.task, followed)
        return rest

    def _finish(self, work: _Work, place: int, number: int, followed: Followed) -> None:
        task = self._tasks[number]
        value, truncated = task.free_run(followed, self.tokenizer, self.stop_tokens)
        work.scores.set(work.rows[place], task.name, task.index, value, truncated)
        self._followed.setdefault(work.labels[place], {})[number] = followed.tokens


def _power_of_two(n: int) -> int:
    """The largest up to n, at least 1: a size that does not change with every byte that is free."""
    return 1 << (max(n, 1).bit_length() - 1)
