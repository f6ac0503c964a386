"""Which model each part of a result came from, and how far it moved, by what its recipe says: no weight is read.

A tensor's shares are the factors by which it is made of models' tensors: 1 of the donor for a copy, the weights of a
sum. What a method decides from the values themselves (TIES, DARE, slerp's angle) is told by the weights it was given.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from olmfast.weights.affine import Affine
from olmfast.weights.architecture import FAMILIES, numbered
from olmfast.weights.by_row import ByRow
from olmfast.weights.expressions import Copy, Merge, Rows, Stored
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression, leaves

Shares = Mapping[str, float]  # model -> factor
ATTENTION, MLP, NORMS, OTHER = PARTS = "attention", "MLP", "norms", "other"
EVOLVED = "evolved"  # of a tensor that evolution made: the record keeps its bytes, not its parent
_ATTENTION = {family.attention for family in FAMILIES.values()}
_MLP = {family.mlp for family in FAMILIES.values()}
_NORM = re.compile(r"(norm|ln_\w+)(\.|$)")


@dataclass(frozen=True)
class Cell:
    """A part of a block: the mean shares of its tensors, by how much they differ from the start's (0: not at all, 1: it
    is another model's altogether), and the blocks that they were taken from where these are others."""

    shares: Shares
    moved: float
    taken_from: tuple[int, ...] = ()


@dataclass(frozen=True)
class Origins:
    """`blocks` maps a block to its parts' cells; `outside` has the tensors before and after the blocks."""

    blocks: Mapping[int, Mapping[str, Cell]]
    outside: Mapping[str, Cell]

    @classmethod
    def of(cls, recipe: Recipe, start: Recipe | None) -> Origins:
        """What a recipe says of each part. Without a `start`, how far it moved is counted from the recipe's base."""
        blocks: dict[int, dict[str, list[str]]] = {}
        outside: dict[str, list[str]] = {}
        stack = _stack(recipe.tensors)
        for name in recipe.tensors:
            place = numbered(name)
            if place is not None and place[0] == stack:
                blocks.setdefault(place[1], {}).setdefault(_part(place[2]), []).append(name)
            else:
                outside.setdefault(name.rsplit(".", 1)[0], []).append(name)
        return cls(
            {
                block: {part: _cell(recipe, start, parts[part], block) for part in PARTS if part in parts}
                for block, parts in sorted(blocks.items())
            },
            {module: _cell(recipe, start, names, None) for module, names in outside.items()},
        )

    @property
    def parts(self) -> list[str]:
        """The parts that any block has."""
        return [part for part in PARTS if any(part in parts for parts in self.blocks.values())]

    @property
    def models(self) -> list[str]:
        """Every model that something came from, those with the largest shares first."""
        total = Counter[str]()
        for cell in self.cells:
            total.update({model: abs(share) for model, share in cell.shares.items()})
        return [model for model, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))]

    @property
    def cells(self) -> Iterator[Cell]:
        """All cells."""
        for parts in self.blocks.values():
            yield from parts.values()
        yield from self.outside.values()


def shares_of(expression: Expression) -> dict[str, float]:
    """Model -> the factor with which its tensors are in an expression."""
    if isinstance(expression, Copy):
        return {expression.donor: 1.0}
    if isinstance(expression, Stored):
        return {EVOLVED: 1.0}
    if isinstance(expression, Merge):
        return _sum(zip(expression.parts, _weights(expression), strict=True))
    if isinstance(expression, ByRow):
        means = expression.numbers.double().mean(dim=1).tolist()
        base = [] if expression.base is None else [-math.fsum(means)]
        return _sum(zip(expression.parts, [1.0, *means, *base], strict=True))
    if isinstance(expression, Rows):
        n = sum(end - begin for _, begin, end in expression.entries)
        return _sum((source, (end - begin) / n) for source, begin, end in expression.entries if source is not None)
    if isinstance(expression, Affine):
        scale = expression.scale if isinstance(expression.scale, (int, float)) else 1.0
        return _sum([(expression.of, float(scale))])
    return _sum((part, 1 / len(expression.parts)) for part in expression.parts)


def _weights(merge: Merge) -> list[float]:
    """The factor of each part of a merge: of its terms and, last, of its base."""
    settings, n = dict(merge.settings), len(merge.terms)
    t, given = settings.get("t"), settings.get("weight", 1.0)
    if isinstance(t, (int, float)) and n == 2 and merge.base is None:
        return [1 - t, t]
    weights = [float(x) for x in given] if isinstance(given, tuple) else [float(given)] * n
    if len(weights) != n:  # a base among the terms has none
        weights = [1 / n] * n
    total = math.fsum(weights)
    if settings.get("normalize", merge.base is None) and total:
        weights = [weight / total for weight in weights]
    return weights if merge.base is None else [*weights, 1 - math.fsum(weights)]


def _sum(parts: Iterable[tuple[Expression, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part, factor in parts:
        for model, share in shares_of(part).items():
            total[model] = total.get(model, 0.0) + factor * share
    return total


def _cell(recipe: Recipe, start: Recipe | None, names: Sequence[str], block: int | None) -> Cell:
    own = [shares_of(recipe.tensors[name]) for name in names]
    taken = {
        place[1]
        for name in names
        for leaf in leaves(recipe.tensors[name])
        if isinstance(leaf, Copy) and (place := numbered(leaf.tensor)) is not None and block is not None
    }
    moved = [_apart(shares, _before(recipe, start, name)) for name, shares in zip(names, own, strict=True)]
    models = list(dict.fromkeys(model for shares in own for model in shares))
    mean = {model: math.fsum(shares.get(model, 0.0) for shares in own) / len(own) for model in models}
    elsewhere = tuple(sorted(taken)) if taken - {block} else ()
    return Cell(mean, math.fsum(moved) / len(moved), elsewhere)


def _before(recipe: Recipe, start: Recipe | None, name: str) -> dict[str, float]:
    if start is not None and name in start.tensors:
        return shares_of(start.tensors[name])
    return {recipe.base: 1.0}


def _apart(one: Shares, other: Shares) -> float:
    """Half of what the shares differ by in sum: 0 for the same, 1 for those of other models alone."""
    return math.fsum(abs(one.get(model, 0.0) - other.get(model, 0.0)) for model in {**one, **other}) / 2


def _part(name: str) -> str:
    first = name.split(".")[0]
    if first in _ATTENTION:
        return ATTENTION
    if first in _MLP:
        return MLP
    return NORMS if _NORM.search(name) else OTHER


def _stack(names: Iterable[str]) -> str:
    """What the blocks are a list of: the numbered prefix that most tensors have."""
    counted = Counter(place[0] for name in names if (place := numbered(name)) is not None)
    return max(counted, key=lambda prefix: (counted[prefix], prefix), default="")
