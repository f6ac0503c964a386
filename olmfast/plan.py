"""What a run would do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmfast.config import RunConfig
from olmfast.inputs import Inputs
from olmfast.search.evolve import offspring_count
from olmfast.search.stage import Observer
from olmfast.search.swap import STAGES, units_of
from olmfast.weights.pool import Pool


@dataclass(frozen=True)
class Plan:
    """What a run would do: stage -> (units, candidates), and what it reads and writes."""

    stages: dict[str, tuple[int, int]]
    datasets: dict[str, tuple[str, int]]
    n_bytes: int
    output_dir: Path

    @property
    def n_candidates(self) -> int:
        """Candidates of all stages together."""
        return sum(n for _, n in self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "stages": {name: {"units": u, "candidates": n} for name, (u, n) in self.stages.items()},
            "datasets": {name: {"mode": m, "samples": n} for name, (m, n) in self.datasets.items()},
            "result_bytes": self.n_bytes,
            "output_dir": str(self.output_dir),
        }


def plan(config: RunConfig, observer: Observer | None = None) -> Plan:
    """Check a config and everything it names, and say what a run would do. Writes nothing."""
    inputs = Inputs.open(config, observer or Observer())
    datasets: dict[str, tuple[str, int]] = {
        name: (d.config.mode, len(d.samples)) for name, d in {**inputs.datasets, **inputs.holdout}.items()
    }
    n_bytes = inputs.pool[config.base_name].n_bytes
    return Plan(plan_stages(config, inputs.pool), datasets, n_bytes, config.output_dir)


def plan_stages(config: RunConfig, pool: Pool) -> dict[str, tuple[int, int]]:
    """Stage -> (units, candidates at most); a step has fewer where donors' bytes are equal."""
    architecture, tensors = pool.architecture, pool.tensors
    n = min(len(pool), config.max_models or len(pool))
    n_ways = sum(max(1, len(kind.values)) for kind in config.candidates)
    # As long as whole units are swapped, the coarser before the finer, what is there is one of the donors.
    swaps_only = n_ways == 1 and config.candidates[0].method == "swap" and not config.scales
    stages = {"base": (1, len(pool))}
    for index, scale in enumerate(config.walk):
        units = units_of(scale, config, architecture, tensors)
        per_part = 1 + (n - (swaps_only or index == 0)) * n_ways
        parts = [len(unit.blocks) if scale == "block" else 1 for unit in units]
        stages[STAGES[scale]] = (len(units), sum(per_part**n_parts for n_parts in parts))
    units = units_of("tensor", config, architecture, tensors)
    shapes = [pool[config.base_name].tensors[name].shape for unit in units for name in unit.tensors]
    matrices = [shape for shape in shapes if len(shape) == 2]
    if config.es_svd:
        per = sum(1 + offspring_count(min(shape)) for shape in matrices)
        stages["svd_es"] = (len(matrices), per * config.es_svd_generations)
    if config.es_norm:
        per = sum(1 + offspring_count(shape[0]) for shape in matrices)
        stages["norm_es"] = (len(matrices), per * config.es_norm_generations)
    return stages
