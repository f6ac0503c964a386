"""Parameter space: the weights and densities of a merge, of every group of blocks, by CMA-ES.

As Akiba et al. (arXiv 2403.13187) and mergekit-evolve search it: numbers begin at 0.5 with a step size of 1/6, and a
generation is 4 + floor(3 ln n) points. Two distributions are followed, one on each half of the questions; the mean of
both is what is tested, and committed if it passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from olmfast.config.parameters import Varying
from olmfast.config.searches import Evolve
from olmfast.evaluation.scorer import Candidate
from olmfast.search.crossfit import TRAINED
from olmfast.search.loop import Search, Step, Trained
from olmfast.search.sampling import Point, Sampler
from olmfast.weights.architecture import Architecture, Unit
from olmfast.weights.chunks import Setting
from olmfast.weights.coefficients import TaskVectors
from olmfast.weights.expressions import Copy, Merge, merge, whole
from olmfast.weights.recipe import Recipe

START = 0.5  # of every number
GENERATIONS_PER_TEST = 5  # more tests have to be passed at smaller shares of the significance


@dataclass(frozen=True)
class Genome:
    """How the numbers of a point become the settings of every tensor's merge.

    `terms` are the models merged, `n_blocks` those of each. A point has the weights, then the densities; of each kind,
    for every set of tensors (those that a filter names, then the rest) and group of blocks, a number per term.
    """

    config: Evolve
    terms: tuple[str, ...]
    n_blocks: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(kinds, sets, groups, terms) of the numbers."""
        size = self.config.layer_granularity
        n_groups = -(-self.n_blocks // size) if size > 0 else 1
        return 1 + self.config.has_density, 1 + len(self.config.filters), n_groups, len(self.terms)

    @property
    def n_numbers(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    @property
    def population(self) -> int:
        """Points of a generation."""
        return self.config.population or 4 + math.floor(3 * math.log(max(2, self.n_numbers)))

    @property
    def bounds(self) -> Point:
        """(numbers, 2): weights and densities from 0 to 1, weights from -1 where negative ones are allowed."""
        low = np.zeros(self.shape)
        low[0] = -1.0 if self.config.allow_negative_weights else 0.0
        return np.stack([low.ravel(), np.ones(self.n_numbers)], axis=1)

    def settings(self, point: Point, tensor: str, block: int | None, is_first: bool) -> dict[str, Setting]:
        """The settings of one tensor's merge. One outside the blocks goes with the first of them or with the last."""
        own = point.reshape(self.shape)[:, self._set_of(tensor)]
        at = block if block is not None else 0 if is_first else self.n_blocks - 1
        if self.config.smooth:
            depth = at / max(1, self.n_blocks - 1)
            values = [[Varying(tuple(map(float, each))).at(depth) for each in kind.T] for kind in own]
        else:
            group = at // self.config.layer_granularity if self.config.layer_granularity > 0 else 0
            values = [list(kind[group]) for kind in own]
        found: dict[str, Setting] = {
            name: tuple(float(x) for x in kind) for name, kind in zip(("weight", "density"), values, strict=False)
        }
        if self.config.merge_method == "linear" and self.config.normalize is not False and not any(values[0]):
            found["weight"] = (1.0,) * len(self.terms)  # nothing of every model is as much of each
        if self.config.normalize is not None:
            found["normalize"] = self.config.normalize
        return found

    def _set_of(self, tensor: str) -> int:
        filters = self.config.filters
        return next((index for index, wanted in enumerate(filters) if wanted in tensor), len(filters))


class ParameterSearch:
    """The search of a config's `evolve`, on the task vectors of its models; `donors` are the models, the base first."""

    def __init__(self, search: Search, evolve: Evolve, vectors: TaskVectors, donors: Sequence[str]) -> None:
        architecture = search.architecture
        self.search, self.config, self.vectors = search, evolve, vectors
        terms = tuple(donors) if evolve.merge_method == "linear" else vectors.donors
        self.genome = Genome(evolve, terms, architecture.n_blocks)
        self.unit = replace(architecture.model_unit(search.tensors), name="parameters")

    def run(self) -> None:
        """Search until the generations or the budget are spent. What passed a test is kept in the record."""
        if not self.vectors.tensors or not self.genome.terms:
            return
        self.search.take(Step("start", "start", self.unit, self._starts))
        self.search.record.keep_snapshot("start")
        samplers = [self._sampler(index) for index in range(2)]
        for number in range(1, self.config.generations + 1):
            for sampler in samplers:
                sampler.take(number)
            if number % GENERATIONS_PER_TEST == 0 or number == self.config.generations:
                self._test(number, [sampler.mean for sampler in samplers])

    def _starts(self) -> list[Candidate]:
        """The best donor, and the point that both distributions begin at."""
        return [Candidate("best donor"), self._candidate("all numbers 0.5", np.full(self.genome.n_numbers, START))]

    def _sampler(self, index: int) -> Sampler:
        assert self.search.crossfit is not None
        half, genome = list(self.search.crossfit.halves)[index], self.genome
        start = np.full(genome.n_numbers, START)
        key, sigma = f"evolve/{index + 1}", self.config.sigma
        return Sampler(
            self.search, self.unit, key, half, self._candidate, start, sigma, genome.bounds, genome.population
        )

    def _test(self, number: int, means: Sequence[Point]) -> None:
        points = [*means, np.mean(means, axis=0)]

        def propose() -> list[Candidate]:
            return [Candidate("current"), *map(self._candidate, TRAINED, points)]

        step = Step(f"evolve/{number}", "evolve", self.unit, propose, trained=Trained(0.0))
        if self.search.take(step).changed:
            self.search.record.keep_snapshot(f"generation {number}")

    def _candidate(self, label: str, point: Point) -> Candidate:
        merges = {name: self._merge(point, name) for name in self.vectors.tensors}
        return Candidate(label, recipe=self._base.with_values(merges))

    @cached_property
    def _base(self) -> Recipe:
        return whole(self.search.config.base_name, self.search.sources.pool.tensors)

    def _merge(self, point: Point, tensor: str) -> Merge:
        architecture, method = self.search.architecture, self.config.merge_method
        module, head = tensor.rsplit(".", 1)[0], architecture.family.head.rsplit(".", 1)[0]
        is_first = module != head and not architecture.is_norm(module)
        settings = self.genome.settings(point, tensor, architecture.block_of(tensor), is_first)
        if method == "dare_ties":
            settings |= {"seed": self.search.config.seed, "stream": tensor}
        terms = [Copy(term, tensor) for term in self.genome.terms]
        return merge(method, terms, None if method == "linear" else self.vectors.anchor_of(tensor), **settings)


def evolve_steps(
    evolve: Evolve, donors: Sequence[str], architecture: Architecture, tensors: Sequence[str]
) -> Iterator[tuple[str, Unit, int]]:
    """Stage, unit and about how many evaluations each step takes, in order."""
    unit = replace(architecture.model_unit(tensors), name="parameters")
    genome = Genome(evolve, tuple(donors), architecture.n_blocks)
    yield "start", unit, 2
    for number in range(1, evolve.generations + 1):
        for _ in range(2):
            yield "evolve", unit, max(1, genome.population // 2)
        if number % GENERATIONS_PER_TEST == 0 or number == evolve.generations:
            yield "evolve", unit, 2
