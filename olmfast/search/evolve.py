"""Evolution strategies, (1+lambda), on one weight: in singular-value space, and on its row norms.

Every random number comes from a counter-based generator keyed by seed, tensor, method, generation and
offspring, so that offspring k of generation g of a tensor is the same wherever and whenever it is made.
Offspring are rounded to the checkpoint's dtype before they are evaluated; a weight that nothing improves stays
bit-identical.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.search.draws import normal
from olmfast.search.loop import Search, Step
from olmfast.search.ranking import Comparison, choose
from olmfast.weights.architecture import Unit
from olmfast.weights.offspring import NormOffspring, Parent, SvdOffspring
from olmfast.weights.recipe import Expression

SVD_DECAY = 0.8  # sigma's factor after a success, SVD-ES
NORM_DECAY = 0.9  # and norm-ES
MIN_SPREAD = 1e-10


def offspring_count(dimensions: int) -> int:
    """lambda = max(4, int(4 + 3 ln n)) (Hansen, arXiv 1604.00772, table 1)."""
    return max(4, int(4 + 3 * math.log(dimensions)))


def svd_coefficients(s: torch.Tensor, sigma: float, draws: torch.Tensor) -> torch.Tensor:
    """Draws (n,) ~ N(0, 1) -> coefficients (k,) = d * g: d = sigma' * draw, g inverse damping of mean 1.

    sigma' = sigma * max(std(S), 1e-10); g_j = sqrt(max S / (S_j + 1e-10)), divided by mean(g).
    """
    s = s.double().cpu()
    spread = float(s.std(unbiased=True)) if len(s) > 1 else 0.0
    damping = torch.sqrt(s.max() / (s + 1e-10))
    return draws * (sigma * max(spread, MIN_SPREAD)) * damping / damping.mean()


def refine(search: Search, unit: Unit) -> None:
    """SVD-ES and then norm-ES, where switched on, on each of the unit's matrices."""
    config = search.config
    for tensor in unit.tensors:
        if search.is_matrix(tensor):
            if config.es_svd:
                _evolve(search, unit, tensor, "svd_es", config.es_svd_generations)
            if config.es_norm:
                _evolve(search, unit, tensor, "norm_es", config.es_norm_generations)


def _evolve(search: Search, unit: Unit, tensor: str, method: str, generations: int) -> None:
    parents: dict[Expression, Parent] = {}  # a parent lives on while no offspring replaces it
    successes = 0

    def propose(generation: int) -> list[Candidate]:
        now = search.model.recipe.tensors[tensor]
        if now not in parents:
            parents.clear()
            weight = search.model.sources.value(now).to(search.saved_dtype(tensor))
            parents[now] = Parent(weight.to(search.model.device))
        offspring = _offspring(search, tensor, parents[now], method, generation, successes)
        return [Candidate("current"), *offspring]

    for generation in range(generations):
        step = Step(
            f"tensors/{unit.name}/{method}/{generation}",
            method,
            Unit(unit.name, unit.kind, (tensor,), unit.blocks),
            partial(propose, generation),
            accept=partial(_accept_any, search) if search.config.es_accept == "any" else None,
        )
        successes += search.take(step).changed


def _offspring(
    search: Search, tensor: str, parent: Parent, method: str, generation: int, successes: int
) -> list[Candidate]:
    config = search.config
    axis = search.architecture.row_axis(tensor)
    dimensions = len(parent.factors.s) if method == "svd_es" else parent.weight.shape[axis]
    if dimensions == 0:
        return []  # a matrix of zeros has no directions
    candidates = []
    for index in range(offspring_count(dimensions)):
        draws = normal(dimensions, config.seed, tensor, method, generation, index)
        values: SvdOffspring | NormOffspring
        if method == "svd_es":
            sigma = config.es_svd_sigma * SVD_DECAY**successes
            values = SvdOffspring(parent, svd_coefficients(parent.factors.s, sigma, draws))
        else:
            sigma = config.es_norm_sigma * NORM_DECAY**successes
            values = NormOffspring(parent, draws * sigma, axis)
        candidates.append(Candidate(f"{method}/{generation}/{index}", {tensor: values}))
    return candidates


def _accept_any(search: Search, scores: Scores, alive: list[int]) -> list[int]:
    """The original's rule: the best of the offspring wins if it improves any dataset."""
    offspring = [row for row in alive if row != 0]
    if not offspring:
        return [0]
    best = choose(scores, offspring, search.rules)
    comparison = Comparison(scores, search.rules)
    return [best if any(comparison.is_better(name, best, 0) for name in comparison.means) else 0]
