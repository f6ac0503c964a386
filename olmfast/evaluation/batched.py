"""The fast Scorer: all candidates of a unit at once, over the blocks that the unit can change.

The same scores as the sequential Scorer's, but for the rounding of sums taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.cohort import Cohort, Statistics
from olmfast.evaluation.decoding import needs_the_host
from olmfast.evaluation.division import Part
from olmfast.evaluation.encoding import Dataset, Sample
from olmfast.evaluation.head import ModuleHead
from olmfast.evaluation.leaves import Leaf, is_stackable, stack_leaves
from olmfast.evaluation.lessons import Lessons
from olmfast.evaluation.memory import Memory, Shares, is_out_of_memory
from olmfast.evaluation.model import WorkingModel, builds_alike
from olmfast.evaluation.passes import Passes
from olmfast.evaluation.planning import Call, Planner, Way, Work
from olmfast.evaluation.prefix import Prefix
from olmfast.evaluation.residency import RESIDENT
from olmfast.evaluation.rollouts import RolloutQueue
from olmfast.evaluation.scorer import Candidate, Direction, Slopes
from olmfast.evaluation.scores import Scores
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.evaluation.slopes import Known, logits_blockwise, lowest_block, slopes_blockwise
from olmfast.evaluation.trajectories import Trajectories
from olmfast.weights.architecture import Architecture
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression


class BatchedScorer(Planner):
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
        parts: int = 1,
    ) -> None:
        """`progress` is told the label of each candidate that has been scored, `note` what a user should know; `parts`
        is that of `Settings`."""
        self.model, self.tokenizer = model, tokenizer
        self.stop_tokens, self.batch_tokens = tuple(stop_tokens), batch_tokens
        self.memory = memory or Memory(model.device)
        self.memory.give_to(self)
        block = model.module.get_submodule(model.architecture.family.blocks)[0]
        self.shares = Shares.of(
            self.memory, batch_tokens, sum(x.numel() for x in block.parameters()), model.residency is not RESIDENT
        )
        super().__init__(
            Trajectories(datasets, model.context, tokenizer, stop_tokens, self.shares, parts), model.dtype, progress
        )
        self.note, self._noted = note, set[str]()
        self._for_slopes: BlockwiseModel | None = None
        self.lessons = Lessons(model, datasets, batch_tokens, self.stop_tokens, self._logits_of)
        self.statistics = Statistics()
        self.forget()

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
            n_tokens, held = self.shares.pass_tokens, (self.shares.sweep_bytes, self.shares.graph_bytes)
            try:
                questions = self.lessons.of(samples, weights, teachers)
                known = None if teachers else self._entering(candidate, directions, samples)
                blockwise = self._differentiable()
                with self.model.trial(candidate):
                    return slopes_blockwise(self.model, blockwise, questions, directions, n_tokens, known, *held)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or (n_tokens == 1 and not held[1]):
                    raise
            self.statistics.splits += 1
            if self.shares.graph_bytes:
                self.shares.graph_bytes = 0
                continue
            self.shares.halve_sweeps()
            self.shares.halve_passes()

    def _entering(
        self, candidate: Candidate, tensors: Collection[str], samples: Mapping[str, Sequence[int]]
    ) -> Known | None:
        """What enters the lowest block of these tensors for each question, as it is kept for scores; None where it
        cannot be: the block is the first, the candidate differs below it, or what is scored is the model's own text."""
        first = lowest_block(self.architecture, tensors)
        lowest = lowest_block(self.architecture, candidate.values) if candidate.values else first
        numbers = self.trajectories.numbers_of(samples)
        tasks = [self.trajectories.tasks[number] for number in numbers]
        if not first or lowest is None or lowest < first or candidate.recipe is not None:
            return None
        if any(task.runs_freely for task in tasks):
            return None
        self.begin()
        with torch.inference_mode():
            self._bring_tasks_to(first, numbers)

        def known(index: int) -> torch.Tensor:
            batch, row = self.trajectories.place_of(numbers[index])
            return batch.hidden[first][row, : len(tasks[index].ids)].clone()

        return known

    def _differentiable(self) -> BlockwiseModel:
        """The model taken apart outside of inference mode, whose tensors no gradient can pass."""
        if self._for_slopes is None or self._for_slopes.module is not self.model.module:
            with torch.no_grad():
                self._for_slopes = BlockwiseModel(self.model.module, self.architecture, self.model.residency)
        return self._for_slopes

    def _logits_of(self, samples: Sequence[Sample]) -> Iterator[tuple[int, torch.Tensor]]:
        return logits_blockwise(self._differentiable(), samples, self.shares.pass_tokens, self.shares.sweep_bytes)

    def value(self, expression: Expression) -> torch.Tensor:
        """See `Scorer.value`."""
        return self.model.sources.value(expression)

    def commit(self, recipe: Recipe, label: str | None = None) -> None:
        """See `Scorer.commit`. What the candidate generated is what the next ones are expected to."""
        self.model.set_recipe(recipe)
        self.trajectories.commit(label)

    @torch.inference_mode()
    def forget(self) -> None:
        """Take the live model apart anew, keep none of its activations, and measure again what a pass takes."""
        self.blockwise = BlockwiseModel(self.model.module, self.architecture, self.model.residency)
        self.passes = Passes(self.blockwise, self.trajectories, self.shares, self.statistics)
        measured = self.passes.measure(self.memory)
        self.shares.fit(*measured, self.blockwise.state_bytes, self.trajectories.n_states)
        self.prefix = Prefix(self.model, self.blockwise, self.shares)
        self.trajectories.arrange(set(self.datasets))
        if isinstance(self.blockwise.head, ModuleHead):
            kind = self.architecture.model_type
            self._note_once(
                f"{kind}: its head is more than norm, weight, bias and cap: the module's own forward gives the logits"
            )

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self.note(text)

    def let_go(self) -> None:
        """Keep no activations; they are computed again when they are wanted."""
        for batch in self.trajectories.batches:
            batch.forget()

    def agree(self, shares: Shares) -> None:
        """Split work as all processes do that share it."""
        self.shares.take(shares)
        self.trajectories.arrange(set(self.datasets))

    @property
    def architecture(self) -> Architecture:
        """See `Planner.architecture`."""
        return self.model.architecture

    # Which candidates go together, and how

    def begin(self) -> None:
        """See `Planner.begin`."""
        self.memory.give_to(self)
        if self.blockwise.module is not self.model.module:
            self.forget()

    def together(self, call: Call, rows: Sequence[int]) -> list[tuple[tuple[int, ...], Way]]:
        """See `Planner.together`: those whose values can be stacked, as many at a time as the memory holds."""
        found: list[tuple[tuple[int, ...], Way]] = []
        stacks: dict[tuple[str, ...], list[int]] = {}
        for row in rows:
            candidate = call.candidates[row]
            names = tuple(sorted(candidate.values))
            if names and len(call.unit.blocks) == 1 and all(is_stackable(self.model, name) for name in names):
                stacks.setdefault(names, []).append(row)
            else:
                found.append(((row,), self._way_alone(candidate)))
        for names, own in stacks.items():
            n = self.shares.n_stacked(sum(self.model.live(name).nbytes for name in names))
            found += [(tuple(own[begin : begin + n]), "stacked") for begin in range(0, len(own), n)]
        return found

    def _way_alone(self, candidate: Candidate) -> Way:
        whole = candidate.recipe
        alike = whole is None or builds_alike(self.model.recipe, whole, self.model.sources.pool)
        return "alone" if alike else "apart"

    def carry_out(self, call: Call, works: Sequence[Work], scores: Scores) -> None:
        """See `Planner.carry_out`: one after another, on the live model."""
        try:
            for work, following in zip_longest(works, works[1:]):
                if work.way == "stacked":
                    self._evaluate_stack(call, work, scores)
                elif work.way == "alone":
                    self._evaluate_alone(call, work, scores, following)
                else:
                    told = (self.model, self.datasets, self.tokenizer, self.stop_tokens, self.batch_tokens)
                    (row,) = work.rows
                    candidate = call.candidates[row]
                    scores.put(
                        row, SequentialScorer(*told).score(call.unit, [candidate], list(call.wanted), call.wanted)
                    )
                self.tell(call, work.rows)
        finally:
            self.model.settle()

    # Evaluation

    def _evaluate_stack(self, call: Call, work: Work, scores: Scores) -> None:
        """Candidates whose values are stacked; what does not fit the memory is halved."""
        self._bring_to(call.unit.blocks[0], work.parts)
        leaves: list[Leaf] | None
        try:
            leaves = stack_leaves(self.model, [call.candidates[row].values for row in work.rows])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(work.rows) == 1:
                raise
            leaves = None
        if leaves is None:  # out of the handler, whose traceback holds what has been stacked
            self.statistics.splits += 1
            middle = len(work.rows) // 2
            for rows in (work.rows[:middle], work.rows[middle:]):
                self._evaluate_stack(call, replace(work, rows=rows), scores)
            return
        labels = [call.candidates[row].label for row in work.rows]
        self._evaluate(Cohort(scores, work.rows, labels, work.parts, call.unit.blocks[0], leaves))

    def _evaluate_alone(self, call: Call, work: Work, scores: Scores, following: Work | None) -> None:
        """One candidate, whose values are made the live ones meanwhile: those of the one that follows it in the same
        way come straight after, where nothing of the current model is needed in between."""
        candidate, first = call.candidates[work.rows[0]], self.first_block(call.unit)
        then = None
        if first is not None:
            self._bring_to(first, work.parts)  # while the current model's values are live
        elif following is not None and following.way == "alone":
            then = call.candidates[following.rows[0]]
        with self.model.trial(candidate, then):
            self._evaluate(Cohort(scores, work.rows, [candidate.label], work.parts, first, []))

    def _bring_to(self, first: int, parts: Sequence[Part]) -> None:
        """Compute what enters a block. What does not fit the memory is halved: batches, and what is kept beside."""
        self._bring_tasks_to(first, [number for part in parts for batch in part for number in batch])

    def _bring_tasks_to(self, first: int, tasks: Sequence[int]) -> None:
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
        for part in cohort.parts:
            queue = RolloutQueue(cohort, self.blockwise, self.trajectories, self.shares, self.statistics)
            for rollouts in self.passes.run(cohort, part, queue.let_go):
                queue.add(rollouts)
                while queue.fills_a_batch:
                    queue.decode()
            while queue:
                queue.decode()
        if needs_the_host(self.blockwise.module):
            self._note_once(
                f"{self.architecture.model_type}: a step of decoding waits for the host, so it is not replayed"
            )
