"""What a fast Scorer decides before anything is computed: who is scored together, on which parts of the questions.

It needs no model, so that it is the same wherever the models are: in this process (`batched.py`) or in others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from olmfast.evaluation.division import Part
from olmfast.evaluation.encoding import Dataset
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores, wanted_samples
from olmfast.evaluation.trajectories import Trajectories
from olmfast.weights.architecture import Architecture, Unit

# `stacked`: several at once; `alone`: one that is made live; `apart`: one in a module of its own, on all questions.
Way = Literal["stacked", "alone", "apart"]


@dataclass(frozen=True)
class Call:
    """What a Scorer was asked: candidates of a unit, and the samples that are wanted (indices per dataset)."""

    unit: Unit
    candidates: tuple[Candidate, ...]
    wanted: Mapping[str, list[int]]


@dataclass(frozen=True)
class Work:
    """Some candidates of a call, by their rows, to be evaluated together on parts of the tasks."""

    rows: tuple[int, ...]
    way: Way
    parts: tuple[Part, ...]


class Planner(ABC):
    """A Scorer's `score` and `state`; how work is done is its subclasses' business."""

    def __init__(
        self, trajectories: Trajectories, dtype: torch.dtype, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """Scores are in `dtype`, the model's; `progress` is told the label of each candidate that has been scored."""
        self.trajectories, self.dtype, self.progress = trajectories, dtype, progress
        self.datasets: Mapping[str, Dataset] = trajectories.datasets
        self.sizes = {name: len(dataset.samples) for name, dataset in self.datasets.items()}

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
        scores = Scores.empty(len(candidates), {name: self.datasets[name] for name in wanted}, self.dtype)
        call = Call(unit, tuple(candidates), wanted)
        tasks = self.trajectories.numbers_of(wanted)
        self.begin()
        left = list(range(len(candidates)))
        current = next((row for row in left if candidates[row].is_current), None)
        if any(self.trajectories.tasks[number].expected is None for number in tasks):
            self._find_trajectories(call, current, tasks, scores)
            left = [row for row in left if row != current]
        first = self.first_block(unit) or 0
        self.trajectories.expect_latest_where_it_pays(len(left), first, self.architecture.n_blocks)
        parts = tuple(self.trajectories.parts_of(tasks))
        self.carry_out(call, [Work(rows, way, parts) for rows, way in self.together(call, left)], scores)
        return scores

    @property
    def state(self) -> Mapping[str, Any]:
        """See `Trajectories.state`."""
        return self.trajectories.state

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.trajectories.state = state

    def first_block(self, unit: Unit) -> int | None:
        """The first block that a unit can change; None: the embedding, or what else lies in no block."""
        blocks = [self.architecture.block_of(name) for name in unit.tensors]
        return None if None in blocks else min(block for block in blocks if block is not None)

    def tell(self, call: Call, rows: Sequence[int]) -> None:
        """Candidates have been scored; the current model, where nobody asked for it, is none of them."""
        for row in rows:
            if call.candidates[row].label:
                self.progress(call.candidates[row].label)

    @property
    @abstractmethod
    def architecture(self) -> Architecture:
        """What tensor names mean in the current model."""

    @abstractmethod
    def begin(self) -> None:
        """A call begins: the last steps may have changed the model."""

    @abstractmethod
    def together(self, call: Call, rows: Sequence[int]) -> list[tuple[tuple[int, ...], Way]]:
        """Which of the candidates `rows` are evaluated together, and in which way."""

    @abstractmethod
    def carry_out(self, call: Call, works: Sequence[Work], scores: Scores) -> None:
        """Do this work: enter the scores, and tell `trajectories` what candidates have generated."""

    def _find_trajectories(self, call: Call, current: int | None, tasks: Sequence[int], scores: Scores) -> None:
        """Score the current model, which finds its greedy tokens; others are verified along them."""
        if current is None:
            tasks = [number for number in tasks if self.trajectories.tasks[number].expected is None]
            call, current = Call(call.unit, (Candidate(""),), call.wanted), 0
            scores = Scores.empty(1, self.datasets, self.dtype)
        self.carry_out(call, [Work((current,), "alone", tuple(self.trajectories.parts_of(tasks)))], scores)
        self.trajectories.found(call.candidates[current].label)
