"""The fast Scorer: all candidates of a unit at once, over the blocks that the unit can change.

The same scores as the sequential Scorer's, but for the rounding of sums taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.cohort import Cohort, Statistics
from olmfast.evaluation.encoding import Dataset, Sample
from olmfast.evaluation.generation import RolloutQueue
from olmfast.evaluation.head import ModuleHead
from olmfast.evaluation.leaves import Leaf, is_stackable, stack_leaves
from olmfast.evaluation.lessons import Lessons
from olmfast.evaluation.memory import Memory, Shares, is_out_of_memory
from olmfast.evaluation.model import WorkingModel, builds_alike
from olmfast.evaluation.passes import Passes
from olmfast.evaluation.prefix import Prefix
from olmfast.evaluation.scorer import Candidate, Direction, Slopes
from olmfast.evaluation.scores import Scores, wanted_samples
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.evaluation.slopes import Known, logits_blockwise, lowest_block, slopes_blockwise
from olmfast.evaluation.trajectories import Trajectories
from olmfast.weights.architecture import Architecture, Unit
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression


class BatchedScorer:
    """Scores candidates together where their values can be stacked, and one after another where not.

    Its parts are public: `trajectories` (the tasks, and the tokens they are followed along), `blockwise`
    (the model taken apart), `prefix` and `passes` (what enters a unit's block, and the passes from there on), `shares`
    (of the memory) and `statistics`. `forget` takes the model apart anew.
    """

    def __init__(
        self,
        model: WorkingModel,
        datasets: Mapping[str, Dataset],
        tokenizer: Any,
        stop_tokens: Sequence[int],
        batch_tokens: int,
        progress: Callable[[str], None] = lambda _: None,
        memory: Memory | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`progress` is told the label of each candidate that has been scored, `note` what a user should know."""
        self.model, self.datasets, self.tokenizer = model, datasets, tokenizer
        self.sizes = {name: len(dataset.samples) for name, dataset in datasets.items()}
        self.stop_tokens, self.batch_tokens, self.progress = tuple(stop_tokens), batch_tokens, progress
        self.memory = memory or Memory(model.device)
        self.shares = Shares(self.memory, batch_tokens)
        self.note, self._noted = note, False
        self._for_slopes: BlockwiseModel | None = None
        self.lessons = Lessons(model, datasets, batch_tokens, self.stop_tokens, self._logits_of)
        self.statistics = Statistics()
        self.trajectories = Trajectories(datasets, model.context, tokenizer, stop_tokens, self.shares)
        self.forget()

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
        tasks = self.trajectories.numbers_of(wanted)
        if self.blockwise.module is not self.model.module:
            self.forget()
        left = list(range(len(candidates)))
        current = next((row for row in left if candidates[row].is_current), None)
        if any(self.trajectories.tasks[number].expected is None for number in tasks):
            self._find_trajectories(unit, candidates, current, tasks, scores)
            left = [row for row in left if row != current]
        first = self._first_block(unit) or 0
        self.trajectories.expect_latest_where_it_pays(len(left), first, len(self.blockwise.blocks))
        alone, stacks = self._together(unit, candidates, left)
        for row in alone:
            self._score_alone(unit, candidates[row], row, tasks, scores, wanted)
        for rows in stacks:
            self._bring_to(unit.blocks[0], tasks)
            n = self._fitting([candidates[row].values for row in rows])
            for begin in range(0, len(rows), n):
                self._score_stack(unit, candidates, rows[begin : begin + n], tasks, scores)
        return scores

    def slopes(
        self,
        candidate: Candidate,
        directions: Mapping[str, Sequence[Direction]],
        samples: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        teachers: Mapping[str, Candidate],
    ) -> Slopes:
        """See `Scorer.slopes`. What does not fit the memory is halved."""
        while True:
            n_tokens = self.shares.pass_tokens
            try:
                questions = self.lessons.of(samples, weights, teachers)
                known = None if teachers else self._entering(candidate, directions, samples)
                blockwise = self._differentiable()
                with self.model.trial(candidate):
                    return slopes_blockwise(self.model, blockwise, questions, directions, n_tokens, known)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or n_tokens == 1:
                    raise
            self.statistics.splits += 1
            self.shares.halve_passes()

    def _entering(
        self, candidate: Candidate, tensors: Collection[str], samples: Mapping[str, Sequence[int]]
    ) -> Known | None:
        """What enters the lowest block of these tensors for each question, as it is kept for scores; None where it
        cannot be: the block is the first, the candidate differs below it, or what is scored is the model's own text."""
        first = lowest_block(self._architecture, tensors)
        lowest = lowest_block(self._architecture, candidate.values) if candidate.values else first
        numbers = self.trajectories.numbers_of(samples)
        tasks = [self.trajectories.tasks[number] for number in numbers]
        if not first or lowest is None or lowest < first or candidate.recipe is not None:
            return None
        if any(task.runs_freely for task in tasks):
            return None
        if self.blockwise.module is not self.model.module:
            self.forget()
        with torch.inference_mode():
            self._bring_to(first, numbers)

        def known(index: int) -> torch.Tensor:
            batch, row = self.trajectories.place_of(numbers[index])
            return batch.hidden[first][row, : len(tasks[index].ids)].clone()

        return known

    def _differentiable(self) -> BlockwiseModel:
        """The model taken apart outside of inference mode, whose tensors no gradient can pass."""
        if self._for_slopes is None or self._for_slopes.module is not self.model.module:
            with torch.no_grad():
                self._for_slopes = BlockwiseModel(self.model.module, self._architecture)
        return self._for_slopes

    def _logits_of(self, samples: Sequence[Sample]) -> Iterator[tuple[int, torch.Tensor]]:
        return logits_blockwise(self._differentiable(), samples, self.shares.pass_tokens)

    def value(self, expression: Expression) -> torch.Tensor:
        """See `Scorer.value`."""
        return self.model.sources.value(expression)

    def commit(self, recipe: Recipe, label: str | None = None) -> None:
        """See `Scorer.commit`. What the candidate generated is what the next ones are expected to."""
        self.model.set_recipe(recipe)
        self.trajectories.commit(label)

    @property
    def state(self) -> Mapping[str, Any]:
        """See `Trajectories.state`."""
        return self.trajectories.state

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.trajectories.state = state

    @torch.inference_mode()
    def forget(self) -> None:
        """Take the live model apart anew, keep none of its activations, and measure again what a pass takes."""
        self.blockwise = BlockwiseModel(self.model.module, self._architecture)
        self.passes = Passes(self.blockwise, self.trajectories, self.shares, self.statistics)
        measured = self.passes.measure(self.memory)
        self.shares.fit(*measured, self.blockwise.state_bytes, self.trajectories.n_states)
        self.prefix = Prefix(self.model, self.blockwise, self.shares)
        self.trajectories.arrange(set(self.datasets))
        if isinstance(self.blockwise.head, ModuleHead) and not self._noted:
            self._noted = True
            kind = self._architecture.model_type
            self.note(
                f"{kind}: its head is more than norm, weight, bias and cap: the module's own forward gives the logits"
            )

    @property
    def _architecture(self) -> Architecture:
        return self.model.architecture

    def _find_trajectories(
        self, unit: Unit, candidates: Sequence[Candidate], current: int | None, tasks: Sequence[int], scores: Scores
    ) -> None:
        """Score the current model, which finds its greedy tokens; others are verified along them."""
        if current is not None:
            label, row, into = candidates[current].label, current, scores
        else:
            tasks = [number for number in tasks if self.trajectories.tasks[number].expected is None]
            label, row = "", 0
            into = Scores.empty(1, self.datasets, self.model.dtype)
        first = self._first_block(unit)
        if first is not None:
            self._bring_to(first, tasks)
        self._evaluate(Cohort(into, [row], [label], tasks, first, []))
        self.trajectories.found(label)
        if current is not None:
            self.progress(label)

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
        return self.shares.n_stacked(sum(self.model.live(name).nbytes for name in values[0]))

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
        self._evaluate(Cohort(scores, rows, labels, tasks, unit.blocks[0], leaves))
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
                self._evaluate(Cohort(scores, [row], [candidate.label], tasks, first, []))
        self.progress(candidate.label)

    # Evaluation

    def _bring_to(self, first: int, tasks: Sequence[int]) -> None:
        """Compute what enters a block. What does not fit the memory is halved: batches, and what is kept beside."""
        while True:
            batches = self.trajectories.batches_of(tasks)
            try:
                self.prefix.bring_to(first, batches, self.trajectories.batches)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or all(len(batch.ids) == 1 for batch in batches):
                    raise
            self.statistics.splits += 1
            self.shares.halve_prefix()
            self.trajectories.arrange(set(self.datasets))

    def _evaluate(self, cohort: Cohort) -> None:
        queue = RolloutQueue(cohort, self.blockwise, self.trajectories, self.shares, self.statistics)
        for numbers in self.passes.batches(cohort.tasks):
            queue.add(self.passes.run(cohort, range(len(cohort.rows)), numbers))
            while queue.fills_a_batch:
                queue.decode()
        while queue:
            queue.decode()
