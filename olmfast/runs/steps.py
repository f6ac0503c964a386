"""The steps that a run takes at most, in order, and the work of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from olmfast.config.resources import Budget
from olmfast.config.run import RunConfig
from olmfast.evaluation.encoding import Dataset
from olmfast.evaluation.tasks import Task
from olmfast.kernels import offspring_count
from olmfast.runs.inputs import Inputs
from olmfast.search.coefficients import joint_steps
from olmfast.search.costs import PlannedStep, Schedule
from olmfast.search.joint import N_STARTS
from olmfast.search.parameters import evolve_steps
from olmfast.search.ranges import repeat_steps
from olmfast.search.units import STAGES, units_of
from olmfast.weights.architecture import Unit
from olmfast.weights.pool import Pool

# What is scored besides the search, as observers are told it.
SELECTION, HELD_OUT = "selection", "held-out"
DONORS, CLOSING = "donors", "result"


@dataclass(frozen=True)
class Stage:
    """The decisions of one stage: the unit of each, and how many candidates it has at most, the current one included.

    `current_is_scored`: the current model has no scores yet and is scored too; in all stages but the first it has.
    """

    steps: tuple[tuple[Unit, int], ...]
    current_is_scored: bool = False

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, each once, however many decisions it has."""
        return tuple(dict.fromkeys(unit for unit, _ in self.steps))

    @property
    def n_candidates(self) -> int:
        """Candidates at most; a step has fewer where donors' bytes are equal."""
        return sum(n for _, n in self.steps)

    @property
    def tensors(self) -> frozenset[str]:
        """The tensors that may change."""
        return frozenset(name for unit, _ in self.steps for name in unit.tensors)

    @property
    def n_scored(self) -> int:
        """Candidates that are run through the model."""
        return sum(self._scored(n) for _, n in self.steps)

    def model_passes(self, n_blocks: int) -> float:
        """What scoring takes in passes through all blocks: a candidate goes through those from its unit on."""
        return sum(self._scored(n) * (1 - min(unit.blocks, default=0) / n_blocks) for unit, n in self.steps)

    def _scored(self, n: int) -> int:
        return n if self.current_is_scored else n - 1


@dataclass(frozen=True)
class Work:
    """What one pass of whole datasets through the model takes: input tokens, and tokens that are predicted."""

    tokens: int
    labels: int

    @classmethod
    def of(cls, datasets: Iterable[Dataset], context: int) -> Work:
        """Prompts, and responses at their maximum length."""
        tasks = [Task.of(d.name, i, d, context) for d in datasets for i in range(len(d.samples))]
        return cls(sum(len(task.sample.prompt) + task.limit - 1 for task in tasks), sum(task.limit for task in tasks))


@dataclass(frozen=True)
class Operations:
    """What a token takes: two operations per parameter of the blocks, and of the head if it is predicted.

    Attention's own products, which grow with the square of the length, are left out.
    """

    in_blocks: float
    in_head: int

    @classmethod
    def of(cls, config: RunConfig, pool: Pool) -> Operations:
        """Of the base; experts as many as a token is sent to."""
        architecture, base = pool.architecture, pool[config.base_name]
        routed = architecture.config.get("num_experts_per_tok", 1) / architecture.config.get("num_local_experts", 1)
        in_blocks = sum(
            math.prod(base.tensors[name].shape) * (routed if ".experts." in name else 1)
            for name in pool.tensors
            if architecture.block_of(name) is not None and not architecture.is_ignored(name)
        )
        return cls(2.0 * in_blocks, 2 * math.prod(base.tensors[architecture.family.embedding].shape))

    def count(self, passes: float, n_candidates: int, work: Work) -> float:
        """Of candidates that together pass through all blocks so many times."""
        return self.in_blocks * passes * work.tokens + self.in_head * n_candidates * work.labels


def plan_stages(config: RunConfig, pool: Pool) -> dict[str, Stage]:
    """Stage -> the decisions it takes."""
    decisions: dict[str, list[tuple[Unit, int]]] = {}
    for stage, unit, n in _decisions(config, pool):
        decisions.setdefault(stage, []).append((unit, n))
    return {stage: Stage(tuple(taken), current_is_scored=stage == "base") for stage, taken in decisions.items()}


def plan_steps(config: RunConfig, inputs: Inputs) -> list[PlannedStep]:
    """Every step in order, scoring that does not count as evaluations included; their work is operations."""
    pool = inputs.pool
    context, n_blocks = pool.architecture.context, pool.architecture.n_blocks
    judged, held_out = (Work.of(some.datasets.values(), context) for some in (inputs.selection, inputs.holdout))
    operations = Operations.of(config, pool)
    n_donors = len(config.models) - len(pool.blocks_only)
    n_closing = 1 + (n_donors > 1) + config.is_tested  # the result, the plain average, the start
    steps = []
    if held_out.tokens:
        n = n_donors
        steps.append(PlannedStep(HELD_OUT, DONORS, n, operations.count(n, n, held_out), counts=False))
    for stage, unit, n in _decisions(config, pool):
        one = Stage(((unit, n),), current_is_scored=stage == "base")
        passes = one.n_scored if config.scorer == "sequential" else one.model_passes(n_blocks)
        steps.append(PlannedStep(stage, unit.name, n, operations.count(passes, one.n_scored, judged)))
    for stage, work, like in ((SELECTION, judged, "base"), (HELD_OUT, held_out, HELD_OUT)):
        if work.tokens:
            n = n_closing + (n_donors if stage == SELECTION else 0)  # whose answers one by one are wanted again
            closing = operations.count(n, n, work)
            steps.append(PlannedStep(stage, CLOSING, n, closing, counts=False, like=like))
    return steps


def schedule(config: RunConfig, inputs: Inputs, done: float, spent_s: float) -> Schedule:
    """The steps of a run, after `done` evaluations and `spent_s` seconds of earlier sessions."""
    budget = config.budget or Budget()
    seconds = None if budget.seconds is None else budget.seconds - spent_s
    return Schedule(tuple(plan_steps(config, inputs)), done, budget.evaluations, seconds)


def _decisions(config: RunConfig, pool: Pool) -> Iterator[tuple[str, Unit, int]]:
    """Stage, unit and the most candidates of each decision, in the order in which a run takes them."""
    architecture, tensors = pool.architecture, pool.tensors
    n = min(len(pool), config.max_models or len(pool))
    n_ways = sum(max(1, len(kind.values)) for kind in config.candidates)
    # As long as whole units are swapped, the coarser before the finer, the current values are one of the donors'.
    swaps_only = n_ways == 1 and config.candidates[0].method == "swap" and not config.scales
    n_donors = len(config.models)
    yield "base", architecture.model_unit(tensors), n_donors - len(pool.blocks_only)
    if config.is_joint:
        whole = architecture.model_unit(tensors)
        yield "start", whole, 1 + N_STARTS + (config.start is not None)
        for stage, unit, count in joint_steps(n_donors, architecture, tensors):
            yield stage, unit, count
    if config.evolve is not None:
        yield from evolve_steps(config.evolve, config.models, architecture, tensors)
    if config.dataflow is not None and not config.dataflow.repeat:
        n_entries = config.dataflow.passes * n_donors * architecture.n_blocks
        for _ in range(config.dataflow.n_generations):  # each on half of the questions
            yield "paths", architecture.model_unit(tensors), config.dataflow.population_of(n_entries) // 2
    elif config.dataflow is not None:
        for stage, count in repeat_steps(architecture.n_blocks, config.dataflow):
            yield stage, architecture.model_unit(tensors), count
    for index, scale in enumerate(config.walk):
        per_part = 1 + (n - (swaps_only or index == 0)) * n_ways
        for unit in units_of(scale, config, architecture, tensors):
            yield STAGES[scale], unit, per_part ** (len(unit.blocks) if scale == "block" else 1)
            if scale == "tensor":
                yield from _refinements(config, pool, unit)
    if "tensor" not in config.walk:
        for unit in units_of("tensor", config, architecture, tensors):
            yield from _refinements(config, pool, unit)


def _refinements(config: RunConfig, pool: Pool, unit: Unit) -> Iterator[tuple[str, Unit, int]]:
    """The generations of a module's matrices."""
    for name in unit.tensors:
        shape = pool[config.base_name].tensors[name].shape
        if len(shape) == 2:
            matrix = Unit(unit.name, unit.kind, (name,), unit.blocks)
            for _ in range(config.es_svd_generations if config.es_svd else 0):
                yield "svd_es", matrix, 1 + offspring_count(min(shape))
            for _ in range(config.es_norm_generations if config.es_norm else 0):
                yield "norm_es", matrix, 1 + offspring_count(shape[0])
