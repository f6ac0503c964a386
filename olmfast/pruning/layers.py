"""A model of fewer layers as a recipe: which layers of which model each of its layers is made of, and by what weights.

The first part of a layer gives everything that is not merged: norms and biases, unless all of it is merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olmfast.errors import InputError
from olmfast.weights.architecture import Architecture
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.expressions import Copy, merge
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Expression


@dataclass(frozen=True)
class Layer:
    """One layer of the result: the layers (model, number) that it is made of, and the weight of each."""

    parts: tuple[tuple[str, int], ...]
    weights: tuple[float, ...] = (1.0,)

    @property
    def used(self) -> list[tuple[str, int]]:
        """The parts that weigh anything, the first among them in any case."""
        pairs = list(zip(self.parts, self.weights, strict=True))
        return [part for index, (part, weight) in enumerate(pairs) if weight != 0 or index == 0]

    def value(self, before: str, after: str) -> Expression:
        """The convex combination of the parts' tensors, whose names are `before`, the layer's number and `after`."""
        pairs = [pair for pair in zip(self.parts, self.weights, strict=True) if pair[1] != 0]
        terms = [Copy(model, f"{before}{index}{after}") for (model, index), _ in pairs]
        if len(pairs) == 1 and pairs[0][1] == 1:
            return terms[0]
        return merge("linear", terms, weight=tuple(weight for _, weight in pairs), normalize=False)


def one_of_run(model: str, n_blocks: int, first: int, weights: Sequence[float]) -> list[Layer]:
    """The layers of a model whose layers from `first` on, one for each weight, become one."""
    run = Layer(tuple((model, first + k) for k in range(len(weights))), tuple(weights))
    below = [Layer(((model, index),)) for index in range(first)]
    return [*below, run, *(Layer(((model, index),)) for index in range(first + len(weights), n_blocks))]


def merged_tensors(
    base: Checkpoint, architecture: Architecture, place: int, layer: Layer, everything: bool
) -> dict[str, Expression]:
    """The tensors of layer `place` of the result that are merged: projections, or all of them."""
    before = f"{architecture.family.blocks}."
    found = {}
    for after in _parts_of(base, architecture, layer.parts[0][1]):
        name = f"{before}{layer.parts[0][1]}{after}"
        info = base.tensors[name]
        is_merged = info.dtype.is_floating_point and not architecture.is_ignored(name)
        if is_merged and (everything or architecture.is_projection(name, len(info.shape))):
            found[f"{before}{place}{after}"] = layer.value(before, after)
    return found


def recipe_of(
    base: Checkpoint, pool: Pool, layers: Sequence[Layer], edits: Mapping[str, Any], everything: bool
) -> Recipe:
    """The recipe of these layers one after another, between what comes before and after the base's."""
    architecture = base.architecture
    before = f"{architecture.family.blocks}."
    outside = [name for name in pool.tensors if architecture.block_of(name) is None]
    tensors: dict[str, Expression] = {name: Copy(base.name, name) for name in outside}
    for place, layer in enumerate(layers):
        model, index = layer.parts[0]
        for after in _parts_of(base, architecture, index):
            tensors[f"{before}{place}{after}"] = Copy(model, f"{before}{index}{after}")
        if len(layer.parts) > 1:
            tensors |= merged_tensors(base, architecture, place, layer, everything)
    return Recipe(base.name, tensors, edits)


def _parts_of(base: Checkpoint, architecture: Architecture, index: int) -> Iterator[str]:
    """What follows a block's number in the names of its tensors."""
    before = f"{architecture.family.blocks}.{index}"
    for name in base.tensors:
        if architecture.block_of(name) == index:
            yield name.removeprefix(before)


def config_edits(base: Checkpoint, pool: Pool, layers: Sequence[Layer], skeletons: Skeletons) -> dict[str, Any]:
    """The keys of config.json that differ for these layers: their number, and lists that speak of them.

    Raises InputError for layers of different kinds that would be merged, and for a config that cannot say which
    layer is of which kind any more.
    """
    used = [layer.used for layer in layers]
    models = {model: pool[model].config for layer in used for model, _ in layer}
    answer = skeletons.stack(base.config, models, used)
    if "fault" in answer:
        raise InputError(f"{base.name}: {answer['fault']}")
    if "unknown" in answer:
        raise InputError(f"{base.name}: cannot be pruned: {answer['unknown']}")
    config = answer["config"]
    return {key: value for key, value in config.items() if key not in base.config or base.config[key] != value}
