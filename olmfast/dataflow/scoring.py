"""The fast Scorer of paths: hop lists over shared blocks, and what paths have in common is computed once.

The scores of the folded models but for rounding. A batch goes through all paths in the order of a tree: what leaves
the last hop that several have in common is kept until the last of them has gone on from it. Where a model runs freely,
this is so of its prompts; then each path is decoded by itself, with a place in the cache for every hop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch

from olmfast.dataflow.hops import Hop
from olmfast.dataflow.running import HopBlock, PathCandidate, PathModel
from olmfast.evaluation import metrics
from olmfast.evaluation.blocks import Needed, Recorder, State, mlp_only_for
from olmfast.evaluation.cache import Kept
from olmfast.evaluation.decoding import Rollout, resume
from olmfast.evaluation.encoding import Dataset, make_batches
from olmfast.evaluation.memory import CPU_TOKENS, is_out_of_memory
from olmfast.evaluation.scorer import Candidate, Direction, Scorer, Slopes
from olmfast.evaluation.scores import Scores, wanted_samples
from olmfast.evaluation.tasks import OwnTokens, Task
from olmfast.weights.architecture import Unit
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression


@dataclass
class Passed:
    """How many hops paths have, for each batch, and how many were computed: the others were shared."""

    hops: int = 0
    computed: int = 0


class PathScorer:
    """Scores paths; what is no path, the scorer that `others` makes. The current model is a path, at first the entry's
    own blocks."""

    def __init__(
        self,
        model: PathModel,
        datasets: Mapping[str, Dataset],
        tokenizer: Any,
        stop_tokens: Sequence[int],
        batch_tokens: int,
        others: Callable[[], Scorer],
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.datasets, self._others, self.progress = model, datasets, others, progress
        self.sizes = {name: len(dataset.samples) for name, dataset in datasets.items()}
        on_cpu = model.device.type == "cpu"
        self.pass_tokens = min(batch_tokens, CPU_TOKENS) if on_cpu else batch_tokens
        self.tokenizer, self.stop_tokens, self.batch_tokens = tokenizer, tuple(stop_tokens), batch_tokens
        n_blocks = model.pool[model.entry].architecture.n_blocks
        self.current: tuple[Hop, ...] = tuple(Hop(model.entry, block) for block in range(n_blocks))
        self.passed = Passed()
        self._scored: dict[str, tuple[Hop, ...]] = {}

    @cached_property
    def others(self) -> Scorer:
        """Who scores what is no path; made when it is first asked."""
        return self._others()

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
        paths: dict[int, PathCandidate] = {}
        for row, candidate in enumerate(candidates):
            if candidate.is_current:
                paths[row] = PathCandidate(candidate.label, hops=self.current)
            elif isinstance(candidate, PathCandidate):
                paths[row] = candidate
            else:
                scores.put(row, self.others.score(unit, [candidate], list(wanted), wanted))
        self._scored = {path.label: path.hops for path in paths.values()}
        tasks = [
            Task.of(name, index, self.datasets[name], self.model.architecture.context)
            for name, indices in wanted.items()
            for index in indices
        ]
        tree = Tree({row: path.hops for row, path in paths.items()}, self.model)
        along = [task for task in tasks if not task.runs_freely]
        batches = make_batches([len(task.ids) for task in along], self.pass_tokens)
        self._in_batches(along, batches, partial(self._read, tree, scores))
        for generates in (False, True):  # stop tokens end a generation, and nothing else
            free = [task for task in tasks if task.runs_freely and task.generates == generates]
            lengths = [len(task.sample.prompt) + task.limit for task in free]
            batches = make_batches(lengths, self.batch_tokens, overhead=self.batch_tokens)
            self._in_batches(free, batches, partial(self._run_freely, tree, scores))
        for path in paths.values():
            self.progress(path.label)
        return scores

    def slopes(
        self,
        candidate: Candidate,
        directions: Mapping[str, Sequence[Direction]],
        samples: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        teachers: Mapping[str, Candidate],
    ) -> Slopes:
        """See `Scorer.slopes`; of a model that is no path."""
        return self.others.slopes(candidate, directions, samples, weights, teachers)

    def value(self, expression: Expression) -> torch.Tensor:
        """See `Scorer.value`."""
        return self.others.value(expression)

    def commit(self, recipe: Recipe, label: str | None = None) -> None:  # noqa: ARG002
        """See `Scorer.commit`. The live model stays the entry's, whose blocks the paths share."""
        self.current = self._scored.get(label, self.current) if label is not None else self.current

    @property
    def state(self) -> Mapping[str, Any]:
        """The current path."""
        return {"path": [[hop.donor, hop.block, hop.scale, hop.bias] for hop in self.current]}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.current = tuple(Hop(*entry) for entry in state["path"])

    @torch.inference_mode()
    def _in_batches(
        self, tasks: Sequence[Task], batches: Iterable[Sequence[int]], work: Callable[[Sequence[Task]], None]
    ) -> None:
        """Do something with tasks, a batch of them (by index) at a time. What does not fit the memory is halved."""
        for batch in batches:
            try:
                work([tasks[index] for index in batch])
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            middle = len(batch) // 2
            self._in_batches(tasks, [batch[:middle], batch[middle:]], work)

    def _read(self, tree: Tree, scores: Scores, tasks: Sequence[Task]) -> None:
        """Score a batch of tasks that are read along, for all paths."""
        entry, head = self.model.taken_apart(self.model.entry), self.model.taken_apart(self.model.out).head
        needed = _needed(tasks, entry.device)
        entering = entry.enter(entry.pad([task.ids for task in tasks]))
        counts = [len(task.labels) for task in tasks]
        for row, hidden, _ in tree.walk(entering, needed, self.passed):
            taken = needed.of(hidden)
            if any(not task.sample.options for task in tasks):
                for task, logits, argmax in self._logits(taken, tasks):
                    if not task.sample.options:
                        scores.set(row, task.name, task.index, task.teacher_forced(logits, argmax))
            for task, at_labels in zip(tasks, torch.split(taken, counts), strict=True):
                if task.sample.options:
                    options = torch.tensor(task.sample.options, device=entry.device)
                    scores.set(row, task.name, task.index, task.choice(head.logits(at_labels[:1], options)[0].cpu()))

    def _logits(
        self, taken: torch.Tensor, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, metrics.ResponseLogits, torch.Tensor]]:
        """Per task its logits and the argmax at its labels, (labels,) on the CPU; `taken` is (all labels, hidden)."""
        labels = torch.tensor([label for task in tasks for label in task.labels], device=taken.device)
        found = self.model.taken_apart(self.model.out).head.token_scores(taken, labels)
        counts = [len(task.labels) for task in tasks]
        parts = zip(*(torch.split(part.cpu(), counts) for part in found), strict=True)
        for task, (top, argmax, logsumexp, own) in zip(tasks, parts, strict=True):
            yield task, metrics.ResponseLogits(top, own, logsumexp), argmax

    def _run_freely(self, tree: Tree, scores: Scores, tasks: Sequence[Task]) -> None:
        """Score a batch of free runs, for all paths: their prompts are read together, then each is decoded."""
        entry = self.model.taken_apart(self.model.entry)
        needed = _needed(tasks, entry.device)
        entering = entry.enter(entry.pad([task.sample.prompt for task in tasks]))
        stop = self.stop_tokens if tasks[0].generates else ()
        for row, hidden, states in tree.walk(entering, needed, self.passed, recorded=True):
            begun = [
                task.follow(argmax, logits.max_prob) for task, logits, argmax in self._logits(needed.of(hidden), tasks)
            ]
            left = [at for at, task in enumerate(tasks) if not task.is_over(begun[at], stop)]
            if left:
                rollouts = [self._rollout(at, tasks[at], begun[at], states) for at in left]
                module = self.model.module_of(tree.hops[row])
                for at, more in zip(left, resume(module, rollouts, (), entry.context, stop), strict=True):
                    probabilities = torch.cat([begun[at].max_prob, more.max_prob])
                    begun[at] = OwnTokens([*begun[at].tokens, *more.tokens], probabilities)
            for task, own in zip(tasks, begun, strict=True):
                scores.set(row, task.name, task.index, task.free_run(own, self.tokenizer, stop))

    def _rollout(self, at: int, task: Task, own: OwnTokens, states: Sequence[State]) -> Rollout:
        """What is left to be decoded of the task in row `at` of a batch, whose prompts left these keys and values."""
        kept = [Kept(keys, values, at) for keys, values in states]
        return Rollout(0, at, own, kept, len(task.sample.prompt), task.limit - len(own.tokens))


class Tree:
    """Paths (row -> hops) in an order in which those that begin alike follow one another.

    A node of the tree is what has been computed after so many hops: the same blocks, and the same done to what they
    add, which is the next hop's to say.
    """

    def __init__(self, paths: Mapping[int, Sequence[Hop]], model: PathModel) -> None:
        self.model = model
        numbers: dict[object, int] = {}
        keys = {
            row: tuple(numbers.setdefault(edge, len(numbers)) for edge in _edges(hops)) for row, hops in paths.items()
        }
        self.rows = sorted(paths, key=lambda row: (keys[row], row))
        self.hops = paths
        ordered = [keys[row] for row in self.rows]
        # With the one before. The last hop is always computed: see `walk`.
        self.shared = [0, *(min(_common(a, b), len(b) - 1) for a, b in pairwise(ordered))]
        self.blocks: dict[int, HopBlock] = {}
        self.chains: dict[int, list[HopBlock]] = {}
        made: dict[tuple[int, ...], HopBlock] = {}
        for row in self.rows:
            chain = self.chains[row] = []
            for place, block in enumerate(model.blocks_of(paths[row])):
                chain.append(made.setdefault((place, keys[row][place]), block))

    def walk(
        self, entering: torch.Tensor, needed: Needed, passed: Passed, recorded: bool = False
    ) -> Iterator[tuple[int, torch.Tensor, list[State]]]:
        """Row, what leaves its last hop, (batch, width, hidden), and if they are `recorded` each hop's keys and values,
        for each path; `entering` is what enters the first. Other positions than those needed are void.

        A last hop's MLP computes nothing for these; of a hop that other paths go on from it is computed for all again,
        so that a path's scores do not depend on those beside it.
        """
        kept = {0: entering}
        states: list[State] = []
        width = entering.shape[1]
        for at, row in enumerate(self.rows):
            kept = {depth: hidden for depth, hidden in kept.items() if depth <= self.shared[at]}
            begin, wanted = max(kept), self._wanted(at)
            hidden, states = kept[begin], states[:begin]
            for place in range(begin, len(self.hops[row])):
                hop = self.hops[row][place]
                recorder = Recorder() if recorded else None
                args, kwargs = self.model.taken_apart(hop.donor).arguments(hop.block, width, recorder)
                block, is_last = self.chains[row][place], place + 1 == len(self.hops[row])
                if is_last and place + 1 in wanted:
                    again = self.model.taken_apart(hop.donor).arguments(hop.block, width)
                    kept[place + 1] = _hidden_of(block(hidden, *again.args, **again.kwargs))
                with mlp_only_for(block.block, needed if is_last else None):
                    hidden = _hidden_of(block(hidden, *args, **kwargs))
                if recorder is not None:
                    states.append(recorder.states[place])
                if not is_last and place + 1 in wanted:
                    kept[place + 1] = hidden
            passed.hops += len(self.hops[row])
            passed.computed += len(self.hops[row]) - begin
            yield row, hidden, states

    def _wanted(self, at: int) -> set[int]:
        """The depths at which later paths go on from this one."""
        found, least = set[int](), len(self.hops[self.rows[at]])
        for shared in self.shared[at + 1 :]:
            least = min(least, shared)
            if least == 0:
                break
            found.add(least)
        return found


def _hidden_of(out: Any) -> torch.Tensor:
    """What a block gave, without what it may give beside."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _edges(hops: Sequence[Hop]) -> Iterator[object]:
    """What tells one place of a path from another: the block, and the factors that meet what it adds."""
    for place, hop in enumerate(hops):
        behind = hops[place + 1] if place + 1 < len(hops) else None
        first = (hop.scale, hop.bias) if place == 0 and hop.changes else None
        yield (
            hop.donor,
            hop.block,
            first,
            (behind.scale, behind.bias) if behind is not None and behind.changes else None,
        )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _needed(tasks: Sequence[Task], device: torch.device) -> Needed:
    """The positions that predict the tasks' labels, task by task."""
    rows = [torch.full((len(task.labels),), row) for row, task in enumerate(tasks)]
    columns = [torch.arange(len(task.labels)) + len(task.sample.prompt) - 1 for task in tasks]
    return Needed(len(tasks), torch.cat(rows).to(device), torch.cat(columns).to(device))
