"""What an expression is worth: reads donors and stored tensors, and composes the formulas of the kernels.

Adding a method of merging is adding a function to METHODS.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from olmfast import kernels
from olmfast.errors import OlmfastError
from olmfast.weights.checkpoint import TensorInfo, read_header
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Copy, Expression, Merge, Setting, Stored


class Computed(Protocol):
    """A candidate's values that are computed on demand and are no part of a recipe until they are chosen."""

    def compute(self, sources: Sources) -> torch.Tensor:
        """The tensor, in the dtype it would be saved with."""
        ...


Values = Expression | Computed
Settings = Mapping[str, Setting]


def _linear(terms: list[torch.Tensor], _: torch.Tensor | None, settings: Settings) -> torch.Tensor:
    """sum_i weight_i * term_i, divided by the sum of the weights unless `normalize` is false."""
    weights = _per_term(settings, "weight", 1.0, len(terms))
    return kernels.weighted_sum(terms, weights, normalize=bool(settings.get("normalize", True)))


def _slerp(terms: list[torch.Tensor], _: torch.Tensor | None, settings: Settings) -> torch.Tensor:
    """The point at `t` on the arc from the first term to the second."""
    first, second = terms
    return kernels.slerp(first, second, _number(settings, "t", 0.5))


def _task_arithmetic(terms: list[torch.Tensor], base: torch.Tensor | None, settings: Settings) -> torch.Tensor:
    """base + lambda * sum_i weight_i * (term_i - base) (Ilharco et al., arXiv 2212.04089)."""
    if base is None:
        raise ValueError("task_arithmetic: needs a base")
    scale = _number(settings, "lambda", 1.0)
    weights = [scale * weight for weight in _per_term(settings, "weight", 1.0, len(terms))]
    if settings.get("normalize", False):
        total = sum(weights) / scale
        weights = [weight / total for weight in weights]
    return kernels.weighted_sum([base, *terms], [1 - sum(weights), *weights])


def _ties(terms: list[torch.Tensor], base: torch.Tensor | None, settings: Settings) -> torch.Tensor:
    """See `kernels.ties_merge`."""
    return kernels.ties_merge(
        terms,
        _per_term(settings, "weight", 1.0, len(terms)),
        _per_term(settings, "density", 1.0, len(terms)),
        base=base,
        normalize=bool(settings.get("normalize", True)),
        scale=_number(settings, "lambda", 1.0),
    )


# Merge.method -> terms (all of one dtype), base (of the same) or None, settings -> the result in that dtype.
METHODS: dict[str, Callable[[list[torch.Tensor], torch.Tensor | None, Settings], torch.Tensor]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
}


def _number(settings: Settings, name: str, default: float) -> float:
    value = settings.get(name, default)
    if isinstance(value, (str, tuple)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def _per_term(settings: Settings, name: str, default: float, n: int) -> list[float]:
    """A number per term; one number stands for all."""
    value = settings.get(name, default)
    return list(value) if isinstance(value, tuple) else [_number(settings, name, default)] * n


class Sources:
    """The donors and the folder of stored tensors that expressions refer to.

    The values of merges that were wanted last are kept, `memory` bytes of them.
    """

    def __init__(self, pool: Pool, folder: Path, memory: int = 0) -> None:
        self.pool = pool
        self.folder = folder
        self.memory = memory
        self._opened: dict[Stored, TensorInfo] = {}
        self._kept: OrderedDict[Merge, torch.Tensor] = OrderedDict()
        self._n_kept = 0

    def value(self, values: Values) -> torch.Tensor:
        """The tensor that `values` describes, on the CPU, in the dtype it is or would be saved with.

        It is not the caller's to change.
        """
        if isinstance(values, (Copy, Stored)):
            return self._place(values).read()
        if not isinstance(values, Merge):
            return values.compute(self)
        if values in self._kept:
            self._kept.move_to_end(values)
            return self._kept[values]
        result = self._merged(values)
        self._keep(values, result)
        return result

    def _merged(self, merge: Merge) -> torch.Tensor:
        terms = [self.value(term) for term in merge.terms]
        base = self.value(merge.base) if merge.base is not None else None
        every = terms if base is None else [*terms, base]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in every))
        terms = [term.to(dtype) for term in terms]
        return METHODS[merge.method](terms, base.to(dtype) if base is not None else None, dict(merge.settings))

    def _keep(self, merge: Merge, value: torch.Tensor) -> None:
        self._kept[merge] = value
        self._n_kept += value.nbytes
        while self._n_kept > self.memory:
            self._n_kept -= self._kept.popitem(last=False)[1].nbytes

    def info(self, values: Values) -> TensorInfo | None:
        """Where the bytes of `values` lie in a file of a donor or of the report; None if they are computed."""
        return self._place(values) if isinstance(values, (Copy, Stored)) else None

    def identity(self, expression: Expression) -> str:
        """A digest that says, without computing anything, whether two expressions are worth the same bytes.

        Equal digests, equal bytes. The other way round it holds for tensors that lie in a file; bytes that were
        computed in different ways may be equal all the same.
        """
        if isinstance(expression, Copy):
            return self.pool[expression.donor].digest(expression.tensor)
        if isinstance(expression, Stored):
            return expression.digest
        terms = [self.identity(term) for term in expression.terms]
        base = self.identity(expression.base) if expression.base is not None else None
        return xxhash.xxh3_128(f"{expression.method} {terms} {base} {expression.settings}".encode()).hexdigest()

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
