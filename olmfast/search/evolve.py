"""Evolution strategies, (1+lambda), on one weight: in singular-value space, and on its row norms.

Offspring are rounded to the checkpoint's dtype before they are evaluated; a weight that nothing improves stays
bit-identical.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.search.loop import Search, Step
from olmfast.search.ranking import Comparison, choose
from olmfast.weights.architecture import Unit
from olmfast.weights.offspring import NormOffspring, Offspring, SvdOffspring, offspring_count

SVD_DECAY = 0.8  # sigma's factor after a success, SVD-ES
NORM_DECAY = 0.9  # and norm-ES


def refine(search: Search, unit: Unit, again: str = "") -> None:
    """SVD-ES and then norm-ES, where switched on, on each of the unit's matrices; `again` as for `swap`."""
    config = search.config
    for tensor in unit.tensors:
        if search.is_matrix(tensor):
            if config.es_svd:
                _evolve(search, unit, tensor, "svd_es", config.es_svd_generations, again)
            if config.es_norm:
                _evolve(search, unit, tensor, "norm_es", config.es_norm_generations, again)
            search.sources.release_parent()


def generation(search: Search, tensor: str, method: str, number: int, successes: int) -> list[Candidate]:
    """The offspring of a tensor's current values; none of a matrix of zeros, which has no directions.

    `successes` is how many earlier generations have improved the tensor.
    """
    config = search.config
    dtype = str(search.saved_dtype(tensor)).removeprefix("torch.")
    first: Offspring
    if method == "svd_es":
        sigma = config.es_svd_sigma * SVD_DECAY**successes
        first = SvdOffspring(search.recipe.tensors[tensor], dtype, sigma, config.seed, tensor, number, 0)
    else:
        sigma, axis = config.es_norm_sigma * NORM_DECAY**successes, search.architecture.row_axis(tensor)
        first = NormOffspring(search.recipe.tensors[tensor], dtype, sigma, config.seed, tensor, number, 0, axis)
    dimensions = first.dimensions(search.sources)
    siblings = [replace(first, index=index) for index in range(offspring_count(dimensions))] if dimensions else []
    return [Candidate(f"{method}/{number}/{one.index}", {tensor: one}) for one in siblings]


def _evolve(search: Search, unit: Unit, tensor: str, method: str, generations: int, again: str) -> None:
    successes = 0

    def propose(number: int) -> list[Candidate]:
        return [Candidate("current"), *generation(search, tensor, method, number, successes)]

    for number in range(generations):
        step = Step(
            f"tensors/{unit.name}/{method}/{number}{again}",
            method,
            Unit(unit.name, unit.kind, (tensor,), unit.blocks),
            partial(propose, number),
            accept=partial(_accept_any, search) if search.config.es_accept == "any" else None,
        )
        successes += search.take(step).changed


def _accept_any(search: Search, scores: Scores, alive: list[int]) -> list[int]:
    """The original's rule: the best of the offspring wins if it improves any dataset."""
    offspring = [row for row in alive if row != 0]
    if not offspring:
        return [0]
    best = choose(scores, offspring, search.rules)
    comparison = Comparison(scores, search.rules)
    return [best if any(comparison.is_better(name, best, 0) for name in comparison.means) else 0]
