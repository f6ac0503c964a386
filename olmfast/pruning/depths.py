"""Which layers go, and what those that stay are made of: points of a joint search as models.

A layer that stays is a blend of itself, of the layers that go above it up to the next one that stays, and of the same
layer of the donors. The lowest layer always stays: what goes has one below it to go into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmfast.config.run import RunConfig
from olmfast.errors import InputError
from olmfast.output.writer import Content, content_of
from olmfast.pruning.alphas import alphas_in, read_alphas
from olmfast.pruning.layers import Layer, config_edits, recipe_of
from olmfast.static.loading import check_loads
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Sources


@dataclass(frozen=True)
class Point:
    """`gone` are the layers that go, rising; `shares` the weight of each of them in the layer that it goes into, and
    `given` (donor, layer) -> that of a donor's layer. What is left of 1 is the layer's own."""

    gone: tuple[int, ...]
    shares: Mapping[int, float]
    given: Mapping[tuple[str, int], float]

    def layers(self, base: str, n_blocks: int) -> list[Layer]:
        """The layers of the result. Shares that add up to more than 1 are divided by their sum."""
        found: list[tuple[list[tuple[str, int]], list[float]]] = []
        for index in range(n_blocks):
            if index in self.gone:
                found[-1][0].append((base, index))
                found[-1][1].append(self.shares.get(index, 0.0))
                continue
            own = {key: share for key, share in self.given.items() if key[1] == index}
            found.append(([(base, index), *own], [0.0, *own.values()]))
        result = []
        for parts, shares in found:
            total = max(1.0, sum(shares))
            weights = [share / total for share in shares]
            weights[0] = 1.0 - sum(weights)
            result.append(Layer(tuple(parts), tuple(weights)))
        return result

    def without(self, kept: int) -> Point:
        """The point with one layer less going."""
        return Point(tuple(index for index in self.gone if index != kept), self.shares, self.given)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        given = [[donor, layer, share] for (donor, layer), share in self.given.items() if layer not in self.gone]
        return {"gone": list(self.gone), "shares": [self.shares.get(k, 0.0) for k in self.gone], "given": given}


@dataclass(frozen=True)
class Depths:
    """The model and its donors, and the config of every depth. `given` are the alphas of the file, if there is one;
    `notes` what could not be checked."""

    pool: Pool
    everything: bool
    edits: Mapping[int, dict[str, Any]]  # layers that go -> the keys of config.json that differ
    given: tuple[float, ...] | None
    notes: tuple[str, ...]

    @classmethod
    def open(cls, config: RunConfig) -> Depths:
        """Open the models and check that any of the layers can be merged; reads no weights.

        Raises InputError for models that do not fit together, layers of different kinds, more to go than there are, or
        an alpha file that does not fit.
        """
        pruning = config.prune
        assert pruning is not None
        pool = Pool.open(config.models, config.models_dir, config.config_dir, download=False)
        entries = None if pruning.alphas_file is None else read_alphas(pruning.alphas_file)
        base, n_steps = pool[config.models[0]], pruning.steps(None if entries is None else len(entries))
        n_blocks = base.architecture.n_blocks
        if n_steps >= n_blocks:
            most = f"of which at most {n_blocks - 1} can go"
            raise InputError(f"{base.name}: num_layer {n_steps}: the model has {n_blocks} layers, {most}")
        given = None
        if entries is not None and pruning.alphas_file is not None:
            given = tuple(alphas_in(pruning.alphas_file, entries, n_blocks - n_steps - 1, n_steps))
        every = Point(tuple(range(1, n_blocks)), dict.fromkeys(range(1, n_blocks), 0.5), {})
        edits: dict[int, dict[str, Any]] = {}
        with Skeletons() as skeletons:
            config_edits(base, pool, every.layers(base.name, n_blocks), skeletons)  # all are of one kind
            for n in range(1, n_steps + 1):
                layers = Point(tuple(range(n_blocks - n, n_blocks)), {}, {}).layers(base.name, n_blocks)
                edits[n] = config_edits(base, pool, layers, skeletons)
            found = cls(pool, pruning.merge == "all", edits, given, ())
            content = found.content(found.example)
            notes = check_loads(base, content.config, content.tensors, skeletons)
        return cls(pool, found.everything, edits, given, (*pool.warnings, *notes))

    @property
    def base(self) -> Checkpoint:
        """The model."""
        return next(iter(self.pool))

    @property
    def n_blocks(self) -> int:
        """Its layers."""
        return self.base.architecture.n_blocks

    @property
    def n_steps(self) -> int:
        """How many of them go."""
        return max(self.edits)

    @property
    def example(self) -> Recipe:
        """A result: the last layers dropped."""
        return self.recipe(self.run([1.0, *[0.0] * self.n_steps]))

    @property
    def donors(self) -> list[str]:
        """The other models."""
        return self.pool.names[1:]

    @property
    def whole(self) -> Recipe:
        """The model as it is."""
        return whole(self.base.name, self.pool.tensors)

    def recipe(self, point: Point) -> Recipe:
        """The model that a point stands for."""
        layers = point.layers(self.base.name, self.n_blocks)
        return recipe_of(self.base, self.pool, layers, self.edits[len(point.gone)], self.everything)

    def content(self, recipe: Recipe) -> Content:
        """The folder that a recipe describes."""
        return content_of(recipe, Sources(self.pool, Path()), self.base)

    def run(self, weights: Sequence[float]) -> Point:
        """The last layers merged into one with these weights, the lowest first."""
        first = self.n_blocks - len(weights)
        gone = tuple(range(first + 1, self.n_blocks))
        return Point(gone, dict(zip(gone, weights[1:], strict=True)), {})
