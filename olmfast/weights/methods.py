"""The merge methods, composed of the formulas of the kernels.

To add one, add an entry to METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from olmfast.kernels.spherical import coefficients, products_ref
from olmfast.weights import combining, overlap, row_wise
from olmfast.weights.chunks import Held, Operands, Piece, Setting, Settings
from olmfast.weights.fused import Sum
from olmfast.weights.task_vectors import (
    TaskVectors,
    arcee_fusion,
    keep_between,
    keep_by_rank,
    keep_largest,
    keep_random,
    sce,
)


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

    `prepare` reads the operands as often as it needs and returns what gives the result a chunk at a time.
    `base`: whether task vectors are taken from a base; where it is `term`, the base is the first term.
    `n_terms`: the fewest and the most terms it takes, including a base that is a term.
    """

    prepare: Callable[[Operands, Settings], Piece]
    source: str
    parameters: tuple[Parameter, ...] = ()
    base: Literal["required", "optional", "term", "none"] = "none"
    n_terms: tuple[int, int | None] = (1, None)

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
        held = Held(base) if base is not None else None
        operands = Operands([Held(term) for term in terms], held, terms[0].device)
        out = torch.empty(operands.n_values, dtype=terms[0].dtype, device=terms[0].device)
        piece = self.prepare(operands, settings)
        for start, stop in operands.chunks():
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
    return Sum(operands, weights, normalize=normalize)


def _slerp_weights(operands: Operands, settings: Settings) -> list[float]:
    """See `kernels.slerp`."""
    products = torch.zeros(3, dtype=torch.float64, device=operands.device)
    for start, stop in operands.chunks():
        products += products_ref(operands.term(0, start, stop), operands.term(1, start, stop))
    factors: list[float] = coefficients(products, settings.number("t", 0.5)).tolist()
    return factors


def _summed(weights: Callable[[Operands, Settings], Sequence[float]]) -> Callable[[Operands, Settings], Piece]:
    """A method that is a sum with weights of the terms, or of their differences from the base."""

    def prepare(operands: Operands, settings: Settings) -> Piece:
        found = list(weights(operands, settings))
        of_base = 1.0 - sum(found) if operands.base is not None else 0.0
        return Sum(operands, found, of_base)

    return prepare


def _task_arithmetic_weights(operands: Operands, settings: Settings) -> list[float]:
    """base + lambda * sum_i weight_i * (term_i - base), divided by the sum of the weights if requested."""
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


def _nearswap(operands: Operands, settings: Settings) -> Piece:
    """base + (term - base), no entry of which moves further than t: near values are swapped, far ones stay near."""
    t = max(settings.number("t", 0.0), 0.0)

    def piece(start: int, stop: int) -> torch.Tensor:
        base = operands.term(0, start, stop)
        difference = operands.term(1, start, stop) - base
        return difference.clamp_(-t, t).add_(base)

    return piece


_WEIGHT = Parameter("weight", None, "term")
_DENSITY, _LAMBDA = Parameter("density", 1.0, "term"), Parameter("lambda", 1.0)
_GAMMA, _EPSILON = Parameter("gamma", 0.01, "term"), Parameter("epsilon", 0.15, "term")
_CHANGE = Parameter("epsilon", overlap.EPSILON)


def _task_vectors(method: TaskVectors, source: str, *parameters: Parameter) -> Method:
    flags = (Parameter("normalize", method.normalize), Parameter("rescale", method.rescale))
    return Method(method, source, (_WEIGHT, _DENSITY, _LAMBDA, *flags, *parameters), "required")


# Merge.method -> how it is done. Settings besides the parameters: `seed` and `stream` of methods that draw numbers.
METHODS: dict[str, Method] = {
    "linear": Method(
        _linear,
        "arXiv 2203.05482",
        (Parameter("weight", None, "input"), Parameter("normalize", True)),
    ),
    "slerp": Method(
        _summed(_slerp_weights),
        "Shoemake, SIGGRAPH 1985",
        (Parameter("t", None),),
        "term",
        (2, 2),
    ),
    "nearswap": Method(_nearswap, "mergekit's behaviour", (Parameter("t", None),), "term", (2, 2)),
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
    "ties": _task_vectors(TaskVectors(keep_largest, signs=True, normalize=True), "arXiv 2306.01708"),
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
    "ram": Method(overlap.ram, "arXiv 2601.13572", (_CHANGE,), "required"),
    "ramplus_tl": Method(
        overlap.ram_plus,
        "arXiv 2601.13572",
        (Parameter("r", overlap.RATIO), Parameter("alpha", overlap.CLIP), _CHANGE),
        "required",
    ),
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
