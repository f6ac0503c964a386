"""What the layers of a stack are, and the config.json under which layers one after another stay what they were.

Two blocks are of one kind if their modules differ in nothing but weights. So keys that say by a list, a number, a
period or a pattern which layer is of which kind need not be known: the module of the new config shows whether they
followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch

from olmfast.weights.examination import Unknown, build, read_config, stack_name, text_config, text_path, value_at

PER_LAYER = re.compile(r"layer|block|type|pattern|mlp|attn|attention|sparse|freq")
POSITIONS = re.compile(r"layer|block|idx|ids|index|indices")
# Keys that say by a number which layers are of which kind; named where these cannot follow.
RULES = re.compile(
    r"period|offset|interval|every|step|pattern|freq|first_k|dense|kv_shared|max_window"
    r"|(block|layer)s?_(types|ids|idx|configs)|_layers$|layers_"
)
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
THRESHOLDS = re.compile(r"first|dense|max_window")
OWN_NUMBER = re.compile(r"(layer|block)(_?(idx|id|index|number|num|i))?|i|idx|index")


def stacked(
    base: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], layers: Sequence[Sequence[tuple[str, int]]]
) -> dict[str, Any]:
    """The config.json of layers one after another, whose module has each of the kind it had.

    A layer is one of a model (name, index), or several that are merged. `fault` says what cannot follow, and names the
    keys.
    """
    built = {name: build(read_config(_as_in(base, config))) for name, config in models.items()}
    stacks = {}
    for name, module in built.items():
        stacks[name], fault = stack_name(module)
        if fault:
            return {"fault": f"{name}: {fault}"}
    texts = {name: text_config(module.config).to_dict() for name, module in built.items()}
    kinds = {name: _kinds(module, stacks[name]) for name, module in built.items()}
    unlike = _unlike(kinds, layers)
    if unlike:
        return {"fault": unlike}
    wanted = [kinds[merged[0][0]][merged[0][1]] for merged in layers]
    path = text_path(read_config(base))
    result = deepcopy(dict(base))
    part = _inside(result, path)
    if path and "model_type" not in part:
        part["model_type"] = value_at(read_config(base), path).model_type
    _set_depth(text_config(read_config(base)), part, len(layers))
    depths = {name: len(kinds[name]) for name in kinds}
    for key in {key: None for text in texts.values() for key in text}:
        followed = _follow(key, {name: text.get(key) for name, text in texts.items()}, depths, [m[0] for m in layers])
        if followed is not None:
            part[key] = followed
    refused = _judge(result, wanted)
    if refused is None:
        return {"config": result}
    for key, value in _thresholds(part, texts, wanted):
        tried = deepcopy(result)
        _inside(tried, path)[key] = value
        if _judge(tried, wanted) is None:
            return {"config": tried}
    rules = [key for key in {**part, **next(iter(texts.values()))} if _is_rule(key, part, texts)]
    kinds_from = ", ".join(rules) or "the model type alone"
    return {"fault": f"{refused}. Kinds of layers come from {kinds_from}, which cannot say this"}


def _unlike(
    kinds: Mapping[str, Sequence[Mapping[str, Any]]], layers: Sequence[Sequence[tuple[str, int]]]
) -> str | None:
    """Which layers are merged with each other although they are of different kinds."""
    for place, ((first, index), *others) in enumerate(layers):
        for other, its_index in others:
            what = _difference(kinds[other][its_index], kinds[first][index])
            if what:
                return f"layer {place} of the result: layer {its_index} of {other} {what} of layer {index} of {first}"
    return None


def _as_in(base: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The base's config with what a model's own says of its layers: their number and kinds."""
    inner = {
        key: value for key, value in config.items() if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    kept = {key: value for key, value in base.items() if not _is_of_layers(key, value)}
    own = {key: value for key, value in config.items() if _is_of_layers(key, value)}
    return {**kept, **own, **{key: _as_in(base[key], value) for key, value in inner.items()}}


def _is_of_layers(key: str, value: Any) -> bool:
    if isinstance(value, list):
        return bool(PER_LAYER.search(key) or POSITIONS.search(key))
    return key in DEPTHS or (isinstance(value, (int, str)) and bool(RULES.search(key)))


def _inside(data: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The part of a config.json under these keys, made where it is left to the defaults."""
    for key in path:
        data = data.setdefault(key, {})
    return data


def _is_rule(key: str, part: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a key has a value that could say which layers are of which kind."""
    values = [part.get(key), *(text.get(key) for text in texts.values())]
    said = any(isinstance(value, (int, list, str)) and not isinstance(value, bool) for value in values)
    return said and key not in DEPTHS and bool(RULES.search(key))


def _set_depth(text: Any, part: dict[str, Any], n_layers: int) -> None:
    """State the number of layers, in the spelling that is there."""
    own = type(text).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for key in [key for key in DEPTHS if key in part] or [own]:
        part[key] = n_layers


def _follow(
    key: str, values: Mapping[str, Any], depths: Mapping[str, int], layers: Sequence[tuple[str, int]]
) -> list[Any] | None:
    """A list that speaks of layers, as it is of the result's; None for any other value."""
    lists = {name: values[name] for name, _ in layers}
    if not all(isinstance(value, list) and value for value in lists.values()):
        return None
    if POSITIONS.search(key) and all(map(_are_positions, lists.values())):
        return [place for place, (name, index) in enumerate(layers) if index in lists[name]]
    if PER_LAYER.search(key) and all(len(value) == depths[name] for name, value in lists.items()):
        return [lists[name][index] for name, index in layers]
    if PER_LAYER.search(key) and all(isinstance(x, str) for value in lists.values() for x in value):
        return [lists[name][index % len(lists[name])] for name, index in layers]  # a pattern that repeats
    return None


def _are_positions(value: Sequence[Any]) -> bool:
    """Whether a list holds numbers of layers: whole and rising."""
    whole = all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)
    return whole and all(a < b for a, b in pairwise(value))


def _thresholds(
    part: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, int]]:
    """Values of keys such as first_k_dense_replace under which the layers could be of the wanted kinds."""
    changes = [i for i in range(1, len(wanted)) if wanted[i] != wanted[i - 1]]
    for key in {key: None for text in (part, *texts.values()) for key in text}:
        values = [text.get(key) for text in (part, *texts.values())]
        if THRESHOLDS.search(key) and any(isinstance(v, int) and not isinstance(v, bool) for v in values):
            for value in (0, *changes[:1], len(wanted)):
                yield key, value


def _judge(data: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]]) -> str | None:
    """What is different where the module of a config does not have layers of these kinds; None if it has."""
    try:
        module = build(read_config(data))
    except Unknown as error:
        return " ".join(str(error).split())
    stack, fault = stack_name(module)
    if fault:
        return f"the result {fault}"
    kinds = _kinds(module, stack)
    if len(kinds) != len(wanted):
        return f"the result would have {len(kinds)} layers instead of {len(wanted)}"
    for place, (got, want) in enumerate(zip(kinds, wanted, strict=True)):
        what = _difference(got, want)
        if what:
            return f"layer {place} of the result {what} of the weights it gets"
    return None


def _difference(got: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    """In words, the first thing in which a layer differs from another."""
    for key in {**want, **got}:
        ours, theirs = got.get(key), want.get(key)
        if ours != theirs and not (key.startswith("config.") and None in (ours, theirs)):
            return f"has {key} {ours!r} instead of the {theirs!r}"
    return ""


def _kinds(module: Any, stack: str) -> list[dict[str, Any]]:
    """What each block is but for its weights: classes, plain attributes and shapes of its parts, its entries in lists
    of the config."""
    blocks = module.get_submodule(stack)
    text = text_config(module.config).to_dict()
    found = []
    for index, block in enumerate(blocks):
        kind: dict[str, Any] = {}
        for name, part in block.named_modules():
            kind[f"{name or 'block'}.class"] = type(part).__name__
            for key, value in vars(part).items():
                plain = _plain(value)
                listed = plain is not None and isinstance(plain[0], list) and len(plain[0]) == len(blocks)
                if plain is not None and listed and re.search(r"layer|block", key):
                    plain = (plain[0][index],)  # of all layers, of which this is one
                numbers = OWN_NUMBER.fullmatch(key) and value == index
                if plain is not None and not key.startswith("_") and key != "training" and not numbers:
                    kind[f"{name}.{key}".lstrip(".")] = plain[0]
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            kind[f"shape of {name}"] = list(tensor.shape)
        for key, value in text.items():
            if not isinstance(value, list) or not value:
                continue
            if POSITIONS.search(key) and _are_positions(value):
                kind[f"config.{key}"] = index in value
            elif PER_LAYER.search(key) and len(value) == len(blocks):
                kind[f"config.{key}"] = value[index]
        found.append(kind)
    return found


def _plain(value: Any) -> tuple[Any] | None:
    """A value that JSON can hold, in a tuple of one, or None: functions are told by their names."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return (value,)
    if isinstance(value, (tuple, list)) and all(isinstance(x, (bool, int, float, str)) for x in value):
        return (list(value),)
    if callable(value) and not isinstance(value, torch.nn.Module) and hasattr(value, "__name__"):
        return (value.__name__,)
    return None
