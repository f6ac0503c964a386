"""What an expression is worth: reads donors and stored tensors, and composes the formulas of the kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from olmfast import kernels
from olmfast.errors import OlmfastError
from olmfast.weights.checkpoint import TensorInfo
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

    def value(self, values: Values) -> torch.Tensor:
        """The tensor that `values` describes, on the CPU, in the dtype it is or would be saved with."""
        if isinstance(values, Copy):
            return self.pool[values.donor].read(values.tensor)
        if isinstance(values, Stored):
            return self._stored(values)
        if isinstance(values, Linear):
            terms = [self.value(term) for term in values.terms]
            return kernels.weighted_sum(terms, list(values.weights), normalize=values.normalize)
        return values.compute(self)

    def info(self, values: Values) -> TensorInfo | None:
        """Where the bytes of `values` lie in a donor's file, if they are a donor's."""
        return self.pool[values.donor].tensors[values.tensor] if isinstance(values, Copy) else None

    def digest(self, expression: Expression) -> str:
        """xxh3-128 of the bytes an expression is worth: equal bytes, equal digest."""
        if isinstance(expression, Copy):
            return self.pool[expression.donor].digest(expression.tensor)
        if isinstance(expression, Stored):
            return expression.digest
        return digest_tensor(self.value(expression))

    def _stored(self, stored: Stored) -> torch.Tensor:
        path = self.folder / stored.file
        try:
            with safe_open(path, "pt") as file:
                tensor: torch.Tensor = file.get_tensor(stored.tensor).clone()
        except Exception as error:  # the library raises its own types for damaged files
            raise OlmfastError(f"{path}: {stored.tensor}: cannot be read: {error}") from None
        if digest_tensor(tensor) != stored.digest:
            raise OlmfastError(f"{path}: {stored.tensor}: the bytes have changed since the report was written")
        return tensor
