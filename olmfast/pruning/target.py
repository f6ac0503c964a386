"""What is pruned: the model, opened and checked, and the run of its layers that becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmfast.config.pruning import Pruning
from olmfast.config.run import RunConfig
from olmfast.errors import InputError
from olmfast.output.writer import Content, content_of
from olmfast.pruning.alphas import alphas_in, read_alphas, steps_of, weights_of
from olmfast.pruning.layers import Layer, config_edits, merged_tensors, one_of_run, recipe_of
from olmfast.static.loading import check_loads
from olmfast.static.stacking import learn_architecture
from olmfast.weights.architecture import Unit
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Expression, Sources


@dataclass(frozen=True)
class Target:
    """A model whose layers `first` to `first` + `n_steps` become layer `first`.

    `edits` are the keys of config.json that differ then; `given` the alphas of the file, if there is one. `notes` are
    what could not be checked.
    """

    pruning: Pruning
    pool: Pool
    first: int
    n_steps: int
    edits: dict[str, Any]
    given: tuple[float, ...] | None
    notes: tuple[str, ...]

    @classmethod
    def open(cls, config: RunConfig, *, evaluated: bool) -> Target:
        """Open the model and check that its layers can be merged; reads no weights.

        `evaluated`: the model or its result is run, so that it has to be of a family in the table.
        Raises InputError for an alpha file that does not fit, layers that are not there, or are of different kinds.
        """
        pruning = config.prune
        assert pruning is not None
        entries = None if pruning.alphas_file is None else read_alphas(pruning.alphas_file)
        name, folder = config.models[0], config.config_dir
        pool = Pool.open([name], config.models_dir, folder, alike=evaluated, download=False)
        base = pool[name]
        with Skeletons() as skeletons:
            learn_architecture(base, skeletons)
            n_steps = pruning.steps(None if entries is None else len(entries))
            try:
                first = pruning.first_layer(base.architecture.n_blocks, n_steps)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from error
            given = None
            if entries is not None and pruning.alphas_file is not None:
                given = tuple(alphas_in(pruning.alphas_file, entries, first, n_steps))
            fixed = given if pruning.way == "file" else (1.0,) * n_steps if pruning.way == "drop" else None
            tried = weights_of((0.5,) * n_steps if fixed is None else fixed)
            layers = one_of_run(name, base.architecture.n_blocks, first, tried)
            edits = config_edits(base, pool, layers, skeletons)
            found = cls(pruning, pool, first, n_steps, edits, given, ())
            content = found.content(found.example)
            notes = check_loads(base, content.config, content.tensors, skeletons)
        return cls(pruning, pool, first, n_steps, edits, given, (*pool.warnings, *notes))

    @property
    def base(self) -> Checkpoint:
        """The model."""
        return next(iter(self.pool))

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(layer merged into, layer removed) of each step."""
        return steps_of(self.first, self.n_steps)

    @property
    def whole(self) -> Recipe:
        """The model as it is."""
        return whole(self.base.name, self.pool.tensors)

    @property
    def example(self) -> Recipe:
        """A result: every alpha a half."""
        return self.recipe(weights_of((0.5,) * self.n_steps))

    @property
    def unit(self) -> Unit:
        """The merged layer as a unit of the result."""
        names = tuple(self.values(weights_of((0.5,) * self.n_steps)))
        return Unit(str(self.first), "block", names, (self.first,))

    def recipe(self, weights: Sequence[float]) -> Recipe:
        """The pruned model whose merged layer is made of the run's layers with these weights, the lowest first."""
        layers = one_of_run(self.base.name, self.base.architecture.n_blocks, self.first, weights)
        return recipe_of(self.base, self.pool, layers, self.edits, self.pruning.merge == "all")

    def values(self, weights: Sequence[float]) -> dict[str, Expression]:
        """The tensors of the merged layer that these weights decide."""
        layer = Layer(tuple((self.base.name, self.first + k) for k in range(self.n_steps + 1)), tuple(weights))
        base = self.base
        return merged_tensors(base, base.architecture, self.first, layer, self.pruning.merge == "all")

    def content(self, recipe: Recipe) -> Content:
        """The folder that a recipe describes."""
        return content_of(recipe, Sources(self.pool, Path()), self.base)
