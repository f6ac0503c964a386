"""The tasks of all datasets, the tokens that each is followed along, and where each lies in the batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from olmfast.evaluation.cohort import Cohort
from olmfast.evaluation.division import Part, divided
from olmfast.evaluation.encoding import Dataset, make_batches
from olmfast.evaluation.memory import Shares
from olmfast.evaluation.prefix import Batch
from olmfast.evaluation.tasks import OwnTokens, Task

Expected = dict[int, tuple[int, ...] | None]
Generated = dict[str, dict[int, list[int]]]  # candidate -> task -> its own greedy tokens


class Trajectories:
    """`tasks` are known by their numbers; `batches` are those that their inputs go through the lower blocks in."""

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        context: int,
        tokenizer: Any,
        stop_tokens: Sequence[int],
        shares: Shares,
        parts: int = 1,
    ) -> None:
        self.parts = parts
        self.datasets, self.tokenizer, self.stop_tokens, self.shares = datasets, tokenizer, tuple(stop_tokens), shares
        self.tasks = [
            Task.of(name, index, dataset, context)
            for name, dataset in datasets.items()
            for index in range(len(dataset.samples))
        ]
        self.batches: list[Batch] = []
        self._numbers = {(task.name, task.index): number for number, task in enumerate(self.tasks)}
        self._places: dict[int, tuple[Batch, int]] = {}  # task -> its batch, and its row there
        self._generated: Generated = {}

    def numbers_of(self, wanted: Mapping[str, Sequence[int]]) -> list[int]:
        """The tasks of samples (indices per dataset)."""
        return [self._numbers[name, index] for name, indices in wanted.items() for index in indices]

    @property
    def n_states(self) -> int:
        """The tokens of all free runs, prompts included, if none ends early."""
        return sum(len(task.sample.prompt) + task.limit for task in self.tasks if task.runs_freely)

    # Where tasks lie

    def place_of(self, number: int) -> tuple[Batch, int]:
        """A task's batch, and its row there."""
        return self._places[number]

    def batches_of(self, numbers: Sequence[int]) -> list[Batch]:
        """The batches that these tasks lie in."""
        wanted = {id(self._places[number][0]) for number in numbers}
        return [batch for batch in self.batches if id(batch) in wanted]

    def arrange(self, names: Collection[str]) -> None:
        """Put the tasks of these datasets into new batches, of which nothing is known yet."""
        old = {id(batch) for number, (batch, _) in self._places.items() if self.tasks[number].name in names}
        self.batches = [batch for batch in self.batches if id(batch) not in old]
        for name in self.datasets:
            if name not in names:
                continue
            numbers = [number for number, task in enumerate(self.tasks) if task.name == name]
            for rows in self._batched([len(self.tasks[number].ids) for number in numbers]):
                tasks = [self.tasks[numbers[row]] for row in rows]
                batch = Batch([task.ids for task in tasks], self.shares.keeps_states and tasks[0].runs_freely)
                self.batches.append(batch)
                self._places.update({numbers[row]: (batch, place) for place, row in enumerate(rows)})

    def parts_of(self, numbers: Sequence[int]) -> list[Part]:
        """Tasks in the batches that they pass in, and these in parts."""
        lengths = [len(self.tasks[number].ids) for number in numbers]
        batches = list(self._batched(lengths))
        costs = [lengths[batch[0]] * len(batch) + self.shares.pass_overhead for batch in batches]
        return divided([[numbers[i] for i in batch] for batch in batches], self.parts, costs)

    def _batched(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        return make_batches(lengths, self.shares.pass_tokens, self.shares.pass_overhead)

    # What candidates generate

    def finish(self, cohort: Cohort, place: int, number: int, own: OwnTokens) -> None:
        """Enter the score of a free run that is over, and remember its tokens."""
        task = self.tasks[number]
        answer = task.free_run(own, self.tokenizer, self.stop_tokens)
        cohort.scores.set(cohort.rows[place], task.name, task.index, answer)
        self._generated.setdefault(cohort.labels[place], {})[number] = own.tokens

    def hand_over(self) -> Generated:
        """What candidates have generated since the last commit; it is not kept here."""
        generated, self._generated = self._generated, {}
        return generated

    def take_over(self, generated: Generated) -> None:
        """Remember what another process has had candidates generate."""
        for label, by in generated.items():
            self._generated.setdefault(label, {}).update(by)

    def found(self, label: str) -> None:
        """The current model has been evaluated for the first time: its tokens are followed from now on."""
        self._take_latest(label)
        self._expect_latest({number for number, task in enumerate(self.tasks) if task.latest is not None})

    def commit(self, label: str | None) -> None:
        """The current model is this candidate now; None: one that was not scored."""
        self._take_latest(label)
        self._generated = {}

    def _take_latest(self, label: str | None) -> None:
        for number, tokens in (self._generated.get(label, {}) if label is not None else {}).items():
            self.tasks[number].latest = tuple(tokens)

    # What is expected of the next ones

    def expect_latest_where_it_pays(self, n_candidates: int, first: int, n_blocks: int) -> None:
        """Follow the current model's tokens where decoding what leaves the old ones would cost more.

        A batch in which tokens change goes through the blocks below `first` again; one in which they do not
        change has its inputs decoded for every candidate.
        """
        chosen: set[int] = set()
        for batch in self.batches:
            numbers = [number for number, (own, _) in self._places.items() if own is batch]
            changed = [n for n in numbers if self.tasks[n].latest not in (None, self.tasks[n].expected)]
            decoding = n_candidates * n_blocks * sum(len(self.tasks[number].labels) for number in changed)
            if changed and decoding >= first * sum(map(len, batch.ids)):
                chosen.update(changed)
        self._expect_latest(chosen)

    @property
    def expected(self) -> Expected:
        """Per task that runs freely, the tokens that it is followed along."""
        return {number: task.expected for number, task in enumerate(self.tasks) if task.runs_freely}

    def expect(self, expected: Expected) -> None:
        """Follow these tokens, as another process has decided."""
        for number, tokens in expected.items():
            self.tasks[number].latest = tokens
        self._expect_latest(list(expected))

    def _expect_latest(self, numbers: Collection[int]) -> None:
        longer: set[str] = set()
        for number in numbers:
            task, (batch, row) = self.tasks[number], self._places[number]
            if task.expected == task.latest:
                continue
            before, task.expected = task.ids, task.latest
            if len(task.ids) != len(before):
                longer.add(task.name)
            batch.ids[row] = task.ids
            batch.forget()
        self.arrange(longer)

    @property
    def state(self) -> Mapping[str, Any]:
        """Per task that runs freely, the tokens that are expected and those of the current model."""
        return {
            f"{task.name}/{task.index}": [
                list(tokens) if tokens is not None else None for tokens in (task.expected, task.latest)
            ]
            for task in self.tasks
            if task.runs_freely
        }

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        free = [task for task in self.tasks if task.runs_freely]
        for task in free:
            pair = state[f"{task.name}/{task.index}"]
            task.expected, task.latest = (tuple(tokens) if tokens is not None else None for tokens in pair)
        self.arrange({task.name for task in free})
