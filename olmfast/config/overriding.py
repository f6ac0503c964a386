"""Dotted keys of a command line, `a.b=value`, set in what a YAML file holds; sections that it lacks are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from olmfast.config.searches import Windows


def override(data: dict[str, Any], dotted: str, value: Any, model: type[BaseModel]) -> None:
    """Set a key of data that `model` describes.

    Names of files hold dots, so that the longest name wins that is there; else all up to a key that the entry may have.
    What is no mapping, such as `racing: true`, gives way to one; a number of blocks as `markov` stays its window.
    """
    key, _, rest = dotted.partition(".")
    field = model.model_fields.get(key)
    kinds = dict(_kinds(None if field is None else field.annotation))
    if field is None and isinstance(data.get(key), dict):
        kinds = {"plain": None}  # it will be told that the key is unknown
    if not rest or not kinds:
        data[dotted] = value
        return
    if not isinstance(data.get(key), dict):
        shorthand = kinds.get("section") is Windows and data.get(key) is not None
        data[key] = {"window": data[key]} if shorthand else {}
    if (section := kinds.get("section")) is not None:
        override(data[key], rest, value, section)
    elif (entry := kinds.get("entries")) is not None and (name := _name(data[key], rest, entry)):
        if not isinstance(data[key].get(name), dict):
            data[key][name] = {}
        override(data[key][name], rest[len(name) + 1 :], value, entry)
    else:
        data[key][rest] = value


def _name(entries: Mapping[str, Any], dotted: str, entry: type[BaseModel]) -> str:
    """The name that a dotted key begins with; empty if the key is a name alone."""
    parts = dotted.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    fitting = [name for name in names if dotted[len(name) + 1 :].partition(".")[0] in entry.model_fields]
    return next((name for name in [*filter(entries.__contains__, names), *fitting] if dotted not in entries), "")


def _kinds(annotation: Any) -> Iterator[tuple[str, Any]]:
    """What a mapping may be here: a section, entries by name (each a section), or plain values by key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "section", annotation
    elif get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        yield ("entries", value) if isinstance(value, type) and issubclass(value, BaseModel) else ("plain", None)
    else:
        for part in get_args(annotation):
            if part is not annotation and not isinstance(part, str):
                yield from _kinds(part)
