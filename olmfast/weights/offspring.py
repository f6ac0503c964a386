"""Offspring of evolution strategies: a parent's weight and a few numbers that say how it is changed.

A candidate described so is small, can be computed anywhere, and many of one parent are computed at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from olmfast import kernels

if TYPE_CHECKING:
    from olmfast.weights.methods import Sources


@dataclass
class Parent:
    """The weight that a generation starts from: (rows, cols) in its stored dtype, on the search's device."""

    weight: torch.Tensor

    @cached_property
    def factors(self) -> kernels.SvdFactors:
        """Singular factors of weight / max|weight|; computed once per parent."""
        return kernels.svd_factors(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)))


@dataclass(frozen=True)
class Offspring(ABC):
    """One change of a parent's weight."""

    parent: Parent

    @classmethod
    @abstractmethod
    def stack(cls, siblings: Sequence[Offspring]) -> torch.Tensor:
        """(K, rows, cols) in the dtype and on the device of their one parent."""

    def compute(self, sources: Sources) -> torch.Tensor:  # noqa: ARG002
        """(rows, cols) in the parent's dtype."""
        return self.stack([self])[0]


@dataclass(frozen=True)
class SvdOffspring(Offspring):
    """weight * exp(clamp(U diag(coefficients) Vh, -3, 3)); coefficients is (k,)."""

    coefficients: torch.Tensor

    @classmethod
    def stack(cls, siblings: Sequence[Offspring]) -> torch.Tensor:
        """See `Offspring.stack`."""
        parent = siblings[0].parent
        u, _, vh = parent.factors
        rows = [sibling.coefficients for sibling in siblings if isinstance(sibling, cls)]
        return kernels.svd_noise(parent.weight, u, vh, torch.stack(rows).to(u))


@dataclass(frozen=True)
class NormOffspring(Offspring):
    """weight * exp(log_scale) per row; log_scale is (rows,), rows counted along `axis`."""

    log_scale: torch.Tensor
    axis: int

    @classmethod
    def stack(cls, siblings: Sequence[Offspring]) -> torch.Tensor:
        """See `Offspring.stack`."""
        parent = siblings[0].parent
        norm = [sibling for sibling in siblings if isinstance(sibling, cls)]
        rows = torch.stack([sibling.log_scale for sibling in norm]).to(parent.weight.device)
        return kernels.row_scale(parent.weight, rows, axis=norm[0].axis)
