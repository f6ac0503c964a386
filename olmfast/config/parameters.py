"""The parameters of a merge file: numbers, gradients over depth and filters, and which of them a tensor gets."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator

from olmfast.errors import InputError, cut, did_you_mean, show, shown, told
from olmfast.weights.chunks import Setting
from olmfast.weights.methods import METHODS, Method, Parameter

Scalar = bool | int | float


def _number(value: object) -> object:
    """YAML reads `1e-5` as text; `"true"` is one."""
    if isinstance(value, str):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            return float(value)
        except ValueError:
            pass
    return value


@dataclass(frozen=True)
class Varying:
    """A parameter's value: one, or a gradient over depth, and the text that a tensor's name must contain."""

    values: tuple[Scalar, ...]
    filter: str | None = None

    def at(self, depth: float) -> Scalar:
        """The value at a depth of 0 (first layer) to 1 (last): numbers are interpolated, true and false are not."""
        position = depth * (len(self.values) - 1)
        below = int(position)
        if any(isinstance(value, bool) for value in self.values):
            return self.values[below]
        above = min(below + 1, len(self.values) - 1)
        share = position - below
        return (1 - share) * self.values[below] + share * self.values[above] if share else self.values[below]


def _parse_parameter(value: object) -> tuple[Varying, ...]:
    entries = [value] if isinstance(value, dict) else value
    if isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries):
        return tuple(_parse_filtered(entry) for entry in entries)
    return (_parse_values(value),)


def _parse_filtered(entry: dict[str, object]) -> Varying:
    for key in entry:
        if key == "pattern":
            raise ValueError("pattern: is the older name of filter; write filter")
        if key not in ("filter", "value"):
            raise ValueError(f"unknown key {show(key)}{did_you_mean(str(key), ['filter', 'value'])}")
    if "value" not in entry:
        raise ValueError("the key 'value' is missing")
    wanted = entry.get("filter")
    if wanted is not None and not isinstance(wanted, str):
        raise ValueError(f"filter: expected a part of tensors' names, got {show(wanted)}")
    return _parse_values(entry["value"], None if wanted == "*" else wanted)


def _parse_values(value: object, wanted: str | None = None) -> Varying:
    listed = [_number(x) for x in (value if isinstance(value, list) else [value])]
    for x in listed:
        if not isinstance(x, (bool, int, float)) or not abs(x) <= sys.float_info.max:
            kinds = "a number, true or false, a list of them or of {filter, value}"
            raise ValueError(f"expected {kinds}, got {shown(x)}")
    if not listed:
        raise ValueError("expected at least one number, got []")
    return Varying(tuple(listed), wanted)  # type: ignore[arg-type]


def _readable(value: object) -> object:
    """`parameters:` with nothing below it is empty; a key that is no parameter is told as such, whatever its value."""
    if isinstance(value, dict):
        _check_filter(value)
        return {name: setting if name in NAMES else 0 for name, setting in value.items()}
    return {} if value is None else value


def _check_filter(parameters: dict[str, object]) -> None:
    """Raise ValueError for a filter beside the parameter that it is meant for."""
    if "filter" in parameters:
        name = next((name for name in parameters if name in _READ), "weight")
        limited = f"{{filter: {told(str(parameters['filter']))}, value: {parameters.get(name, 0.5)}}}"
        raise ValueError(f"filter: stands beside the value that it limits; write {name}: [{cut(limited)}]")


# Accepted and without effect: bit masks would save no memory here.
IGNORED = ("int8_mask",)
EARLIER = ("embed_slerp",)  # of mergekit's first versions; today's merges embeddings as it merges everything
_READ = dict.fromkeys(parameter.name for method in METHODS.values() for parameter in method.parameters)
NAMES = (*_READ, *IGNORED, *EARLIER)
Parameters = Annotated[
    dict[str, Annotated[tuple[Varying, ...], BeforeValidator(_parse_parameter)]], BeforeValidator(_readable)
]


def parameter_given(parameter: Parameter, outer: Sequence[Parameters], own: Sequence[Parameters]) -> bool:
    """Whether a required parameter has a value in some tensor at least, for all it belongs to: in the parameters of the
    slice or the file (`outer`), or in those of each source (`own`)."""
    shared = any(parameter.name in scope for scope in outer)
    return shared or (parameter.per != "merge" and all(parameter.name in scope for scope in own))


def settings_of(
    method: Method,
    outer: Sequence[Parameters],
    own: Sequence[Parameters],
    names: Sequence[str],
    output: str,
    depth: float,
) -> dict[str, Setting]:
    """The settings of one tensor's merge: `names` are what the terms call it, `output` what the result does.

    A value is looked up in the parameters of the source (`own`, one per term), and then in those of the slice and the
    file (`outer`); the first whose filter matches is taken. `depth` is 0 at the first layer, 1 at the last. Raises
    InputError for a required one that has no value.
    """
    settings: dict[str, Setting] = {}
    for parameter in method.parameters:
        value: Setting | None
        if parameter.per == "merge":
            value = _resolve(parameter, outer, output, depth)
        else:
            each = [_resolve(parameter, [scope, *outer], name, depth) for scope, name in zip(own, names, strict=True)]
            value = None if all(x is None for x in each) else tuple(_filled(x, parameter, output) for x in each)
        if value is None and parameter.default is None:
            raise _missing(parameter, output)
        if value is not None:
            settings[parameter.name] = _typed(value, parameter, output)
    return settings


def entries_taken(
    method: Method, outer: Sequence[Parameters], own: Sequence[Parameters], names: Sequence[str], output: str
) -> Iterator[Varying]:
    """The entries that `settings_of` takes the settings of one tensor from."""
    for parameter in method.parameters:
        each = [(outer, output)]
        if parameter.per != "merge":
            each = [([scope, *outer], name) for scope, name in zip(own, names, strict=True)]
        yield from filter(None, (_taken(parameter, scopes, name) for scopes, name in each))


def _filled(value: Scalar | None, parameter: Parameter, output: str) -> float:
    if value is None and parameter.default is None:
        raise _missing(parameter, output)
    return float(parameter.default if value is None else value)  # type: ignore[arg-type]


def _missing(parameter: Parameter, output: str) -> InputError:
    return InputError(f"{output}: no value for the required parameter {parameter.name}; no filter matches this tensor")


def _typed(value: Setting, parameter: Parameter, output: str) -> Setting:
    """The value as the parameter's kind: true or false, a whole number, a number."""
    if isinstance(value, (tuple, str)):
        return value
    if isinstance(parameter.default, bool):
        if value not in (0, 1):
            raise InputError(f"{output}: {parameter.name}: expected true or false, got {show(value)}")
        return bool(value)
    if isinstance(parameter.default, int):
        if value != int(value):
            raise InputError(f"{output}: {parameter.name}: expected a whole number, got {show(value)}")
        return int(value)
    return float(value)


def _resolve(parameter: Parameter, scopes: Sequence[Parameters], tensor: str, depth: float) -> Scalar | None:
    entry = _taken(parameter, scopes, tensor)
    return None if entry is None else entry.at(depth)


def _taken(parameter: Parameter, scopes: Sequence[Parameters], tensor: str) -> Varying | None:
    for scope in scopes:
        for entry in scope.get(parameter.name, ()):
            if entry.filter is None or entry.filter in tensor:
                return entry
    return None
