"""What is merged with what: the models of a merge file or of one of its slices, and what a method requires of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from olmfast.config.parameters import IGNORED, Parameters, parameter_given
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
