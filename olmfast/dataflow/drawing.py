"""Where paths are drawn from: distributions over which blocks a path uses, and what its factors are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np

from olmfast.config.searches import Dataflow
from olmfast.dataflow.hops import Hop

Array = np.ndarray[Any, np.dtype[Any]]

FACTORS = tuple(round(0.5 + 0.1 * step, 1) for step in range(11))  # so coarse that paths share factors, and beginnings
MISSING, EXTRA = 0.5, 2.0  # of the first model's blocks at first, on average, and besides them
STEP = 0.5  # of factors at first, in tenths: a third of them is another than 1
RELAXED, PAPER_STEP = 1 / 3, 1 / 6  # of the paper's indicators: how far from 0 they begin


@dataclass(frozen=True)
class Space:
    """All paths of some passes through the blocks of models: an entry (pass, model, block) is used or not.

    Entries are in the order in which they are run. `factors`: whether hops have factors.
    """

    models: tuple[str, ...]
    n_blocks: int
    n_passes: int
    factors: bool

    @property
    def entries(self) -> list[tuple[int, str, int]]:
        """(pass, model, block) in order."""
        return list(product(range(self.n_passes), self.models, range(self.n_blocks)))

    @property
    def first(self) -> Array:
        """Which entries the first model, as it is, uses."""
        used = np.zeros(len(self.entries), dtype=bool)
        used[: self.n_blocks] = True
        return used

    def path(self, used: Array, factors: Array | None) -> tuple[Hop, ...]:
        """The hops of the entries in use, with their factors: those of others play no part."""
        hops = []
        for place, (_, model, block) in enumerate(self.entries):
            if used[place]:
                scale = float(factors[place]) if factors is not None else 1.0
                hops.append(Hop(model, block, None if scale == 1.0 else scale))
        return tuple(hops)

    def file(self, hops: Sequence[Hop], places: Sequence[str]) -> dict[str, Any]:
        """What a data-flow file says of a path; `places` are the models' names or folders."""
        mask = [[[False] * self.n_blocks for _ in self.models] for _ in range(self.n_passes)]
        scales: list[list[list[float | None]]] = [[[None] * self.n_blocks for _ in self.models] for _ in mask]
        entries = iter(self.entries)
        for hop in hops:
            number, model, block = next(entry for entry in entries if entry[1:] == (hop.donor, hop.block))
            row = self.models.index(model)
            mask[number][row][block] = True
            scales[number][row][block] = hop.scale if isinstance(hop.scale, float) else 1.0
        return {
            "model_paths": [[place, None] for place in places],
            "num_r": self.n_passes,
            "layer_mask": mask,
            "scaling_factors": scales,
            "input_layer_model": 0,
            "output_layer_model": 0,
            "add_last_layer": False,
        }


@dataclass(frozen=True)
class Drawn:
    """A path, and what it was drawn as."""

    hops: tuple[Hop, ...]
    raw: Any


class Distribution(Protocol):
    """What paths are drawn from; it moves to where they are good."""

    def draw(self) -> list[Drawn]:
        """A generation of paths."""
        ...

    def tell(self, drawn: Sequence[Drawn], values: Sequence[float]) -> None:
        """What each of them is worth, lower being better."""
        ...


class Categories:
    """CatCMA with margin (Hamano et al., arXiv 2504.07884; the package cmaes): each entry is used with a probability,
    and has a factor from a grid."""

    def __init__(self, space: Space, seed: int, population: int) -> None:
        from cmaes import CatCMAwM

        self.space, self.population, n = space, population, len(space.entries)
        others = max(1, n - space.n_blocks)
        used = np.where(space.first, 1 - MISSING / space.n_blocks, min(0.1, EXTRA / others))
        gaussian = {"z_space": [list(FACTORS)] * n, "mean": np.ones(n), "sigma": STEP} if space.factors else {}
        probabilities = np.stack([1 - used, used], axis=1)
        self.optimizer = CatCMAwM(
            c_space=[2] * n, cat_param=probabilities, population_size=population, seed=seed, **gaussian
        )

    def draw(self) -> list[Drawn]:
        """See `Distribution.draw`."""
        solutions = [self.optimizer.ask() for _ in range(self.population)]
        return [Drawn(self.space.path(one.c[:, 1], one.z if self.space.factors else None), one) for one in solutions]

    def tell(self, drawn: Sequence[Drawn], values: Sequence[float]) -> None:
        """See `Distribution.tell`. Factors that no path had say nothing of where to go, and stay."""
        idle = ~np.any([one.raw.c[:, 1] for one in drawn], axis=0)
        before = self.optimizer._mean.copy() if self.space.factors else None
        self.optimizer.tell([(one.raw, value) for one, value in zip(drawn, values, strict=True)])
        if before is not None:
            self.optimizer._mean[idle] = before[idle]


class Relaxed:
    """The paper's: one Gaussian of CMA-ES over factors and indicators; an entry is used where its own is above 0."""

    def __init__(self, space: Space, seed: int, population: int) -> None:
        from cmaes import CMA

        self.space, self.population = space, population
        mean = np.where(space.first, RELAXED, -RELAXED)
        if space.factors:
            mean = np.concatenate([mean, np.ones(len(space.entries))])
        self.optimizer = CMA(mean=mean, sigma=PAPER_STEP, seed=seed, population_size=population)

    def draw(self) -> list[Drawn]:
        """See `Distribution.draw`."""
        n, found = len(self.space.entries), []
        for _ in range(self.population):
            point = self.optimizer.ask()
            found.append(Drawn(self.space.path(point[:n] > 0, point[n:] if self.space.factors else None), point))
        return found

    def tell(self, drawn: Sequence[Drawn], values: Sequence[float]) -> None:
        """See `Distribution.tell`."""
        self.optimizer.tell([(one.raw, value) for one, value in zip(drawn, values, strict=True)])


def distribution(config: Dataflow, space: Space, seed: int) -> Distribution:
    """What the config's method draws from."""
    kind = Relaxed if config.method == "paper" else Categories
    return kind(space, seed, config.population_of(len(space.entries)))
