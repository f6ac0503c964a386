"""Stages that choose donors: the base, the boundary, blocks (in windows) and modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product, zip_longest

from olmfast.config import RunConfig
from olmfast.evaluation.scorer import Candidate, Scores
from olmfast.report import Outcome
from olmfast.search.ranking import order
from olmfast.search.stage import Search, Step
from olmfast.weights.architecture import Architecture, Unit
from olmfast.weights.recipe import Copy, Recipe


def whole(donor: str, tensors: tuple[str, ...]) -> Recipe:
    """The recipe that is one donor, unchanged."""
    return Recipe(donor, {name: Copy(donor, name) for name in tensors})


def score_donors(search: Search) -> Outcome:
    """Evaluate every donor whole; the outcome orders them, and its winner is the base of the config."""
    unit = search.architecture.model_unit(search.tensors)
    base = search.model.recipe.base
    untouched = owner(search.model.recipe, unit) == base  # not so where another tool's report was taken over

    def propose() -> list[Candidate]:
        others = [_donor(name, unit) for name in search.donors if name != base]
        return [Candidate(base) if untouched else _donor(base, unit), *others]

    def accept(scores: Scores, alive: list[int]) -> list[int]:
        # The donors' own scores are the scale here: no earlier step has set one.
        means = {name: scores.mean(name)[alive] for name in scores.samples}
        spans = {name: (float(values.min()), float(values.max())) for name, values in means.items()}
        ranked = order(scores, alive, replace(search.rules, spans=spans))
        if search.config.base_select and search.report.own.get("imported_base") is None:
            return ranked
        return [0, *(row for row in ranked if row != 0)]

    return search.take(Step("base", "base", unit, propose, accept=accept, guarded=False, commit=False))


def choose_boundary(search: Search) -> None:
    """Embedding, final norm and head move as one unit."""
    swap(search, "boundary", search.architecture.boundary_unit(search.tensors))


def choose_blocks(search: Search) -> None:
    """Each block, or each window of `markov` + 1 blocks in all combinations, in the config's direction."""
    size = search.config.markov + 1
    blocks = list(range(search.architecture.n_blocks))
    if search.config.direction == "backward":
        blocks.reverse()
    windows = [
        search.architecture.window_unit(search.tensors, sorted(blocks[start : start + size]))
        for start in range(0, len(blocks), size)
    ]
    for window, following in in_order(windows):
        swap(search, "layers", window, following)


def module_units(search: Search) -> list[Unit]:
    """The units of the tensor stage: modules inside the blocks that a pattern of `units` matches, in order."""
    return select_units(search.config, search.architecture, search.tensors)


def select_units(config: RunConfig, architecture: Architecture, tensors: Sequence[str]) -> list[Unit]:
    """The modules inside the blocks that a pattern of the config's `units` matches, in its direction."""
    units = [
        unit
        for unit in architecture.module_units(tensors, config.skip_norm)
        if any(fnmatchcase(name, pattern) for pattern in config.units for name in (unit.name, *unit.tensors))
    ]
    return units[::-1] if config.direction == "backward" else units


def in_order(units: Sequence[Unit]) -> Iterator[tuple[Unit, Unit | None]]:
    """Each unit with the one that follows it."""
    return zip_longest(units, units[1:])


def swap(search: Search, stage: str, unit: Unit, following: Unit | None = None) -> Outcome:
    """Try every donor's values for the unit (every combination of donors, for a window of blocks).

    While they are evaluated, the donors' values for the `following` unit are read from disk.
    """
    key = stage if unit.kind == "boundary" else f"{stage}/{unit.name}"

    def propose() -> list[Candidate]:
        for donor in search.donors:
            search.model.prefetch({name: Copy(donor, name) for name in (following.tensors if following else ())})
        return swap_candidates(search, unit)

    return search.take(Step(key, stage, unit, propose))


def swap_candidates(search: Search, unit: Unit) -> list[Candidate]:
    """What is there now, then the donors in pool order."""
    parts = [unit]
    if len(unit.blocks) > 1:
        parts = [search.architecture.window_unit(unit.tensors, [block]) for block in unit.blocks]
    candidates = [Candidate(" + ".join(owner(search.model.recipe, part) for part in parts))]
    for donors in product(search.donors, repeat=len(parts)):
        values = {n: Copy(d, n) for d, part in zip(donors, parts, strict=True) for n in part.tensors}
        label = " + ".join(donors)
        if label != candidates[0].label:
            candidates.append(Candidate(label, values))
    return candidates


def owner(recipe: Recipe, unit: Unit) -> str:
    """The donor that all of a unit's values come from, or `current` when there is no such one."""
    sources = {recipe.tensors[name] for name in unit.tensors}
    donors = {source.donor if isinstance(source, Copy) else "current" for source in sources}
    return donors.pop() if len(donors) == 1 else "current"


def _donor(name: str, unit: Unit) -> Candidate:
    return Candidate(name, {tensor: Copy(name, tensor) for tensor in unit.tensors}, settings=name)
