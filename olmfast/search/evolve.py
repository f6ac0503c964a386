"""Evolution strategies, (1+lambda), on one weight: in singular-value space, and on its row norms.

Offspring are rounded to the checkpoint's dtype before they are evaluated; a weight that nothing improves stays
bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.kernels import offspring_count
from olmfast.search.log import Outcome
from olmfast.search.loop import Search, Step
from olmfast.search.ranking import Comparison, choose
from olmfast.weights.architecture import Unit
from olmfast.weights.offspring import NormOffspring, Offspring, SvdOffspring

SVD_DECAY = 0.8  # sigma's factor after a success, SVD-ES
NORM_DECAY = 0.9  # and norm-ES


def refine(search: Search, unit: Unit, again: str = "") -> bool:
    """SVD-ES and then norm-ES, where switched on, on each of the unit's matrices; true if anything changed.

    `again` as for `swap`.
    """
    changed = False
    config = search.config
    for tensor in unit.tensors:
        if search.is_matrix(tensor):
            if config.es_svd:
                changed |= _evolve(search, unit, tensor, "svd_es", config.es_svd_generations, again)
            if config.es_norm:
                changed |= _evolve(search, unit, tensor, "norm_es", config.es_norm_generations, again)
            search.sources.release_parent()
    return changed


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


def _evolve(search: Search, unit: Unit, tensor: str, method: str, generations: int, again: str) -> bool:
    successes = 0

    inside = Unit(unit.name, unit.kind, (tensor,), unit.blocks)

    def propose(number: int) -> list[Candidate]:
        return [Candidate("current"), *generation(search, tensor, method, number, successes)]

    def propose_sum(siblings: Sequence[Candidate], skills: Sequence[float]) -> list[Candidate]:
        return [Candidate("current"), consolidated(siblings, tensor, skills)]

    for number in range(generations):
        key = f"tensors/{unit.name}/{method}/{number}"
        siblings = generation(search, tensor, method, number, successes) if search.crossfit else []
        step = Step(
            f"{key}{again}",
            method,
            inside,
            partial(propose, number),
            accept=partial(_accept_any, search) if search.config.es_accept == "any" else None,
        )
        outcome = search.take(step)
        successes += outcome.changed
        skills = _skills(search, outcome, siblings)
        if not outcome.changed and len(set(skills)) > 1:
            step = Step(f"{key}/sum{again}", method, inside, partial(propose_sum, siblings, skills))
            successes += search.take(step).changed
    return successes > 0


def _skills(search: Search, outcome: Outcome, siblings: Sequence[Candidate]) -> list[float]:
    """The mean skill of each of a generation's offspring; none where one has no score."""
    if search.crossfit is None:
        return []
    found = []
    for one in siblings:
        means = {name: score for name, by in outcome.metrics.items() if (score := by[one.label]) is not None}
        found.append(search.crossfit.scale.skill(means) if len(means) == len(outcome.metrics) else math.nan)
    return found if all(map(math.isfinite, found)) else []


def consolidated(siblings: Sequence[Candidate], tensor: str, skills: Sequence[float]) -> Candidate:
    """One more candidate of a generation: the sum of its offspring's perturbations, each by how much its skill is above
    the generation's mean, as long as one of them (CoRP, arXiv 2605.31494)."""
    center = math.fsum(skills) / len(skills)
    size = math.sqrt(math.fsum((skill - center) ** 2 for skill in skills))
    first = siblings[0].values[tensor]
    assert isinstance(first, Offspring)
    shares = tuple((skill - center) / size for skill in skills)
    return Candidate(f"{first.method}/{first.generation}/sum", {tensor: replace(first, shares=shares)})


def _accept_any(search: Search, scores: Scores, alive: list[int]) -> list[int]:
    """The original's rule: the best of the offspring wins if it improves any dataset."""
    offspring = [row for row in alive if row != 0]
    if not offspring:
        return [0]
    best = choose(scores, offspring, search.rules)
    comparison = Comparison(scores, search.rules)
    return [best if any(comparison.is_better(name, best, 0) for name in comparison.means) else 0]
