"""What an expression is worth: reads donors and stored tensors, and composes the formulas of the kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import xxhash

from olmfast import kernels
from olmfast.errors import OlmfastError
from olmfast.weights.checkpoint import TensorInfo, read_header
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Copy, Expression, Linear, Stored, digest_tensor


class Computed(Protocol):
    """A candidate's values that are computed on demand and are no part of a recipe until they are chosen."""

    def compute(self, sources: Sources) -> torch.Tensor:
        """The tensor, in the dtype it would be saved with."""
        ...


Values = Expression | Computed


class Sources:
    """The donors and the folder of stored tensors that expressions refer to."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool = pool
        self.folder = folder
        self._opened: dict[Stored, TensorInfo] = {}

    def value(self, values: Values) -> torch.Tensor:
        """The tensor that `values` describes, on the CPU, in the dtype it is or would be saved with."""
        if isinstance(values, (Copy, Stored)):
            return self._place(values).read()
        if isinstance(values, Linear):
            terms = [self.value(term) for term in values.terms]
            return kernels.weighted_sum(terms, list(values.weights), normalize=values.normalize)
        return values.compute(self)

    def info(self, values: Values) -> TensorInfo | None:
        """Where the bytes of `values` lie in a file of a donor or of the report; None if they are computed."""
        return self._place(values) if isinstance(values, (Copy, Stored)) else None

    def digest(self, expression: Expression) -> str:
        """xxh3-128 of the bytes an expression is worth: equal bytes, equal digest."""
        if isinstance(expression, Copy):
            return self.pool[expression.donor].digest(expression.tensor)
        if isinstance(expression, Stored):
            return expression.digest
        return digest_tensor(self.value(expression))

    def identity(self, expression: Expression) -> str:
        """A digest that says, without computing anything, that two expressions are worth the same bytes.

        Equal digests, equal bytes; bytes of different computations may be equal all the same.
        """
        if isinstance(expression, (Copy, Stored)):
            return self.digest(expression)
        terms = [self.identity(term) for term in expression.terms]
        return xxhash.xxh3_128(f"{terms} {expression.weights} {expression.normalize}".encode()).hexdigest()

    def _place(self, stored: Copy | Stored) -> TensorInfo:
        """Where the bytes lie; those of a refined tensor are checked when it is first used."""
        if isinstance(stored, Copy):
            return self.pool[stored.donor].tensors[stored.tensor]
        if stored not in self._opened:
            path = self.folder / stored.file
            info = next((info for info in read_header(path) if info.name == stored.tensor), None)
            if info is None or info.digest() != stored.digest:
                raise OlmfastError(f"{path}: {stored.tensor}: the bytes have changed since the report was written")
            self._opened[stored] = info
        return self._opened[stored]
