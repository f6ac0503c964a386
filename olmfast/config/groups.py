"""What is merged with what: the models of a merge file or of one of its slices, and what a method requires of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from olmfast.config.parameters import IGNORED, Parameters, Varying, entries_taken, parameter_given
from olmfast.errors import did_you_mean, show
from olmfast.weights.methods import METHODS, Method, Parameter


@dataclass(frozen=True)
class Source:
    """A model in a group, with its own parameters and, in a slice, its layers."""

    model: str
    parameters: Parameters
    layer_range: tuple[int, int] | None = None


@dataclass(frozen=True)
class Group:
    """Models that are merged with each other."""

    name: str
    sources: list[Source]
    base: str | None
    parameters: Parameters

    @property
    def models(self) -> list[str]:
        """The models' names."""
        return [source.model for source in self.sources]

    @property
    def n_layers(self) -> int:
        """How many layers a slice makes."""
        begin, end = self.sources[0].layer_range or (0, 0)
        return end - begin

    def layer_range(self, model: str) -> tuple[int, int] | None:
        """The layers of one of its models; None for all."""
        return next(source.layer_range for source in self.sources if source.model == model)

    def terms(self, method: Method) -> list[Source]:
        """The models that are terms of the merge, in order: all, or all but the base of task vectors."""
        if method.base == "none":
            return self.sources
        others = [source for source in self.sources if source.model != self.base]
        if method.base != "term":
            return others
        return [*(source for source in self.sources if source.model == self.base), *others]


def group_faults(name: str, group: Group, shared: Parameters) -> Iterator[str]:
    """What the method `name` requires of the models it is given, and they lack; `shared` are the file's parameters."""
    method = METHODS[name]
    models = [source.model for source in group.sources]
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        yield (
            f"{group.name}: {show(twice)} is listed twice, and a model merged with itself is itself; to repeat layers "
            "of it, give them in slices of their own"
        )
        return
    if method.base in ("required", "term") and group.base is None:
        yield f"base_model: required by {name}"
        return
    if method.base != "none" and group.base is not None and group.base not in models:
        hint = did_you_mean(group.base, models)
        yield f"{group.name}: the base_model {show(group.base)} is not among the sources{hint}"
        return
    terms = group.terms(method)
    least, most = method.n_terms
    if not terms and (least, most) == (1, None):
        return  # nothing is added to the base, which is how some write out a model with its adapter
    if len(terms) < least or (most is not None and len(terms) > most):
        wanted = f"{least}" if least == most else f"at least {least}"
        besides = " besides base_model" if method.base in ("required", "optional") and group.base else ""
        listed = ", ".join(source.model for source in terms) or "none"
        yield f"{group.name}: {name} takes {wanted} model{'s' * (wanted != '1')}{besides}, got {len(terms)}: {listed}"
        return
    outer, own = (group.parameters, shared), [source.parameters for source in terms]
    for parameter in method.parameters:
        if parameter.default is None and not parameter_given(parameter, outer, own):
            yield f"{group.name}: {name} needs the parameter {parameter.name}{_whose(group, parameter, terms)}"


def _whose(group: Group, parameter: Parameter, terms: Sequence[Source]) -> str:
    """Which models a required parameter is missing for, or where it should have been given."""
    if parameter.per == "merge":
        misplaced = any(parameter.name in source.parameters for source in group.sources)
        return "; it has one value for all models: give it in the file's parameters" if misplaced else ""
    lacking = [source.model for source in terms if parameter.name not in source.parameters]
    merged = ", the base_model, which this method merges like the others," if group.base in lacking else ""
    verb = "has" if len(lacking) == 1 else "have"
    return f" of every model; {', '.join(lacking)}{merged} {verb} none"


def unread_parameters(name: str, groups: Sequence[Group], shared: Parameters) -> Iterator[str]:
    """What is said of parameters where the method `name` reads none of that name; mergekit ignores them, too."""
    method = METHODS[name]
    per = {p.name: p.per for p in method.parameters}
    foreign = [key for scope in (shared, *(group.parameters for group in groups)) for key in scope if key not in per]
    of_all, of_base = list[str](), list[str]()
    for group in groups:
        based = group.base if method.base in ("required", "optional") else None
        for source in group.sources:
            foreign += [key for key in source.parameters if key not in per]
            of_all += [key for key in source.parameters if per.get(key) == "merge"]
            of_base += [key for key in source.parameters if per.get(key) == "term" and source.model == based]
    for keys, why in (
        (foreign, f"not read by {name}"),
        (of_all, f"not read where a model has it: {name} has one value for all, from the file's or slice's own"),
        (of_base, f"not read where the base_model has it: {name} takes what the others are apart from it"),
    ):
        listed = ", ".join(key for key in dict.fromkeys(keys) if key not in IGNORED)
        if listed:
            yield f"parameters: {listed}: {why}"


Merged = tuple[Group, str, Sequence[str]]  # a merged tensor: its group, the result's name, and what the terms call it


def idle_entries(name: str, groups: Sequence[Group], shared: Parameters, merged: Sequence[Merged]) -> Iterator[str]:
    """What is said of values with a filter, or behind one without, that no tensor takes; `merged` are the tensors that
    the method `name` merges."""
    method = METHODS[name]
    listed = [*_limited(method, groups, shared)]
    if not listed or not merged:
        return
    taken = set[int]()
    for group, output, names in merged:
        own = [source.parameters for source in group.terms(method)]
        taken |= {id(entry) for entry in entries_taken(method, (group.parameters, shared), own, names, output)}
    # A list that several slices repeat need not have an effect in each.
    used = {(parameter.name, entries[:i]) for _, parameter, entries, i in listed if id(entries[i - 1]) in taken}
    words = sorted({word for _, output, _ in merged for word in output.split(".")})
    found = [
        f"parameters: {parameter.name}: {_why_idle(entries[:i], _names(group, parameter, merged), words)}"
        for group, parameter, entries, i in listed
        if (parameter.name, entries[:i]) not in used
    ]
    yield from dict.fromkeys(found)


def _limited(
    method: Method, groups: Sequence[Group], shared: Parameters
) -> Iterator[tuple[Group | None, Parameter, tuple[Varying, ...], int]]:
    """Each value that not every tensor takes: whose it is (None: the file's), its parameter, the list that it stands
    in, and how many are in that list up to it."""
    for parameter in method.parameters:
        scopes: list[tuple[Group | None, Parameters]] = [(None, shared)]
        for group in groups:
            sources = group.terms(method) if parameter.per != "merge" else []
            scopes += [(group, scope) for scope in (group.parameters, *(source.parameters for source in sources))]
        for group_or_all, scope in scopes:
            entries = scope.get(parameter.name, ())
            for i, entry in enumerate(entries):
                if i or entry.filter is not None:
                    yield group_or_all, parameter, entries, i + 1


def _names(group: Group | None, parameter: Parameter, merged: Sequence[Merged]) -> set[str]:
    """The names that filters of a parameter meet, in a group or in all."""
    inside = [(output, names) for own, output, names in merged if group is None or own is group]
    if parameter.per == "merge":
        return {output for output, _ in inside}
    return {name for _, names in inside for name in names}


def _why_idle(entries: Sequence[Varying], known: Collection[str], words: Collection[str]) -> str:
    """What keeps the last of these values from every tensor; `known` are the names that filters meet, and `words` what
    may have been meant."""
    *before, entry = entries
    values = [*entry.values] if len(entry.values) > 1 else entry.values[0]
    what = f"the value {show(values)}" if entry.filter is None else f"the filter {show(entry.filter)}"
    if any(one.filter is None for one in before):
        return f"{what} is never reached, as a value without a filter stands before it"
    if entry.filter is None or any(entry.filter in tensor for tensor in known):
        return f"{what} has no effect: every tensor takes a value that goes before it"
    hint = did_you_mean(entry.filter, words)
    if any(sign in entry.filter for sign in "*?[|^$"):
        hint = "; it is looked for as it stands, and no pattern"
    return f"{what} is part of no merged tensor's name{hint}"
