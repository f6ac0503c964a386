"""Slices: which tensors are in the stack of blocks that is cut, which come before it and after it, and what the
config.json of the new stack is.

The stack, and the kind of each of its layers, are those of the module that Transformers builds of the config. Of a
model type that it does not know, names and numbers tell, and what they cannot tell is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from olmfast.config.groups import Group
from olmfast.errors import InputError
from olmfast.static.spelling import shapes_of
from olmfast.weights.architecture import FAMILIES, numbered, stated_blocks
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.pool import Pool
from olmfast.weights.skeletons import Skeletons


@dataclass(frozen=True)
class Stack:
    """One model's stack. `blocks` maps its tensors to the name before and after the block's number, and that number.

    `regions` says of the others whether they act `before` or `after` it, `aside` of it (in another tower), or belong to
    what is `around` it.
    """

    n_blocks: int
    blocks: Mapping[str, tuple[str, str, int]]
    regions: Mapping[str, str]

    def parts(self, index: int) -> list[tuple[str, str]]:
        """The names of a block's tensors, before and after its number."""
        return [(before, after) for before, after, number in self.blocks.values() if number == index]


def stack_of(model: Checkpoint, skeletons: Skeletons) -> Stack:
    """The stack that slices of a model cut. Raises InputError if there is none, or more than one."""
    skeleton = skeletons.examine(model.config, shapes_of(model), "stack")
    if skeleton.unknown:
        return _by_names(model, skeleton.unknown)
    if skeleton.stack_fault:
        raise InputError(
            f"slices: {model.name} ({model.config.get('model_type')}) {skeleton.stack_fault}, so which layers to stack "
            "cannot be told; use models, which merges all layers in their places"
        )
    regions = {name: skeleton.regions.get(name, "aside") for name in model.tensors if name not in skeleton.blocks}
    return Stack(skeleton.n_blocks, {name: tuple(place) for name, place in skeleton.blocks.items()}, regions)  # type: ignore[misc]


def learn_architecture(model: Checkpoint, skeletons: Skeletons) -> None:
    """Let Transformers say what a model's blocks, embedding and head are, where its type is not in the table."""
    if model.architecture.model_type in FAMILIES:
        return
    skeleton = skeletons.examine(model.config, shapes_of(model), "stack", "vocabulary")
    family = model.architecture.family
    prefixes = {before for before, _, _ in skeleton.blocks.values()}
    if len(prefixes) == 1:
        family = replace(family, blocks=prefixes.pop().removesuffix("."))
    matrices = [name for name in skeleton.rows if len(model.tensors[name].shape) == 2]
    embedding = [name for name in matrices if skeleton.modules[name] == skeleton.embedding_module]
    if embedding:
        heads = [name for name in matrices if name != embedding[0]]
        family = replace(family, embedding=embedding[0], head=heads[0] if heads else family.head)
    n_blocks = skeleton.n_blocks or model.architecture.n_blocks
    model.architecture = replace(model.architecture, family=family, n_blocks=n_blocks)


def _by_names(model: Checkpoint, why: str) -> Stack:
    """The one numbered list that has as many entries as the config has layers."""
    counts: dict[str, int] = {}
    for prefix, index, _ in filter(None, map(numbered, model.tensors)):
        counts[prefix] = max(counts.get(prefix, 0), index + 1)
    stated = stated_blocks(model.config)
    lists = [prefix for prefix, n in counts.items() if n == stated]
    if len(lists) != 1:
        listed = ", ".join(f"{prefix} {n}" for prefix, n in counts.items()) or "none"
        raise InputError(
            f"slices: {model.name}: {why}, and of its lists of tensors ({listed}) not one alone has as many entries as "
            f"config.json has layers ({stated}); use models"
        )
    (stack,) = lists
    blocks, regions = {}, {}
    for name in model.tensors:
        place = numbered(name)
        if place and place[0] == stack:
            blocks[name] = (f"{stack}.", f".{place[2]}", place[1])
        else:
            regions[name] = _region_by_name(model, name)
    return Stack(counts[stack], blocks, regions)


def _region_by_name(model: Checkpoint, name: str) -> str:
    architecture = model.architecture
    module = name.rpartition(".")[0]
    if name == architecture.family.embedding:
        return "before"
    if module == architecture.family.head.rpartition(".")[0] or re.fullmatch(
        r"(\w+\.)?(norm|ln_f|norm_f|final_\w*norm)", module
    ):
        return "after"
    return "around"


def stacked_config(base: Checkpoint, groups: Sequence[Group], pool: Pool, skeletons: Skeletons) -> dict[str, Any]:
    """The base's config.json for the layers of the slices. Raises InputError, naming the key that cannot follow."""
    layers = [layer for group in groups for layer in _layers_of(group)]
    used = {model for merged in layers for model, _ in merged}
    answer = skeletons.stack(base.config, {model: pool[model].config for model in sorted(used)}, layers)
    if "fault" in answer:
        raise InputError(f"slices: {answer['fault']}")
    if "config" in answer:
        return dict(answer["config"])
    return _config_by_keys(base, len(layers), str(answer["unknown"]))


def _layers_of(group: Group) -> list[list[tuple[str, int]]]:
    """For each layer of a slice, the models' layers that make it, the base's first."""
    sources = sorted(group.sources, key=lambda source: source.model != group.base)
    ranges = [(source.model, *(source.layer_range or (0, 0))) for source in sources]
    n_layers = ranges[0][2] - ranges[0][1]
    return [[(model, begin + offset) for model, begin, _ in ranges] for offset in range(n_layers)]


def _config_by_keys(base: Checkpoint, n_layers: int, why: str) -> dict[str, Any]:
    """The config of a type that Transformers does not know: the depth; any other key of layers is refused."""
    from olmfast.weights.layers import DEPTHS, PER_LAYER, POSITIONS, RULES

    parts = [base.config, base.config.get("text_config")]
    changed = []
    for part in [dict(part) for part in parts if isinstance(part, dict)]:
        for key, value in part.items():
            spoken = PER_LAYER.search(key) or POSITIONS.search(key)
            listed = isinstance(value, list) and bool(spoken or len(value) == base.architecture.n_blocks)
            ruled = isinstance(value, (int, str)) and not isinstance(value, bool) and bool(RULES.search(key))
            if (listed or ruled) and key not in DEPTHS and key != "architectures":
                raise InputError(
                    f"slices: {base.name}: {why}, and {key} in config.json may speak of layers; use models"
                )
        changed.append({key: n_layers if key in DEPTHS else value for key, value in part.items()})
    return {**changed[0], **({"text_config": changed[1]} if len(changed) > 1 else {})}
