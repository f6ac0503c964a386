"""YAML files, sizes, paths and overrides: what every configuration is read with."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from olmfast.errors import InputError


def parse_size(value: object) -> int:
    """Bytes from `5GB`, `500MB`, `2GiB` or a plain number."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
    if not parts or not 1 <= float(parts[1]) < 1e9:
        raise ValueError(f"expected a size in bytes such as '5GB', got {value!r}")
    base = 1024 if parts[3] else 1000
    return int(float(parts[1]) * base ** " KMGT".index(parts[2].upper() or " "))


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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read: {reason}") from None
    try:
        loaded: object = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: not valid YAML: {problem or ' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:  # a date of month 13, a number of 5000 digits, 1000 brackets
        raise InputError(f"{path}: not valid YAML: {error}") from None
    return loaded


def absolute(folder: Path, path: str | Path, where: str) -> Path:
    try:
        if "\0" in str(path):
            raise ValueError("it holds a null character")
        # Not resolved: a link in the path stays the name under which the user knows the place.
        return Path(os.path.normpath(folder / Path(path).expanduser()))
    except (RuntimeError, ValueError) as error:  # RuntimeError: ~nobody
        raise InputError(f"{where}: {str(path)!r} is not a usable path: {error}") from None


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
