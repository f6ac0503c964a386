"""Merges said in task vectors: an anchor plus, per donor and tensor, a coefficient times what the donor changed.

W = A + sum_d lambda[d] (D_d - A) (task arithmetic, arXiv 2212.04089). The anchor A is the model that the donors were
made from; where there is none, it is their mean, in which case A + sum_d lambda[d] (D_d - A) is the sum of the donors
with weights lambda[d] that add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from olmfast.weights.by_row import ByRow, by_row
from olmfast.weights.chunks import Operands
from olmfast.weights.expressions import Copy, Merge, merge
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression

# Tensors whose rows have coefficients of their own -> how many rows, and the axis along which they are counted.
ByRows = Mapping[str, tuple[int, int]]
NONE: ByRows = {}
NEARER = 0.85  # an ancestor's distance to its fine-tunes, as a share of their distances from each other: 0.71 in theory


@dataclass(frozen=True)
class TaskVectors:
    """The donors' differences from an anchor.

    `anchor` is a model of the pool, or None for the donors' mean. `donors` are those with a task vector, `tensors` the
    floating-point tensors in which any of them differs from the anchor. `grams` maps each of these to the scalar
    products (donors, donors), float64, of the donors' differences from `reference`.
    """

    anchor: str | None
    donors: tuple[str, ...]
    grams: Mapping[str, torch.Tensor]
    reference: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that have task vectors."""
        return tuple(self.grams)

    def of(self, recipe: Recipe, coefficients: torch.Tensor) -> Recipe:
        """The merge with coefficients (donors, tensors) in the order of `donors` and `tensors`; what no donor changes,
        the recipe keeps."""
        return recipe.with_values({name: self.at(name, own) for name, own in self._columns(coefficients)})

    def uniform(self, recipe: Recipe, coefficient: float) -> Recipe:
        """The merge with one coefficient for all donors and tensors."""
        return self.of(recipe, torch.full((len(self.donors), len(self.tensors)), coefficient))

    def anchor_of(self, tensor: str) -> Expression:
        """What task vectors are taken from."""
        if self.anchor is not None:
            return Copy(self.anchor, tensor)
        return merge("linear", [Copy(donor, tensor) for donor in self.donors])

    def at(self, tensor: str, coefficients: Sequence[float]) -> Merge:
        """One tensor of a merge with these coefficients, one per donor."""
        terms, weights = [Copy(donor, tensor) for donor in self.donors], tuple(float(x) for x in coefficients)
        if self.anchor is None:
            rest = (1 - math.fsum(weights)) / len(weights)
            return merge("linear", terms, weight=tuple(weight + rest for weight in weights), normalize=False)
        return merge("task_arithmetic", terms, self.anchor_of(tensor), weight=weights)

    def moved(self, recipe: Recipe, offsets: torch.Tensor, rows: ByRows = NONE) -> dict[str, Expression]:
        """The recipe's tensors with offsets added to their coefficients; those at 0 are left out.

        `offsets` are (donors, columns): a column for each tensor, in their order, or one for each of its `rows`.
        """
        found: dict[str, Expression] = {}
        widths = [rows[name][0] if name in rows else 1 for name in self.tensors]
        for name, own in zip(self.tensors, torch.split(offsets, widths, dim=1), strict=True):
            if bool(own.any()):
                current = recipe.tensors[name]
                if name in rows:
                    found[name] = self._moved_by_row(current, name, own, rows[name][1])
                else:
                    found[name] = self._moved(current, name, own[:, 0].tolist())
        return found

    def _moved_by_row(self, current: Expression, tensor: str, offsets: torch.Tensor, axis: int) -> Expression:
        terms = tuple(Copy(donor, tensor) for donor in self.donors)
        base = None if self.anchor is None else self.anchor_of(tensor)
        numbers = self.from_reference(offsets)
        if isinstance(current, ByRow) and (current.terms, current.base, current.axis) == (terms, base, axis):
            return current.plus(numbers)
        return by_row(current, terms, base, numbers, axis)

    def _moved(self, current: Expression, tensor: str, offsets: Sequence[float]) -> Expression:
        known = self.coefficients_of(current, tensor)
        if known is not None:
            return self.at(tensor, [a + b for a, b in zip(known, offsets, strict=True)])
        donors = [Copy(donor, tensor) for donor in self.donors]
        if self.anchor is None:
            rest = math.fsum(offsets) / len(offsets)
            weights = (1.0, *(x - rest for x in offsets))
            return merge("linear", (current, *donors), weight=weights, normalize=False)
        return merge("task_arithmetic", (current, *donors), self.anchor_of(tensor), weight=(1.0, *offsets))

    def coefficients_of(self, expression: Expression, tensor: str) -> list[float] | None:
        """The coefficients of a tensor that is a merge of this kind, or as the anchor or a donor has it; else None."""
        if isinstance(expression, Copy) and expression.donor in (self.anchor, *self.donors):
            return [float(donor == expression.donor) for donor in self.donors]
        if isinstance(expression, Merge):
            settings = dict(expression.settings)
            weights = settings.get("weight")
            if isinstance(weights, tuple) and len(weights) == len(self.donors):
                own = self.at(tensor, weights)
                if (expression.method, expression.terms, expression.base) == (own.method, own.terms, own.base):
                    return [float(weight) for weight in weights]
        return None

    def _columns(self, coefficients: torch.Tensor) -> Iterable[tuple[str, list[float]]]:
        return zip(self.tensors, coefficients.T.tolist(), strict=True)

    def from_reference(self, slopes: torch.Tensor) -> torch.Tensor:
        """Slopes along D_d - reference, or offsets of them, (donors, ...), as those of the task vectors D_d - anchor.

        Where the anchor is the donors' mean, only what differs between donors matters.
        """
        return slopes - slopes.mean(dim=0, keepdim=True) if self.anchor is None else slopes

    @cached_property
    def squares(self) -> dict[str, torch.Tensor]:
        """Tensor -> the squared norm of each donor's task vector (donors,)."""
        found = {}
        for name, gram in self.grams.items():
            if self.anchor is None:
                gram = gram - gram.mean(dim=0, keepdim=True) - gram.mean(dim=1, keepdim=True) + gram.mean()
            found[name] = gram.diagonal().clamp(min=0)
        return found

    def distances(self, tensors: Iterable[str] | None = None) -> dict[str, float]:
        """Donor -> the norm of its task vector in these tensors (None: all)."""
        names = [name for name in (self.tensors if tensors is None else tensors) if name in self.squares]
        total = sum((self.squares[name] for name in names), torch.zeros(len(self.donors), dtype=torch.float64))
        return dict(zip(self.donors, total.sqrt().tolist(), strict=True))

    @property
    def unevenness(self) -> float:
        """The largest of the donors' distances from the anchor by the smallest."""
        norms = [norm for norm in self.distances().values() if norm > 0]
        return max(norms, default=1.0) / min(norms, default=1.0)


def task_vectors(
    pool: Pool, donors: Sequence[str], ancestor: str | None, base: str, is_ignored: Callable[[str], bool]
) -> TaskVectors:
    """The donors' task vectors from `ancestor`; with None, from `base` where the others are nearer to it than to each
    other, else from the donors' mean. Reads every donor once."""
    reference = ancestor or base
    others = [donor for donor in donors if donor != reference]
    grams = {}
    for name, info in pool[reference].tensors.items():
        if not info.dtype.is_floating_point or is_ignored(name) or not others:
            continue
        if len({pool[donor].digest(name) for donor in (reference, *others)}) > 1:
            terms = [pool[donor].tensors[name].open() for donor in others]
            grams[name] = Operands(terms, info.open(), torch.device("cpu")).gram()
    if ancestor is not None or _is_ancestor(grams, len(others)):
        return TaskVectors(reference, tuple(others), grams, reference)
    padded = {name: torch.nn.functional.pad(gram, (1, 0, 1, 0)) for name, gram in grams.items()}
    return TaskVectors(None, (reference, *others), padded, reference)


def _is_ancestor(grams: Mapping[str, torch.Tensor], n: int) -> bool:
    """Whether donors are nearer to the model that their differences are taken from than to each other."""
    if n < 2 or not grams:
        return True
    total = torch.stack(list(grams.values())).sum(dim=0)
    squares = total.diagonal()
    apart = (squares[:, None] + squares[None, :] - 2 * total).clamp(min=0).sqrt()
    return float(squares.sqrt().mean()) < NEARER * float(apart.sum() / (n * (n - 1)))
