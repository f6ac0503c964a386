"""YAML files, sizes, paths and overrides: how every configuration is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from olmfast.errors import InputError, did_you_mean, show, shown, told
from olmfast.weights.files import check_characters, read_text, usable

Location = tuple[str | int, ...]  # the keys and places in lists that lead to a value

_MERGE, _VALUE, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("merge", "value", "str"))
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE | re.ASCII)
LARGEST = 2**63  # no size or count is as large
MOST_FAULTS = 30  # that are listed at once
ALIASED = 10_000  # values that aliases may stand for, beside ten times those that are written


def parse_size(value: object) -> int:
    """Bytes from `5GB`, `500MB`, `2GiB` or a plain number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST:
        return value
    parts = _SIZE.fullmatch(str(value)) if isinstance(value, (str, float)) else None
    if not parts or not 1 <= float(parts[1]) < 1e9:
        raise ValueError(f"expected a size in bytes such as '5GB', got {shown(value)}")
    base = 1024 if parts[3] else 1000
    return int(float(parts[1]) * base ** " KMGT".index(parts[2].upper() or " "))


def read_size(value: int | str, where: str) -> int:
    """`parse_size` of an option. Raises InputError that names it."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which plain YAML silently overwrites; a mapping's own keys go before
    those that it merges (`<<`)."""

    aliased = ALIASED


def _construct_unique(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    own, result = list[tuple[yaml.Node, yaml.Node]](), dict[Any, Any]()
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            result |= _merged(loader, value_node)
        else:
            key_node.tag = _TEXT if key_node.tag == _VALUE else key_node.tag  # the key `=`, as PyYAML reads it
            own.append((key_node, value_node))
    return result | unique_pairs(loader, own)


def _merged(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    """What the value of a merge key, `<<: *x` or `<<: [*x, *y]`, gives; of several mappings, the earlier go before."""
    several = isinstance(node, yaml.SequenceNode)
    result: dict[Any, Any] = {}
    for part in reversed(node.value) if several else [node]:
        value = loader.construct_object(part, deep=True)
        if not isinstance(value, dict):
            problem = f"expected a mapping to merge, or a list of them, got {shown(value)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=part.start_mark)
        result |= value
    return result


def unique_pairs(loader: yaml.SafeLoader, pairs: Iterable[tuple[yaml.Node, yaml.Node]]) -> dict[Any, Any]:
    """The mapping of these keys and values. Raises MarkedYAMLError for a key that is given twice, or cannot be one."""
    result: dict[Any, Any] = {}
    for key_node, value_node in pairs:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem=f"{show(key)} cannot be a key", problem_mark=key_node.start_mark)
        if key in result:
            raise yaml.MarkedYAMLError(problem=f"key {show(key)} is given twice", problem_mark=key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique)


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping, safely loaded. Raises InputError naming the file, line and column."""
    return _mapping(read_any_yaml(path), str(path))


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """The same of a text. Raises InputError naming `where`, line and column."""
    return _mapping(parse_yaml(text, where), where)


def _mapping(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        kind = "nothing" if data is None else type(data).__name__
        raise InputError(f"{where}: expected a mapping of keys to values, got {kind}")
    return data


def read_any_yaml(path: Path) -> object:
    """What a YAML or JSON file holds, safely loaded. Raises InputError naming the file, line and column."""
    return parse_yaml(read_text(path), path)


def parse_yaml(text: str, where: str | Path, reader: type[UniqueKeyLoader] = UniqueKeyLoader) -> object:
    """The values that a YAML or JSON text holds, safely loaded. Raises InputError naming `where`, line and column.

    `reader` may read more tags than YAML's own, as plain values.
    """
    try:
        loader = reader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_aliases(node, reader.aliased)
            loaded: object = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        if problem and "could not determine a constructor" in problem:
            problem = f"{problem}; tags are not read, as they can run code: write the value without its tag"
        raise InputError(f"{where}{place}: not valid YAML: {told(problem or error)}") from error
    except Exception as error:  # a tag that its value does not fit raises whatever reading the value raises
        raise InputError(f"{where}: not valid YAML: {told(error)}") from error
    check_characters(text, loaded, str(where))
    return loaded


def _check_aliases(root: yaml.Node, most: int) -> None:
    """Raise MarkedYAMLError for aliases that hold themselves, or stand for far more values than are written."""
    sizes: dict[yaml.Node, int | None] = {}  # None: being counted
    written = 0

    def size(node: yaml.Node) -> int:
        nonlocal written
        if node in sizes:
            known = sizes[node]
            if known is None:
                raise yaml.MarkedYAMLError(problem="found unconstructable recursive node", problem_mark=node.start_mark)
            return known
        written += 1
        sizes[node] = None
        parts = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
        total = 1 + sum(size(one) for part in parts for one in (part if isinstance(part, tuple) else (part,)))
        sizes[node] = total
        return total

    if size(root) > most + 10 * written:
        raise yaml.MarkedYAMLError(problem="its aliases stand for too many values", problem_mark=root.start_mark)


def absolute(folder: Path, path: str | Path, where: str) -> Path:
    """A path relative to a folder, not resolved: a link in it stays the name by which the user knows the place.

    Raises InputError for what cannot be a path.
    """
    try:
        return Path(os.path.normpath(folder / usable(path, where).expanduser()))
    except RuntimeError as error:  # ~nobody
        raise InputError(f"{where}: {show(str(path))} is not a usable path: {error}") from error


def explain(
    where: str,
    faults: Iterable[Mapping[str, Any]],
    known: Callable[[Location], Iterable[str]],
    places: Mapping[str, str] = MappingProxyType({}),
) -> InputError:
    """What pydantic found, a line for each fault: where, which key, what was expected and what was given.

    `known` gives the keys that exist at the location of an unknown one, `places` says where a key belongs that is one
    elsewhere.
    """
    lines = [line for fault in _of_one_kind(faults) for line in _explain_one(where, fault, known, places)]
    more = [f"{where}: {len(lines) - MOST_FAULTS} more faults"] if len(lines) > MOST_FAULTS else []
    return InputError("\n".join(lines[:MOST_FAULTS] + more))


# How pydantic names, in a location, the kinds of values that a key may have.
_KIND = re.compile(r"constrained-\w+|bool|int|float|str|(list|dict|tuple|literal|function-[\w-]+)\[.*\]")


def _of_one_kind(faults: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The faults of a value that may be of several kinds as one: of the kind that it is, or with all kinds as `or`."""
    found: list[Mapping[str, Any]] = []
    kinds: dict[Location, list[Mapping[str, Any]]] = {}
    for fault in faults:
        location: Location = fault["loc"]
        place = next((i for i, part in enumerate(location) if i and _KIND.fullmatch(str(part))), None)
        if place is None:
            found.append(fault)
            continue
        first = location[:place] not in kinds
        kinds.setdefault(location[:place], []).append({**fault, "loc": location[:place] + location[place + 1 :]})
        if first:
            found.append({"several": location[:place]})
    for i in reversed(range(len(found))):
        if "several" in found[i]:
            own = kinds[found[i]["several"]]
            inside = [fault for fault in own if len(fault["loc"]) > len(found[i]["several"])]
            found[i : i + 1] = inside or [{**own[0], "or": own[1:]}]
    return found


def unknown_key(key: str, known: Iterable[str], places: Mapping[str, str]) -> str:
    """What is wrong with a key that is none where it stands: where it belongs, or what may have been meant."""
    return f"unknown key here; {places[key]}" if key in places else "unknown key" + did_you_mean(key, known)


def _explain_one(
    where: str, fault: Mapping[str, Any], known: Callable[[Location], Iterable[str]], places: Mapping[str, str]
) -> list[str]:
    location: Location = tuple(part for part in fault["loc"] if not str(part).startswith("function-"))
    message = _message(location, fault, known, places)
    got = f", got {shown(fault['input'])}"
    for other in fault.get("or", ()):
        wanted = _message(location, other, known, places).removeprefix("expected ").removesuffix(got)
        message = f"{message.removesuffix(got)}, or {wanted}{got}"
    parts = (f"[{part}]" if isinstance(part, int) else f".{told(part)}" for part in location)
    name = "".join(parts).lstrip(".")
    return [f"{where}: {name}: {line}" if name else f"{where}: {line}" for line in message.split("\n")]


def _message(
    location: Location, fault: Mapping[str, Any], known: Callable[[Location], Iterable[str]], places: Mapping[str, str]
) -> str:
    kind, given, context = fault["type"], fault["input"], fault.get("ctx", {})
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    if kind == "extra_forbidden":
        return unknown_key(str(location[-1]), known(location), places)
    if kind == "missing":
        return "entry is missing" if isinstance(location[-1], int) else "required key is missing"
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return f"expected {bound} {'or more ' * (kind == 'too_short')}entries, got {shown(given)}"
    if kind == "literal_error":
        allowed = context["expected"]
        hint = did_you_mean(given, re.findall(r"'([^']+)'", allowed)) if isinstance(given, str) else ""
        return f"expected {allowed}, got {shown(given)}{hint}"
    if kind == "path_type":
        return f"expected a path, got {shown(given)}"
    if kind == "dict_type":
        return f"expected a mapping of keys to values, got {shown(given)}"
    if kind == "value_error":
        return str(message)
    message = re.sub(r", (unable to .*|got a number with a fractional part)", "", message)
    message = re.sub(r" or (instance of|object to extract fields from).*", " of keys", message)
    return f"{message}, got {shown(given)}"
