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

from olmfast.config.originals import BOUNDARY
from olmfast.config.resources import Budget
from olmfast.config.run import RunConfig
from olmfast.evaluation.blueprint import draw_up
from olmfast.evaluation.memory import least_streamed
from olmfast.evaluation.metrics import BOUNDED, standard_error
from olmfast.evaluation.open import is_streamed
from olmfast.observer import Observer
from olmfast.output.folder import free_bytes
from olmfast.runs.inputs import Inputs
from olmfast.runs.steps import Stage, Work, plan_stages, plan_steps
from olmfast.search.costs import PlannedStep, affordable, evaluations, within
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool
from olmfast.weights.tokenizer_files import token_ids

TRIAL_TOKENS, TRIAL_SECONDS = 1024, 0.3  # of the product whose rate is measured
MUCH_FASTER = 1.5  # from here on another dtype's products are worth a word


@dataclass(frozen=True)
class Estimate:
    """What a run would do, and estimates of what it would take.

    `stages` and `steps` are what the search does at most, `budget` what it may spend. `stays` counts the tensors that
    remain the base's, by reason; `vocabulary` maps a donor to the number of tokens that its tokenizer lists, all with
    `n_rows` rows. `memory_bytes` is the least that evaluation needs on `device`, `memory_limit` what it may take, and
    where the model of `model_bytes` does not fit, the run `streams` its blocks;
    `rates` are operations of matrix products per second, in `dtype` and others, and a step's work is counted in them.
    `notes` say how the config was read.
    """

    stages: dict[str, Stage]
    steps: tuple[PlannedStep, ...]
    budget: Budget | None
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
    model_bytes: int
    streams: bool
    rates: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def n_candidates(self) -> int:
        """Candidates of all stages together, at most."""
        return evaluations(self.steps)

    @property
    def n_evaluations(self) -> int:
        """Those of them that the budget pays for; a budget of time, at the rate of a bare matrix product."""
        n = self.n_candidates
        if self.budget is not None and self.budget.evaluations is not None:
            n = min(n, self.budget.evaluations)
        if self.budget is not None and self.budget.seconds is not None:
            n = min(n, affordable(self.steps, self.budget.seconds * self.flop_per_s))
        return n

    @property
    def within_budget(self) -> dict[str, int]:
        """Stage -> its candidates that the budget pays for."""
        found = dict.fromkeys(self.stages, 0)
        for step in within(self.steps, self.n_evaluations):
            if step.counts:
                found[step.stage] += step.n_candidates
        return found

    @property
    def flop_per_s(self) -> float:
        """The rate of a matrix product in the dtype of evaluation."""
        return self.rates[_name(self.dtype)]

    @property
    def flop(self) -> float:
        """Operations of the matrix products of all that the budget pays for, and of what it does not limit."""
        return sum(step.work for step in within(self.steps, self.n_evaluations))

    @property
    def seconds(self) -> float:
        """Estimated: every candidate scored in full, nothing decoded, at the rate of a bare matrix product."""
        return self.flop / self.flop_per_s

    @property
    def scoring_s(self) -> float:
        """The part of `seconds` that is no search: donors on held-out questions, and the closing tables."""
        return sum(step.work for step in self.steps if not step.counts) / self.flop_per_s

    @property
    def faster_dtype(self) -> tuple[str, float] | None:
        """Another dtype whose products are much faster here, and how many times."""
        dtype = max(self.rates, key=self.rates.__getitem__)
        times = self.rates[dtype] / self.flop_per_s
        return (dtype, times) if times >= MUCH_FASTER else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "notes": list(self.notes),
            "stages": {
                name: {"units": len(stage.units), "candidates": stage.n_candidates, "tensors": len(stage.tensors)}
                | ({"within_budget": self.within_budget[name]} if self.budget is not None else {})
                for name, stage in self.stages.items()
            },
            "budget": self.budget and self.budget.model_dump(exclude_none=True),
            "evaluations": self.n_evaluations,
            "evaluations_at_most": self.n_candidates,
            "candidates": self.candidates,
            "tensors": self.n_tensors,
            "tensors_that_stay": self.stays,
            "tokenizer": self.tokenizer,
            "vocabulary": {"rows": self.n_rows, "tokens": self.vocabulary},
            "datasets": {
                name: {"mode": mode, "samples": n} | ({"standard_error": standard_error(n)} if mode in BOUNDED else {})
                for name, (mode, n) in self.datasets.items()
            },
            "result_bytes": self.n_bytes,
            "output_dir": str(self.output_dir),
            "free_bytes": self.free_bytes,
            "memory_bytes": self.memory_bytes,
            "memory_limit_bytes": self.memory_limit,
            "model_bytes": self.model_bytes,
            "streams": self.streams,
            "flop": self.flop,
            "flop_per_s": self.flop_per_s,
            "flop_per_s_by_dtype": self.rates,
            "estimated_s": self.seconds,
            "estimated_scoring_s": self.scoring_s,
        }


def estimate(config: RunConfig, observer: Observer | None = None) -> Estimate:
    """Check a config and everything it names but the weights' values, and say what a run would do. Writes nothing."""
    inputs = Inputs.open(config, observer or Observer(), weights=False)
    pool, base = inputs.pool, inputs.pool[config.base_name]
    stages, settings = plan_stages(config, pool), inputs.settings
    judged = Work.of(inputs.selection.datasets.values(), pool.architecture.context)
    memory, blueprint = settings.memory(), draw_up(whole(base.name, pool.tensors), pool, settings.dtype)
    streams = is_streamed(blueprint, settings)
    n_rows, hidden = base.tensors[pool.architecture.family.embedding].shape
    least = _least_memory(config, pool, stages, judged.tokens * hidden) * settings.dtype.itemsize
    return Estimate(
        notes=config.notes,
        stages=stages,
        steps=tuple(plan_steps(config, inputs)),
        budget=config.budget,
        datasets={n: (d.config.mode, len(d.samples)) for n, d in inputs.questions.datasets.items()},
        n_bytes=base.n_bytes,
        output_dir=config.output_dir,
        candidates=", ".join(
            f"{kind.method} {' '.join(f'{x:g}' for x in kind.values)}".strip()
            for kind in (config.candidates if config.walk or not config.is_tested else [])
        ),
        n_tensors=len(pool.tensors),
        stays=_stays(config, pool, stages),
        tokenizer=base.name,
        n_rows=n_rows,
        vocabulary={donor.name: len(token_ids(donor.tokenizer_folder)) for donor in pool},
        device=settings.device,
        dtype=settings.dtype,
        free_bytes=free_bytes(config.output_dir),
        memory_bytes=memory.used
        + (least_streamed(blueprint.outside_bytes, blueprint.block_bytes) if streams else least),
        memory_limit=memory.limit,
        model_bytes=blueprint.n_bytes,
        streams=streams,
        rates={
            _name(dtype): product_rate(pool, settings.device, dtype)
            for dtype in dict.fromkeys((settings.dtype, torch.float32, torch.bfloat16))
        },
    )


def product_rate(pool: Pool, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product the size of the model's largest: its weight by 1,024 tokens."""
    shapes = [
        info.shape for name, info in pool[pool.names[0]].tensors.items() if pool.architecture.block_of(name) is not None
    ]
    rows, columns = max((shape for shape in shapes if len(shape) == 2), key=math.prod, default=(1024, 1024))
    weight = torch.ones(rows, columns, device=device, dtype=dtype)
    tokens = torch.ones(TRIAL_TOKENS, columns, device=device, dtype=dtype)
    n, elapsed = 0, 0.0
    with torch.inference_mode():
        (tokens @ weight.T)[0, 0].item()  # the first prepares what the others use
        started = time.perf_counter()
        while elapsed < TRIAL_SECONDS or not n:
            (tokens @ weight.T)[0, 0].item()  # waits for a GPU
            n, elapsed = n + 1, time.perf_counter() - started
    return n * 2 * TRIAL_TOKENS * rows * columns / elapsed


def _least_memory(config: RunConfig, pool: Pool, stages: Mapping[str, Stage], n_entering: int) -> int:
    """Values that must be held at once: the model, the blocks of others where paths use them, and for stacks one
    candidate of a unit and what enters its block."""
    shapes = {name: info.shape for name, info in pool[config.base_name].tensors.items()}

    def size(names: Iterable[str]) -> int:
        return sum(math.prod(shapes[name]) for name in names if not pool.architecture.is_ignored(name))

    stacked = [size(unit.tensors) for stage in stages.values() for unit in stage.units if len(unit.blocks) == 1]
    batched = config.scorer == "batched" and bool(stacked)
    in_blocks = size(name for name in pool.tensors if pool.architecture.block_of(name) is not None)
    others = len(config.models) - 1 if config.dataflow is not None else 0  # whose blocks paths use too
    return size(pool.tensors) + others * in_blocks + (max(stacked) + n_entering if batched else 0)


def _stays(config: RunConfig, pool: Pool, stages: Mapping[str, Stage]) -> dict[str, int]:
    """Why tensors remain the base's -> how many. The stage that chooses the base moves all and changes none."""
    moved = {name for key, stage in stages.items() if key != "base" for name in stage.tensors}
    of_module = {"tensor" in config.walk, config.es_svd, config.es_norm} != {False}

    def reason(name: str) -> str:
        architecture, module = pool.architecture, name.rsplit(".", 1)[0]
        if architecture.is_ignored(name):
            return "computed by the model"
        if architecture.block_of(name) is None and BOUNDARY not in config.units:
            return "embedding, final norm and head: the boundary is not searched"
        if not of_module:
            return "the blocks are not searched"
        if config.skip_norm and architecture.is_norm(module):
            return "skip_norm"
        if not any(fnmatchcase(one, pattern) for pattern in config.units for one in (module, name)):
            return "no pattern of units matches"
        return "not a matrix; evolution refines only matrices"

    return dict(Counter(reason(name) for name in pool.tensors if name not in moved))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
