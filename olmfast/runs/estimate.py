"""What a run would do and what it would take, without doing it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from olmfast.config.run import RunConfig
from olmfast.evaluation.encoding import Dataset
from olmfast.evaluation.memory import Memory
from olmfast.evaluation.tasks import Task
from olmfast.observer import Observer
from olmfast.output.folder import free_bytes
from olmfast.runs.inputs import Inputs
from olmfast.search.units import STAGES, units_of
from olmfast.weights.architecture import Unit
from olmfast.weights.offspring import offspring_count
from olmfast.weights.pool import Pool, token_ids

TRIAL_TOKENS, TRIAL_SECONDS = 1024, 0.3  # of the product whose rate is measured


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
class Estimate:
    """What a run would do, and estimates of what it would take.

    `stays` counts the tensors that remain the base's, by reason; `vocabulary` maps a donor to the number of tokens that
    its tokenizer lists, all with `n_rows` rows. `memory_bytes` is the least that evaluation needs on `device`,
    `memory_limit` what it may take; `flop` counts the operations of matrix products, `flop_per_s` is their rate.
    """

    stages: dict[str, Stage]
    datasets: dict[str, tuple[str, int]]
    n_bytes: int
    output_dir: Path
    candidates: str
    n_tensors: int
    stays: dict[str, int]
    tokenizer: str
    n_rows: int
    vocabulary: dict[str, int]
    device: torch.device
    dtype: torch.dtype
    free_bytes: int
    memory_bytes: int
    memory_limit: int
    flop: float
    flop_per_s: float

    @property
    def n_candidates(self) -> int:
        """Candidates of all stages together."""
        return sum(stage.n_candidates for stage in self.stages.values())

    @property
    def seconds(self) -> float:
        """Estimated: every candidate scored in full, nothing decoded, at the rate of a bare matrix product."""
        return self.flop / self.flop_per_s

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "stages": {
                name: {"units": len(stage.units), "candidates": stage.n_candidates, "tensors": len(stage.tensors)}
                for name, stage in self.stages.items()
            },
            "candidates": self.candidates,
            "tensors": self.n_tensors,
            "tensors_that_stay": self.stays,
            "tokenizer": self.tokenizer,
            "vocabulary": {"rows": self.n_rows, "tokens": self.vocabulary},
            "datasets": {name: {"mode": m, "samples": n} for name, (m, n) in self.datasets.items()},
            "result_bytes": self.n_bytes,
            "output_dir": str(self.output_dir),
            "free_bytes": self.free_bytes,
            "memory_bytes": self.memory_bytes,
            "memory_limit_bytes": self.memory_limit,
            "flop": self.flop,
            "flop_per_s": self.flop_per_s,
            "estimated_s": self.seconds,
        }


def estimate(config: RunConfig, observer: Observer | None = None) -> Estimate:
    """Check a config and everything it names but the weights' values, and say what a run would do. Writes nothing."""
    inputs = Inputs.open(config, observer or Observer(), weights=False)
    pool, base = inputs.pool, inputs.pool[config.base_name]
    stages, settings = plan_stages(config, pool), inputs.settings
    context = pool.architecture.context
    judged, held_out = (Work.of(some.datasets.values(), context) for some in (inputs.selection, inputs.holdout))
    memory = Memory(settings.device, config.max_ram, config.max_vram)
    n_rows, hidden = base.tensors[pool.architecture.family.embedding].shape
    least = _least_memory(config, pool, stages, judged.tokens * hidden)
    return Estimate(
        stages=stages,
        datasets={n: (d.config.mode, len(d.samples)) for n, d in inputs.questions.datasets.items()},
        n_bytes=base.n_bytes,
        output_dir=config.output_dir,
        candidates=", ".join(
            f"{kind.method} {' '.join(f'{x:g}' for x in kind.values)}".strip() for kind in config.candidates
        ),
        n_tensors=len(pool.tensors),
        stays=_stays(config, pool, stages),
        tokenizer=base.name,
        n_rows=n_rows,
        vocabulary={donor.name: len(token_ids(donor.folder)) for donor in pool},
        device=settings.device,
        dtype=settings.dtype,
        free_bytes=free_bytes(config.output_dir),
        memory_bytes=memory.used + least * settings.dtype.itemsize,
        memory_limit=memory.limit,
        flop=_operations(config, pool, stages, judged, held_out),
        flop_per_s=product_rate(pool, settings.device, settings.dtype),
    )


def plan_stages(config: RunConfig, pool: Pool) -> dict[str, Stage]:
    """Stage -> the decisions it takes."""
    architecture, tensors = pool.architecture, pool.tensors
    n = min(len(pool), config.max_models or len(pool))
    n_ways = sum(max(1, len(kind.values)) for kind in config.candidates)
    # As long as whole units are swapped, the coarser before the finer, the current values are one of the donors'.
    swaps_only = n_ways == 1 and config.candidates[0].method == "swap" and not config.scales
    stages = {"base": Stage(((architecture.model_unit(tensors), len(pool)),), current_is_scored=True)}
    for index, scale in enumerate(config.walk):
        per_part = 1 + (n - (swaps_only or index == 0)) * n_ways
        units = units_of(scale, config, architecture, tensors)
        parts = [len(unit.blocks) if scale == "block" else 1 for unit in units]
        stages[STAGES[scale]] = Stage(tuple((u, per_part**n_parts) for u, n_parts in zip(units, parts, strict=True)))
    shapes = {name: pool[config.base_name].tensors[name].shape for name in tensors}
    matrices = [
        Unit(unit.name, unit.kind, (name,), unit.blocks)
        for unit in units_of("tensor", config, architecture, tensors)
        for name in unit.tensors
        if len(shapes[name]) == 2
    ]
    if config.es_svd:
        offspring = [(unit, 1 + offspring_count(min(shapes[unit.tensors[0]]))) for unit in matrices]
        stages["svd_es"] = Stage(tuple(offspring * config.es_svd_generations))
    if config.es_norm:
        offspring = [(unit, 1 + offspring_count(shapes[unit.tensors[0]][0])) for unit in matrices]
        stages["norm_es"] = Stage(tuple(offspring * config.es_norm_generations))
    return stages


def product_rate(pool: Pool, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product the size of the model's largest: its weight by 1,024 tokens."""
    shapes = [
        info.shape for name, info in pool[pool.names[0]].tensors.items() if pool.architecture.block_of(name) is not None
    ]
    rows, columns = max((shape for shape in shapes if len(shape) == 2), key=math.prod, default=(1024, 1024))
    weight = torch.ones(rows, columns, device=device, dtype=dtype)
    tokens = torch.ones(TRIAL_TOKENS, columns, device=device, dtype=dtype)
    n = 0
    with torch.inference_mode():
        (tokens @ weight.T)[0, 0].item()  # the first prepares what the others use
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < TRIAL_SECONDS:
            (tokens @ weight.T)[0, 0].item()  # waits for a GPU
            n += 1
    return n * 2 * TRIAL_TOKENS * rows * columns / elapsed


def _operations(config: RunConfig, pool: Pool, stages: Mapping[str, Stage], judged: Work, held_out: Work) -> float:
    """Two per parameter and token in the blocks, and per parameter of the head and predicted token; attention's own
    products, which grow with the square of the length, are left out."""
    architecture, base = pool.architecture, pool[config.base_name]
    routed = architecture.config.get("num_experts_per_tok", 1) / architecture.config.get("num_local_experts", 1)
    in_blocks = sum(
        math.prod(base.tensors[name].shape) * (routed if ".experts." in name else 1)
        for name in pool.tensors
        if architecture.block_of(name) is not None and not architecture.is_ignored(name)
    )
    in_head = math.prod(base.tensors[architecture.family.embedding].shape)
    whole = config.scorer == "sequential"
    passes = sum(s.n_scored if whole else s.model_passes(architecture.n_blocks) for s in stages.values())
    n_scored = sum(stage.n_scored for stage in stages.values())
    n_rows = 1 + (len(pool) > 1)  # of the closing tables: the result and the plain average, besides the donors
    through_blocks = (passes + n_rows) * judged.tokens + (len(pool) + n_rows) * held_out.tokens
    through_head = (n_scored + n_rows) * judged.labels + (len(pool) + n_rows) * held_out.labels
    return 2.0 * (in_blocks * through_blocks + in_head * through_head)


def _least_memory(config: RunConfig, pool: Pool, stages: Mapping[str, Stage], n_entering: int) -> int:
    """Values that must be held at once: the model, and for stacks one candidate of a unit and what enters its block."""
    shapes = {name: info.shape for name, info in pool[config.base_name].tensors.items()}

    def size(names: Iterable[str]) -> int:
        return sum(math.prod(shapes[name]) for name in names if not pool.architecture.is_ignored(name))

    stacked = [size(unit.tensors) for stage in stages.values() for unit in stage.units if len(unit.blocks) == 1]
    batched = config.scorer == "batched" and bool(stacked)
    return size(pool.tensors) + (max(stacked) + n_entering if batched else 0)


def _stays(config: RunConfig, pool: Pool, stages: Mapping[str, Stage]) -> dict[str, int]:
    """Why tensors remain the base's -> how many. The stage that chooses the base moves all and changes none."""
    moved = {name for key, stage in stages.items() if key != "base" for name in stage.tensors}
    of_module = {"tensor" in config.walk, config.es_svd, config.es_norm} != {False}

    def reason(name: str) -> str:
        architecture, module = pool.architecture, name.rsplit(".", 1)[0]
        if architecture.is_ignored(name):
            return "computed by the model"
        if architecture.block_of(name) is None:
            return "embedding, final norm and head: the boundary is not searched"
        if not of_module:
            return "the blocks are not searched"
        if config.skip_norm and architecture.is_norm(module):
            return "skip_norm"
        if not any(fnmatchcase(one, pattern) for pattern in config.units for one in (module, name)):
            return "no pattern of units matches"
        return "not a matrix; evolution refines only matrices"

    return dict(Counter(reason(name) for name in pool.tensors if name not in moved))
