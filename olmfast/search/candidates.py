"""Stages that choose donors: the base, then units of every scale, as donors have them or blended with them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.search.acceptance import Scale
from olmfast.search.log import Outcome
from olmfast.search.loop import Search, Step
from olmfast.search.ranking import Rules, choose, order
from olmfast.search.spans import real_spans
from olmfast.weights.architecture import Unit
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression


def score_donors(search: Search) -> Outcome:
    """Evaluate every donor whole; the outcome orders them, and its winner is the base of the config."""
    unit = search.architecture.model_unit(search.tensors)
    base = search.recipe.base
    untouched = owner(search.recipe, unit) == base  # false where another tool's report was taken over

    def propose() -> list[Candidate]:
        pool = search.sources.pool
        models = [name for name in search.donors if name not in pool.blocks_only]
        donors = {name: Candidate(name, recipe=whole(name, pool.tensors)) for name in models}
        return [Candidate(base) if untouched else donors[base], *(donors[name] for name in donors if name != base)]

    def accept(scores: Scores, alive: list[int]) -> list[int]:
        if search.config.is_tested:
            return _by_skill(scores, alive, search.rules)
        # The donors' own scores are the scale here: no earlier step has set one.
        means = {name: scores.mean(name)[alive] for name in scores.samples}
        spans = {name: (float(values.min()), float(values.max())) for name, values in means.items()}
        rules = replace(search.rules, spans=spans)
        ranked = order(scores, alive, rules)
        deciding = search.config.chosen_by(search.config.base_select)
        first = 0
        if deciding and search.record.header.get("imported_base") is None:
            first = choose(scores.only(deciding), alive, rules)
        return [first, *(row for row in ranked if row != first)]

    step = Step("base", "base", unit, propose, accept=accept, guarded=False, commit=False, races=False, spans=True)
    return search.take(step)


def _by_skill(scores: Scores, alive: list[int], rules: Rules) -> list[int]:
    """The donors by their mean skill on the datasets that tell them apart; the base first where none does."""
    spans = real_spans({name: scores.samples[name][alive] for name in scores.samples})
    scale = Scale({name: span for name, span in spans.items() if span is not None}, rules.weights)
    means = {row: {name: float(scores.mean(name)[row]) for name in scale.spans} for row in alive}
    return sorted(alive, key=lambda row: -scale.skill(means[row])) if scale.spans else alive


def swap(search: Search, stage: str, unit: Unit, following: Unit | None = None, again: str = "") -> Outcome:
    """Try every candidate of `candidates` for the unit: each donor's values, and blends with them.

    While they are evaluated, the donors' values for the `following` unit are read from disk. `again` tells the steps
    of a later walk from those of the first.
    """
    key = (stage if stage == unit.name else f"{stage}/{unit.name}") + again
    wanted = search.config.boundary_select if unit.kind == "boundary" else False
    accept = partial(_accept_by, search, wanted) if isinstance(wanted, str) else None

    def propose() -> list[Candidate]:
        for donor in search.donors:
            search.sources.prefetch(Copy(donor, name) for name in (following.tensors if following else ()))
        if wanted in search.config.models:
            named = Candidate(str(wanted), {name: Copy(str(wanted), name) for name in unit.tensors})
            return [
                Candidate(owner(search.recipe, unit)),
                *([] if named.label == owner(search.recipe, unit) else [named]),
            ]
        return swap_candidates(search, unit)

    return search.take(Step(key, stage, unit, propose, accept=accept))


def _accept_by(search: Search, wanted: str, scores: Scores, alive: list[int]) -> list[int]:
    """The winner by some datasets alone, or the one candidate beside the current values that a model's name left."""
    deciding = search.config.chosen_by(wanted)
    return [choose(scores.only(deciding), alive, search.rules) if deciding else alive[-1]]


def swap_candidates(search: Search, unit: Unit) -> list[Candidate]:
    """The incumbent, then the others in the order of `candidates` and of the pool.

    The blocks of a window choose independently: every combination is a candidate.
    """
    parts = [unit]
    if unit.kind == "block" and len(unit.blocks) > 1:
        parts = [search.architecture.window_unit(unit.tensors, [block]) for block in unit.blocks]
    found = []
    for chosen in product(*(_options(search, part) for part in parts)):
        values = {name: value for option in chosen for name, value in option.values.items()}
        found.append(Candidate(" + ".join(option.label for option in chosen), values))
    return [Candidate(found[0].label), *found[1:]]


def _options(search: Search, part: Unit) -> list[Candidate]:
    """What a part may become; the first are its current values."""
    recipe = search.recipe
    options = [Candidate(owner(recipe, part), {name: recipe.tensors[name] for name in part.tensors})]
    others = [donor for donor in search.donors if donor != options[0].label]
    for kind in search.config.candidates:
        if kind.method == "swap":
            options += [Candidate(donor, {name: Copy(donor, name) for name in part.tensors}) for donor in others]
        for value in kind.values:
            for donor in others:
                values = {name: _blend(search, kind.method, value, Copy(donor, name)) for name in part.tensors}
                options.append(Candidate(f"{kind.method} {value:g} {donor}", values))
    return options


def _blend(search: Search, method: str, value: float, donor: Copy) -> Expression:
    """A tensor's current values blended with a donor's; the current ones where there is nothing to blend."""
    sources, recipe = search.sources, search.recipe
    current, info = recipe.tensors[donor.tensor], sources.pool[donor.donor].tensors[donor.tensor]
    if not info.dtype.is_floating_point or current.identity(sources) == donor.identity(sources):
        return current
    base, pair = Copy(recipe.base, donor.tensor), (current, donor)
    if method == "task_arithmetic":
        return merge(method, pair, base, weight=(1.0, value))
    if len(info.shape) < 2:  # nothing to turn, little to trim
        return merge("linear", pair, weight=(0.5, 0.5) if method == "ties" else (1 - value, value))
    if method == "ties":
        return merge(method, pair, base, density=value)
    return merge(method, pair, weight=(1 - value, value)) if method == "linear" else merge(method, pair, t=value)


def owner(recipe: Recipe, unit: Unit) -> str:
    """The donor that all of a unit's values come from, or `current` if there is no single one."""
    sources = {recipe.tensors[name] for name in unit.tensors}
    donors = {source.donor if isinstance(source, Copy) else "current" for source in sources}
    return donors.pop() if len(donors) == 1 else "current"
