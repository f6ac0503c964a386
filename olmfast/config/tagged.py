"""Files with two of Python's tags, which the original wrote data-flow files with, and how such a file is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from olmfast.config.loading import UniqueKeyLoader, parse_yaml, unique_pairs
from olmfast.errors import InputError
from olmfast.weights.files import read_text


class TaggedLoader(UniqueKeyLoader):
    """Safe YAML that also reads two of Python's tags, as the plain list and the plain mapping that they hold.

    The factors of many layers may be one list, which PyYAML writes once.
    """

    aliased = 10_000_000


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.MarkedYAMLError(problem="a tuple is a list", problem_mark=node.start_mark)
    return loader.construct_sequence(node, deep=True)


def _construct_ordered(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    """`[[[key, value], ...]]`: the arguments, of which there is one or none."""
    arguments = node.value if isinstance(node, yaml.SequenceNode) else None
    if arguments == []:
        return {}
    if arguments is not None and len(arguments) == 1:
        if isinstance(arguments[0], yaml.MappingNode):
            return dict(loader.construct_object(arguments[0], deep=True))
        if isinstance(arguments[0], yaml.SequenceNode) and all(
            isinstance(pair, yaml.SequenceNode) and len(pair.value) == 2 for pair in arguments[0].value
        ):
            return unique_pairs(loader, [tuple(pair.value) for pair in arguments[0].value])
    raise yaml.MarkedYAMLError(
        problem="expected an OrderedDict as [[[key, value], ...]], its keys and values in one list",
        problem_mark=node.start_mark,
    )


TaggedLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)
TaggedLoader.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _construct_ordered)


def is_dataflow_file(data: object) -> bool:
    """Whether this is what a data-flow file holds, perhaps with misspelt keys."""
    return isinstance(data, Mapping) and ("model_paths" in data or "layer_mask" in data)


def holds_dataflow(path: Path) -> bool:
    """Whether a file is a data-flow file; False for one that cannot be read."""
    try:
        text = read_text(path)
        return ("model_paths" in text or "layer_mask" in text) and is_dataflow_file(
            parse_yaml(text, path, TaggedLoader)
        )
    except InputError:
        return False


def refuse_dataflow(source: str | Path | Mapping[str, Any]) -> None:
    """Raise InputError, saying which command takes it, for a data-flow file or what one holds."""
    is_held = isinstance(source, Mapping)
    if is_dataflow_file(source) if is_held else holds_dataflow(Path(source)):  # type: ignore[arg-type]
        where, name = ("config", "FILE") if is_held else (source, source)
        raise InputError(f"{where}: is a data-flow file, which says a path; use: olmfast dataflow {name} OUT")
