"""YAML files, sizes, paths and overrides: how every configuration is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from olmfast.errors import InputError, did_you_mean

Location = tuple[str | int, ...]  # the keys and places in lists that lead to a value


def parse_size(value: object) -> int:
    """Bytes from `5GB`, `500MB`, `2GiB` or a plain number."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
    if not parts or not 1 <= float(parts[1]) < 1e9:
        raise ValueError(f"expected a size in bytes such as '5GB', got {value!r}")
    base = 1024 if parts[3] else 1000
    return int(float(parts[1]) * base ** " KMGT".index(parts[2].upper() or " "))


def read_size(value: int | str, where: str) -> int:
    """`parse_size` of an option. Raises InputError that names it."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which plain YAML silently overwrites."""


def _construct_unique(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem=f"{key!r} cannot be a key", problem_mark=key_node.start_mark)
        if key in result:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique)


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping, safely loaded. Raises InputError naming the file, line and column."""
    data = read_any_yaml(path)
    if not isinstance(data, dict):
        kind = "nothing" if data is None else type(data).__name__
        raise InputError(f"{path}: expected a mapping of keys to values, got {kind}")
    return data


def read_any_yaml(path: Path) -> object:
    """What a YAML or JSON file holds, safely loaded. Raises InputError naming the file, line and column."""
    return parse_yaml(read_text(path), path)


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises InputError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read: {reason}") from error


def parse_yaml(text: str, path: Path) -> object:
    """What a YAML text holds, safely loaded. Raises InputError naming the file, line and column."""
    try:
        loaded: object = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        if problem and "could not determine a constructor" in problem:
            problem = f"{problem}; tags are not read, as they can run code: write the value without its tag"
        raise InputError(f"{path}{where}: not valid YAML: {problem or ' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:  # a date of month 13, a number of 5000 digits, 1000 brackets
        raise InputError(f"{path}: not valid YAML: {error}") from error
    return loaded


def absolute(folder: Path, path: str | Path, where: str) -> Path:
    try:
        if "\0" in str(path):
            raise ValueError("it holds a null character")
        # Not resolved: a link in the path stays the name by which the user knows the place.
        return Path(os.path.normpath(folder / Path(path).expanduser()))
    except (RuntimeError, ValueError) as error:  # RuntimeError: ~nobody
        raise InputError(f"{where}: {str(path)!r} is not a usable path: {error}") from error


def set_key(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b=value`. File names hold dots, so the longest existing key wins at each level."""
    nested = [key for key, value in data.items() if isinstance(key, str) and isinstance(value, dict)]
    for key in sorted(nested, key=len, reverse=True):
        if dotted.startswith(f"{key}."):
            set_key(data[key], dotted[len(key) + 1 :], value)
            return
    data[dotted] = value


def show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to spell out an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def explain(where: str, faults: Iterable[Mapping[str, Any]], known: Callable[[Location], Iterable[str]]) -> InputError:
    """What pydantic found, a line for each fault: where, which key, what was expected and what was given.

    `known` gives the keys that exist at the location of an unknown one.
    """
    return InputError("\n".join(line for fault in faults for line in _explain_one(where, fault, known)))


def _explain_one(where: str, fault: Mapping[str, Any], known: Callable[[Location], Iterable[str]]) -> list[str]:
    location: Location = tuple(part for part in fault["loc"] if not str(part).startswith("function-"))
    kind, given, context = fault["type"], fault["input"], fault.get("ctx", {})
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    if kind == "extra_forbidden":
        message = "unknown key" + did_you_mean(str(location[-1]), known(location))
    elif kind == "missing":
        message = "entry is missing" if isinstance(location[-1], int) else "required key is missing"
    elif kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        message = f"expected {bound} {'or more ' * (kind == 'too_short')}entries, got {show(given)}"
    elif kind == "literal_error":
        allowed = context["expected"]
        message = f"expected {allowed}, got {show(given)}"
        message += did_you_mean(given, re.findall(r"'([^']+)'", allowed)) if isinstance(given, str) else ""
    elif kind == "path_type":
        message = f"expected a path, got {show(given)}"
    elif kind != "value_error":
        message = re.sub(r" or (instance of|object to extract fields from).*", " of keys", message)
        message += f", got {show(given)}"
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    return [f"{where}: {name}: {line}" if name else f"{where}: {line}" for line in message.split("\n")]
