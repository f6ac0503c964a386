"""Moves of the donors' coefficients: along the gradient, by CMA-ES, and of one donor in one block at a time.

Offsets from the current coefficients are (donors, columns), a column for each tensor, or for each row of a block's
matrices; the columns of a group move together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch

from olmfast.evaluation.scorer import Candidate, Direction, side_by_side
from olmfast.search.crossfit import TRAINED, CrossFit
from olmfast.search.halves import Indices
from olmfast.search.loop import GRADIENT, N_TRAINED, Search, Step, Trained
from olmfast.search.sampling import Point, Sampler
from olmfast.weights.architecture import Architecture, Unit
from olmfast.weights.coefficients import NONE, ByRows, TaskVectors
from olmfast.weights.draws import normal
from olmfast.weights.expressions import Copy, whole
from olmfast.weights.recipe import Recipe

ROW = "row"  # the grain of which each row of a matrix is a group
# Grain -> gradient steps: each third of the depth, its attention and its MLP apart; each row of a matrix; each tensor.
GRAINS = {"part": 16, ROW: 200, "tensor": 60}
# How far a coefficient moves in a step of a steady gradient: what few questions say of a row is mostly luck.
RATES = {"part": 0.1, ROW: 0.05, "tensor": 0.1}
FEWEST = 10  # steps worth taking: a grain that has more takes as many of them as the budget pays for
BATCH = 3  # questions of each dataset in a gradient step: what a budget pays for is many small steps
DECAYS = 0.9, 0.99  # of the gradient's means, Adam (arXiv 1412.6980)
SIGMA = 0.15  # of CMA-ES at first
GENERATIONS = 4
SINGLE_MOVES = (-0.25, 0.25)


class Coefficients:
    """The moves of one search."""

    def __init__(self, search: Search, vectors: TaskVectors) -> None:
        self.search, self.vectors = search, vectors
        self.unit = search.architecture.model_unit(search.tensors)

    @property
    def crossfit(self) -> CrossFit:
        """The rules of the search."""
        assert self.search.crossfit is not None
        return self.search.crossfit

    @cached_property
    def teachers(self) -> dict[str, Candidate]:
        """The best donor of each dataset that tells donors apart."""
        scores, found = self.search.record.steps["base"].metrics, dict[str, Candidate]()
        for name in self.crossfit.scale.spans:
            known = [donor for donor in self.search.donors if donor in scores[name]]
            best = min(known, key=lambda donor: _known(scores[name][donor]))
            found[name] = Candidate(best, recipe=whole(best, self.search.sources.pool.tensors))
        return found

    # Along the gradient

    def descend(self, grain: str, number: int) -> bool:
        """Follow the gradient of each half's loss from the current coefficients; true if the mean of both passes."""
        halves = list(self.crossfit.halves)
        n_asked = sum(min(BATCH, len(own)) for half in halves for own in self._counting(half).values())
        cost = GRADIENT * n_asked / sum(self.search.scorer.sizes.values())
        is_first = number == 1 and grain == next(iter(GRAINS))
        left = self.search.affordable("gradient") - N_TRAINED - is_first
        steps = int(min(GRAINS[grain], max(FEWEST, left / cost)))

        def propose() -> list[Candidate]:
            if is_first:
                self.search.count_lessons(self.teachers)
            named = zip(halves, "12", self.search.origins[:2], strict=True)
            jobs = [partial(self._follow, half, name, origin, grain, number, steps) for half, name, origin in named]
            found = side_by_side(self.search.scorer, jobs)
            return self._trained(found, self._rows(grain))

        key = f"gradient/{grain}/{number}"
        return self._take_trained(key, "gradient", grain, cost * steps + is_first, propose)

    def _follow(self, half: Indices, name: str, origin: Recipe, grain: str, number: int, steps: int) -> torch.Tensor:
        """Offsets (donors, columns) after a descent from a recipe on a half's questions: the mean over its second half
        of steps."""
        groups, rate, rows = self._groups(grain), RATES[grain], self._rows(grain)
        batches = self._batches(self._counting(half), steps, f"{name}/{grain}/{number}")
        offsets = torch.zeros(len(self.vectors.donors), int(groups.max()) + 1, dtype=torch.float64)
        first, second, total = torch.zeros_like(offsets), torch.zeros_like(offsets), torch.zeros_like(offsets)
        for step, questions in enumerate(batches, 1):
            slopes = self._slopes(origin, offsets[:, groups], questions, rows)
            # Slopes that overflowed say nothing of where to go.
            gradient = torch.zeros_like(offsets).index_add_(1, groups, slopes.nan_to_num(0.0, 0.0, 0.0))
            first = DECAYS[0] * first + (1 - DECAYS[0]) * gradient
            second = DECAYS[1] * second + (1 - DECAYS[1]) * gradient.square()
            size = (second / (1 - DECAYS[1] ** step)).sqrt()
            offsets = offsets - rate * first / (1 - DECAYS[0] ** step) / (size + 1e-12)
            if step > steps // 2:
                total += offsets
        return (total / (steps - steps // 2))[:, groups]

    def _slopes(self, origin: Recipe, offsets: torch.Tensor, questions: Indices, rows: ByRows) -> torch.Tensor:
        """The loss's slopes by the coefficients, (donors, columns) float64."""
        vectors, reference, n = self.vectors, self.vectors.reference, len(self.vectors.donors)
        axes = {name: rows[name][1] if name in rows else None for name in vectors.tensors}
        directions = {
            name: [Direction(Copy(reference, name), Copy(donor, name), axis) for donor in vectors.donors]
            for name, axis in axes.items()
        }
        moved, current = origin.with_values(vectors.moved(origin, offsets, rows)), self.search.recipe
        values = {name: value for name, value in moved.tensors.items() if value != current.tensors.get(name)}
        found = self.search.slopes(values, directions, questions, self.teachers)
        return vectors.from_reference(torch.cat([found.along[name].view(n, -1) for name in vectors.tensors], dim=1))

    def _rows(self, grain: str) -> ByRows:
        """The matrices whose rows move apart: those of the blocks. Words that no question has say nothing of theirs."""
        if grain != ROW:
            return NONE
        search, found = self.search, {}
        for name in self.vectors.tensors:
            if search.is_matrix(name) and search.architecture.block_of(name) is not None:
                axis = search.architecture.row_axis(name)
                found[name] = search.sources.pool[self.vectors.reference].tensors[name].shape[axis], axis
        return found

    def _batches(self, questions: Indices, n: int, address: str) -> Iterator[Indices]:
        """n batches of `BATCH` questions of each dataset, all of which come round before one comes again."""
        streams = {name: _endless(own, self.search.config.seed, address, name) for name, own in questions.items()}
        for _ in range(n):
            yield {
                name: sorted(next(streams[name]) for _ in range(min(BATCH, len(questions[name])))) for name in streams
            }

    def _counting(self, questions: Indices) -> Indices:
        """Of the datasets that have a span."""
        return {name: own for name, own in questions.items() if name in self.crossfit.scale.spans}

    # By CMA-ES

    def evolve(self, grain: str, number: int) -> bool:
        """Sample coefficients on each half by CMA-ES (the package cmaes); the distribution's mean is the candidate."""
        groups, key = self._groups(grain), f"evolution/{grain}/{number}"
        n_groups, n_donors = int(groups.max()) + 1, len(self.vectors.donors)
        means = []
        for half, name, origin in zip(self.crossfit.halves, "12", self.search.origins[:2], strict=True):
            means.append(self._sample(half, origin, f"{key}/{name}", grain, n_donors, n_groups)[:, groups])
        return self._take_trained(key, "evolution", grain, 0.0, lambda: self._trained(means, NONE))

    def _sample(
        self, half: Indices, origin: Recipe, key: str, grain: str, n_donors: int, n_groups: int
    ) -> torch.Tensor:
        groups = self._groups(grain)

        def candidate(label: str, point: Point) -> Candidate:
            offsets = torch.from_numpy(point).view(n_donors, n_groups)
            return Candidate(label, recipe=origin.with_values(self.vectors.moved(origin, offsets[:, groups])))

        unit = Unit(grain, "model", self.unit.tensors, self.unit.blocks)
        sampler = Sampler(self.search, unit, key, half, candidate, np.zeros(n_donors * n_groups), SIGMA)
        for generation in range(GENERATIONS):
            sampler.take(generation)
        return torch.from_numpy(sampler.mean).view(n_donors, n_groups)

    # One donor in one block

    def move_blocks(self, number: int) -> bool:
        """In each block, the one in which donors differ most first, move each donor's coefficient a little."""
        changed = False
        blocks = [self.search.architecture.window_unit(self.search.tensors, [i]) for i in range(self._n_blocks)]
        size = {unit.name: sum(x * x for x in self.vectors.distances(unit.tensors).values()) for unit in blocks}
        for unit in sorted(blocks, key=lambda unit: (-size[unit.name], unit.blocks)):
            propose = partial(self._moves, unit)
            changed |= self.search.take(Step(f"moves/{unit.name}/{number}", "moves", unit, propose)).changed
        return changed

    @property
    def _n_blocks(self) -> int:
        return self.search.architecture.n_blocks

    def _moves(self, unit: Unit) -> list[Candidate]:
        own = set(unit.tensors)
        inside = torch.tensor([float(name in own) for name in self.vectors.tensors], dtype=torch.float64)
        found = [Candidate("current")]
        for row, donor in enumerate(self.vectors.donors):
            for step in SINGLE_MOVES:
                offsets = torch.zeros(len(self.vectors.donors), len(inside), dtype=torch.float64)
                offsets[row] = step * inside
                found.append(Candidate(f"{donor} {step:+g}", self.vectors.moved(self.search.recipe, offsets)))
        return found

    # What they share

    def _take_trained(self, key: str, stage: str, grain: str, cost: float, propose) -> bool:  # type: ignore[no-untyped-def]
        unit = Unit(grain, "model", self.unit.tensors, self.unit.blocks)
        return self.search.take(Step(key, stage, unit, propose, trained=Trained(cost))).changed

    def _trained(self, offsets: Sequence[torch.Tensor], rows: ByRows) -> list[Candidate]:
        """The incumbent, what each half led to, and the mean of both."""
        every = [*offsets, torch.stack(list(offsets)).mean(dim=0)]
        moved = [
            origin.with_values(self.vectors.moved(origin, own, rows))
            for origin, own in zip(self.search.origins, every, strict=True)
        ]
        return [
            Candidate("current"),
            *(Candidate(label, recipe=own) for label, own in zip(TRAINED, moved, strict=True)),
        ]

    def _groups(self, grain: str) -> torch.Tensor:
        """The group that each column belongs to, (columns,)."""
        tensors = self.vectors.tensors
        if grain in ("tensor", ROW):
            rows = self._rows(grain)
            return torch.arange(sum(rows[name][0] if name in rows else 1 for name in tensors))
        if grain == "model":
            return torch.zeros(len(tensors), dtype=torch.long)
        architecture = self.search.architecture
        depth = {name: unit.name for unit in architecture.depth_units(tensors) for name in unit.tensors}
        kind = {name: unit.name for unit in architecture.kind_units(tensors) for name in unit.tensors}
        named = [(depth.get(name, ""), kind.get(name, "")) for name in tensors]
        known = {group: index for index, group in enumerate(dict.fromkeys(named))}
        return torch.tensor([known[group] for group in named])


def joint_steps(n_donors: int, architecture: Architecture, tensors: Sequence[str]) -> Iterator[tuple[str, Unit, int]]:
    """Stage, unit and about how many evaluations each move of a round takes, in order."""
    whole = architecture.model_unit(tensors)
    for grain, steps in GRAINS.items():
        # Each half of two may have a third of its questions in a batch, and the candidates are scored besides.
        teaching = int(grain == next(iter(GRAINS)))
        yield "gradient", replace(whole, name=grain), max(1, round(GRADIENT * steps / 3)) + N_TRAINED + teaching
    population = 4 + int(3 * math.log(n_donors))
    for _ in range(2 * GENERATIONS):
        yield "evolution", replace(whole, name="model"), max(1, population // 2)
    yield "evolution", replace(whole, name="model"), 2
    for block in range(architecture.n_blocks):
        yield "moves", architecture.window_unit(tensors, [block]), 1 + len(SINGLE_MOVES) * n_donors


def _known(score: float | None) -> float:
    return math.inf if score is None else score


def _endless(questions: Sequence[int], *address: object) -> Iterator[int]:
    """The questions in a random order, again and again."""
    order = [questions[i] for i in normal(len(questions), *address).argsort().tolist()]
    while True:
        yield from order
