"""Offspring of evolution strategies: a parent, and the address of the random numbers by which it is changed.

An offspring described so is small and can be computed anywhere, and many of one parent are computed at once. Its
random numbers come from a counter-based generator, so that offspring k of generation g of a tensor is the same
wherever and whenever it is made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch

from olmfast import kernels
from olmfast.weights.chunks import Held, Readable, Scratch
from olmfast.weights.draws import normal
from olmfast.weights.sources import Expression, Parent, Sources, expression_from_json

Kind = TypeVar("Kind", bound="Offspring")


@dataclass(frozen=True)
class Offspring(Expression):
    """One change of a parent's weight, of which its values are rounded to `dtype`, by name.

    `sigma` is the step size; seed, tensor, generation and index are the address of its random numbers. With `shares`
    (one per sibling, squares summing to 1) its numbers are the sum of the siblings' by their shares.
    """

    method: ClassVar[str]  # as reports name it
    parent: Expression
    dtype: str
    sigma: float
    seed: int
    tensor: str
    generation: int
    index: int
    shares: tuple[float, ...] = field(default=(), kw_only=True)

    @abstractmethod
    def dimensions(self, sources: Sources) -> int:
        """How many random numbers it takes; 0 where the parent leaves nothing to change."""

    @classmethod
    @abstractmethod
    def _stack(cls: type[Kind], siblings: Sequence[Kind], sources: Sources) -> torch.Tensor:
        """(K, rows, cols) in the dtype and on the device of their one parent."""

    @property
    def is_transient(self) -> bool:
        """Yes: another machine's singular vectors differ in their last bits."""
        return True

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The parent."""
        return (self.parent,)

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`."""
        own = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "parent"}
        own = {key: value for key, value in own.items() if key != "shares" or value}
        return {self.key: self.parent.to_json(), **own}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Offspring:
        """See `Expression.from_json`."""
        own: dict[str, Any] = {key: value for key, value in entry.items() if key != cls.key}
        own["shares"] = tuple(own.get("shares", ()))
        return cls(expression_from_json(entry[cls.key]), **own)

    def weight(self, sources: Sources) -> torch.Tensor:
        """The parent's weight: (rows, cols) in `dtype`, where parents lie."""
        return self._parent(sources).weight

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:  # noqa: ARG002
        """See `Expression.open`."""
        return Held(self.value(sources))

    def value(self, sources: Sources) -> torch.Tensor:
        """See `Expression.value`."""
        return self._stack([self], sources)[0].cpu()

    @classmethod
    def stack(cls, several: Sequence[Expression], sources: Sources) -> torch.Tensor | None:
        """See `Expression.stack`. Siblings are computed at once."""
        siblings = [one for one in several if isinstance(one, cls)]
        family = {(one.parent, one.dtype) for one in siblings}
        return cls._stack(siblings, sources) if len(siblings) == len(several) and len(family) == 1 else None

    def _parent(self, sources: Sources) -> Parent:
        return sources.parent(self.parent, getattr(torch, self.dtype))

    def _draws(self, n: int) -> torch.Tensor:
        address = (self.seed, self.tensor, self.method, self.generation)
        if not self.shares:
            return normal(n, *address, self.index)
        drawn = (share * normal(n, *address, index) for index, share in enumerate(self.shares))
        return sum(drawn, torch.zeros(n, dtype=torch.float64))


@dataclass(frozen=True)
class SvdOffspring(Offspring):
    """weight * exp(clamp(U diag(coefficients) Vh, -3, 3)), the coefficients by `kernels.svd_coefficients`."""

    key: ClassVar[str] = "svd_offspring"
    method: ClassVar[str] = "svd_es"

    def dimensions(self, sources: Sources) -> int:
        """The number of singular values."""
        return len(self._parent(sources).factors.s)

    @classmethod
    def _stack(cls, siblings: Sequence[SvdOffspring], sources: Sources) -> torch.Tensor:
        parent = siblings[0]._parent(sources)
        u, s, vh = parent.factors
        rows = [kernels.svd_coefficients(s, one.sigma, one._draws(len(s))) for one in siblings]
        return kernels.svd_noise(parent.weight, u, vh, torch.stack(rows).to(u))


@dataclass(frozen=True)
class NormOffspring(Offspring):
    """weight * exp(sigma * draws) per row, of which there is one draw each; rows are counted along `axis`."""

    key: ClassVar[str] = "norm_offspring"
    method: ClassVar[str] = "norm_es"
    axis: int = 0

    def dimensions(self, sources: Sources) -> int:
        """The number of rows."""
        return self.weight(sources).shape[self.axis]

    def log_scale(self, sources: Sources) -> torch.Tensor:
        """(rows,) float64: by what the logarithm of each row's norm grows."""
        return self._draws(self.dimensions(sources)) * self.sigma

    @classmethod
    def _stack(cls, siblings: Sequence[NormOffspring], sources: Sources) -> torch.Tensor:
        weight = siblings[0].weight(sources)
        rows = torch.stack([one.log_scale(sources) for one in siblings]).to(weight.device)
        return kernels.row_scale(weight, rows, axis=siblings[0].axis)
