"""What an expression is worth: reads donors and stored tensors, and composes the formulas of the kernels.

Adding a method of merging is adding a function to METHODS.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path
from typing import Literal, Protocol

import torch
import xxhash

from olmfast import kernels
from olmfast.errors import OlmfastError
from olmfast.kernels.spherical import coefficients, products_ref
from olmfast.weights import combining, row_wise
from olmfast.weights.checkpoint import TensorInfo, read_header
from olmfast.weights.chunks import Held, Operands, Piece, Readable, RowsOf, Scratch, Settings, Streamed
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Copy, Expression, MeanRow, Merge, Rows, Setting, Stored
from olmfast.weights.task_vectors import (
    TaskVectors,
    arcee_fusion,
    keep_between,
    keep_by_rank,
    keep_largest,
    keep_random,
    sce,
)


class Computed(Protocol):
    """A candidate's values that are computed on demand and are no part of a recipe until they are chosen."""

    def compute(self, sources: Sources) -> torch.Tensor:
        """The tensor, in the dtype it would be saved with."""
        ...


Values = Expression | Computed
Whole = Callable[[list[torch.Tensor], torch.Tensor | None, Settings], torch.Tensor]


@dataclass(frozen=True)
class Parameter:
    """A setting of a method: its default (None: a merge file has to give it), and what it belongs to.

    `per` is `merge` for one value, `term` for one per term, `input` for one per term and one for a base among them.
    """

    name: str
    default: bool | int | float | None
    per: Literal["merge", "term", "input"] = "merge"


@dataclass(frozen=True)
class Method:
    """One way to merge.

    `prepare` looks at the operands as often as it has to and returns what gives the result a stretch at a time.
    `whole`, where there is one, is the same on tensors in memory, by a kernel.
    `base`: whether task vectors are taken from a base; where it is `term`, the base is the first term.
    `n_terms`: how many terms it takes at least and at most, a base that is a term included.
    """

    prepare: Callable[[Operands, Settings], Piece]
    source: str
    parameters: tuple[Parameter, ...] = ()
    base: Literal["required", "optional", "term", "none"] = "none"
    n_terms: tuple[int, int | None] = (1, None)
    whole: Whole | None = None

    def settings(self, given: Mapping[str, Setting]) -> Settings:
        """The settings of one merge, with this method's defaults."""
        return Settings(given, {"weight": 1.0} | {p.name: p.default for p in self.parameters if p.default is not None})

    def __call__(
        self, terms: Sequence[torch.Tensor], base: torch.Tensor | None, given: Mapping[str, Setting]
    ) -> torch.Tensor:
        """The merge of tensors of one dtype, in that dtype. Raises ValueError or TypeError for unfit settings."""
        settings = self.settings(given)
        if self.base == "required" and base is None:
            raise ValueError("the method needs a base")
        if self.whole is not None:
            return self.whole(list(terms), base, settings)
        held = Held(base) if base is not None else None
        operands = Operands([Held(term) for term in terms], held, terms[0].device)
        out = torch.empty(operands.n_values, dtype=terms[0].dtype, device=terms[0].device)
        piece = self.prepare(operands, settings)
        for start, stop in operands.stretches():
            out[start:stop] = piece(start, stop)
        return out.view(operands.shape)


def _linear(operands: Operands, settings: Settings) -> Piece:
    """sum_i weight_i * term_i, divided by the sum of the weights unless `normalize` is false.

    Raises ValueError where that sum is 0.
    """
    weights = [settings.each("weight", i) for i in range(len(operands))]
    normalize = settings.flag("normalize", True)
    if normalize:
        combining.normalised(weights)
    return lambda start, stop: operands.combined(weights, 0.0, start, stop, normalize)


def _linear_whole(terms: list[torch.Tensor], _: torch.Tensor | None, settings: Settings) -> torch.Tensor:
    weights = [settings.each("weight", i) for i in range(len(terms))]
    return kernels.weighted_sum(terms, weights, normalize=settings.flag("normalize", True))


def _slerp_whole(terms: list[torch.Tensor], _: torch.Tensor | None, settings: Settings) -> torch.Tensor:
    first, second = terms
    return kernels.slerp(first, second, settings.number("t", 0.5))


def _slerp_weights(operands: Operands, settings: Settings) -> list[float]:
    """See `kernels.slerp`."""
    products = torch.zeros(3, dtype=torch.float64, device=operands.device)
    for start, stop in operands.stretches():
        products += products_ref(operands.term(0, start, stop), operands.term(1, start, stop))
    factors: list[float] = coefficients(products, settings.number("t", 0.5)).tolist()
    return factors


def _ties_whole(terms: list[torch.Tensor], base: torch.Tensor | None, settings: Settings) -> torch.Tensor:
    return kernels.ties_merge(
        terms,
        [settings.each("weight", i) for i in range(len(terms))],
        [settings.each("density", i) for i in range(len(terms))],
        base=base,
        normalize=settings.flag("normalize", True),
        scale=settings.number("lambda", 1.0),
    )


def _summed(weights: Callable[[Operands, Settings], Sequence[float]]) -> Callable[[Operands, Settings], Piece]:
    """A method that is a sum with weights of the terms, or of their differences from the base."""

    def prepare(operands: Operands, settings: Settings) -> Piece:
        found = list(weights(operands, settings))
        of_base = 1.0 - sum(found) if operands.base is not None else 0.0
        return lambda start, stop: operands.combined(found, of_base, start, stop)

    return prepare


def _task_arithmetic_weights(operands: Operands, settings: Settings) -> list[float]:
    """base + lambda * sum_i weight_i * (term_i - base), divided by the sum of the weights if asked."""
    weights, scale = [settings.each("weight", i) for i in range(len(operands))], settings.number("lambda", 1.0)
    total = sum(weights) if settings.flag("normalize", False) else 1.0
    return [scale * weight / (total if abs(total) >= 1e-8 else 1.0) for weight in weights]


def _nuslerp(operands: Operands, settings: Settings) -> Piece:
    """SLERP at t = weight_2 / (weight_1 + weight_2) of the terms or of their differences from a base."""
    first, second = settings.each("weight", 0), settings.each("weight", 1)
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    if not settings.flag("nuslerp_flatten", True):
        by_column = settings.flag("nuslerp_row_wise", False) and len(operands.shape) > 1
        return (row_wise.nuslerp_by_column if by_column else row_wise.nuslerp_by_row)(operands, t)
    return _summed(lambda operands, _: combining.nuslerp_weights(operands.gram(), t))(operands, settings)


def _model_stock(operands: Operands, settings: Settings) -> Piece:
    """t * mean of the terms + (1 - t) * base, by the angle between their differences from the base."""
    if settings.flag("filter_wise", False):
        return row_wise.model_stock_by_row(operands, settings)
    return _summed(lambda operands, _: combining.model_stock_weights(operands.gram()))(operands, settings)


_WEIGHT = Parameter("weight", None, "term")
_DENSITY, _LAMBDA = Parameter("density", 1.0, "term"), Parameter("lambda", 1.0)
_GAMMA, _EPSILON = Parameter("gamma", 0.01, "term"), Parameter("epsilon", 0.15, "term")


def _task_vectors(method: TaskVectors, source: str, *parameters: Parameter, whole: Whole | None = None) -> Method:
    flags = (Parameter("normalize", method.normalize), Parameter("rescale", method.rescale))
    return Method(method, source, (_WEIGHT, _DENSITY, _LAMBDA, *flags, *parameters), "required", whole=whole)


# Merge.method -> how it is done. Settings beside the parameters: `seed` and `stream` of methods that draw numbers.
METHODS: dict[str, Method] = {
    "linear": Method(
        _linear,
        "arXiv 2203.05482",
        (Parameter("weight", None, "input"), Parameter("normalize", True)),
        whole=_linear_whole,
    ),
    "slerp": Method(
        _summed(_slerp_weights),
        "Shoemake, SIGGRAPH 1985",
        (Parameter("t", None),),
        "term",
        (2, 2),
        whole=_slerp_whole,
    ),
    "nuslerp": Method(
        _nuslerp,
        "Shoemake, SIGGRAPH 1985",
        (_WEIGHT, Parameter("nuslerp_flatten", True), Parameter("nuslerp_row_wise", False)),
        "optional",
        (2, 2),
    ),
    "multislerp": Method(
        _summed(
            lambda operands, settings: combining.multislerp_weights(
                operands.gram(), _term_weights(operands, settings), settings.number("eps", 1e-8)
            )
        ),
        "`combining.multislerp_weights`",
        (_WEIGHT, Parameter("normalize_weights", True), Parameter("eps", 1e-8)),
        "optional",
    ),
    "karcher": Method(
        _summed(
            lambda operands, settings: combining.karcher_weights(
                operands.gram(), settings.integer("max_iter", 10), settings.number("tol", 1e-5)
            )
        ),
        "arXiv 2603.04972",
        (Parameter("max_iter", 10), Parameter("tol", 1e-5)),
    ),
    "task_arithmetic": Method(
        _summed(_task_arithmetic_weights),
        "arXiv 2212.04089",
        (_WEIGHT, _LAMBDA, Parameter("normalize", False)),
        "required",
    ),
    "ties": _task_vectors(TaskVectors(keep_largest, signs=True, normalize=True), "arXiv 2306.01708", whole=_ties_whole),
    "dare_linear": _task_vectors(TaskVectors(keep_random, signs=False, rescale=True), "arXiv 2311.03099"),
    "dare_ties": _task_vectors(TaskVectors(keep_random, signs=True, rescale=True), "arXiv 2311.03099"),
    "della": _task_vectors(
        TaskVectors(keep_by_rank, signs=True, normalize=True, rescale=True, rows=True), "arXiv 2406.11617", _EPSILON
    ),
    "della_linear": _task_vectors(
        TaskVectors(keep_by_rank, signs=False, rescale=True, rows=True), "arXiv 2406.11617", _EPSILON
    ),
    "breadcrumbs": _task_vectors(TaskVectors(keep_between, signs=False), "arXiv 2312.06795", _GAMMA),
    "breadcrumbs_ties": _task_vectors(TaskVectors(keep_between, signs=True), "arXiv 2312.06795", _GAMMA),
    "model_stock": Method(_model_stock, "arXiv 2403.19522", (Parameter("filter_wise", False),), "required", (2, None)),
    "sce": Method(sce, "arXiv 2408.07990", (Parameter("select_topk", 1.0),), "required"),
    "arcee_fusion": Method(arcee_fusion, "mergekit's behaviour", (), "required", (1, 1)),
    "passthrough": Method(
        _summed(lambda _, settings: [settings.each("scale", 0)]),
        "the tensor, times `scale`",
        (Parameter("scale", 1.0, "input"),),
        n_terms=(1, 1),
    ),
}


def _term_weights(operands: Operands, settings: Settings) -> list[float]:
    weights = [settings.each("weight", i) for i in range(len(operands))]
    if not settings.flag("normalize_weights", True):
        return weights
    weights, total = combining.normalised(weights)
    return [weight / total for weight in weights]


class Sources:
    """The donors and the folder of stored tensors that expressions refer to.

    The values of merges that were wanted last are kept, `memory` bytes of them. `device` is where what is read a
    stretch at a time is computed.
    """

    def __init__(self, pool: Pool, folder: Path, memory: int = 0, device: torch.device | str = "cpu") -> None:
        self.pool = pool
        self.device = torch.device(device)
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
        if isinstance(values, (Rows, MeanRow)):
            return _read(self.readable(values))
        if not isinstance(values, Merge):
            return values.compute(self)
        if values in self._kept:
            self._kept.move_to_end(values)
            return self._kept[values]
        result = self._merged(values)
        self._keep(values, result)
        return result

    def _merged(self, merge: Merge) -> torch.Tensor:
        if "dtype" in dict(merge.settings):
            return _read(self.readable(merge))
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

    def readable(self, expression: Expression, memory: Scratch | None = None) -> Readable:
        """The tensor an expression is worth, to be read a stretch at a time: what a writer wants.

        Its values are those of `value`. Merges inside a merge are computed whole and kept. What is read with the same
        `memory` must be read one after the other.
        Raises ValueError or TypeError for shapes or settings that do not fit.
        """
        if isinstance(expression, (Copy, Stored)):
            return self._place(expression)
        if isinstance(expression, Rows):
            sources = [
                (None if source is None else self._operand(source), begin, end)
                for source, begin, end in expression.parts
            ]
            return RowsOf(sources)
        if isinstance(expression, MeanRow):
            return Held(_mean_row(self._operand(expression.of)))
        base = self._operand(expression.base) if expression.base is not None else None
        settings = dict(expression.settings)
        dtype = getattr(torch, str(settings["dtype"])) if "dtype" in settings else None
        operands = Operands([self._operand(term) for term in expression.terms], base, self.device, dtype, memory)
        method = METHODS[expression.method]
        return Streamed(operands, lambda: method.prepare(operands, method.settings(settings)))

    def _operand(self, expression: Expression) -> Readable:
        return Held(self.value(expression)) if isinstance(expression, Merge) else self.readable(expression)

    def places(self, expression: Expression | None) -> Iterator[TensorInfo]:
        """Every tensor of a file that an expression is made of."""
        if isinstance(expression, (Copy, Stored)):
            yield self._place(expression)
        elif isinstance(expression, Merge):
            for term in (*expression.terms, expression.base):
                yield from self.places(term)
        elif isinstance(expression, Rows):
            for source, _, _ in expression.parts:
                yield from self.places(source)
        elif isinstance(expression, MeanRow):
            yield from self.places(expression.of)

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
        if isinstance(expression, Rows):
            parts = [(source and self.identity(source), begin, end) for source, begin, end in expression.parts]
            return xxhash.xxh3_128(f"rows {parts}".encode()).hexdigest()
        if isinstance(expression, MeanRow):
            return xxhash.xxh3_128(f"mean row {self.identity(expression.of)}".encode()).hexdigest()
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


def _read(tensor: Readable) -> torch.Tensor:
    out = torch.empty(prod(tensor.shape), dtype=tensor.dtype)
    tensor.read_into(out, 0)
    return out.view(tensor.shape)


def _mean_row(tensor: Readable) -> torch.Tensor:
    """(1, ...) the mean over the first dimension, in the tensor's dtype, summed in float64."""
    width = prod(tensor.shape[1:])
    total, row = torch.zeros(width, dtype=torch.float64), torch.empty(width, dtype=torch.float64)
    for start in range(0, prod(tensor.shape), width):
        tensor.read_into(row, start)
        total += row
    return (total / tensor.shape[0]).to(tensor.dtype).view(1, *tensor.shape[1:])
