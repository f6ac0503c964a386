"""What a module would be, found out on the meta device: whether a config.json fits its weights, and everything that
does not, before any memory is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmfast.errors import InputError, told
from olmfast.evaluation.misfits import Shapes, Trials, differing, faults_of_shapes
from olmfast.evaluation.residency import buffer_bytes
from olmfast.weights.architecture import N_BLOCKS, Architecture, Slot
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe

TRIED_TOKENS = 3
# What says that the meta device, not the config, is why a forward pass did not work.
OF_META = ("meta tensor", "meta device", "'Meta'", "Meta backend")


@dataclass(frozen=True)
class Blueprint:
    """What a module would be: the recipe's tensors in the order in which it declares its parameters, and the bytes that
    it takes, those that lie outside of its blocks, and those of the largest block."""

    tensors: tuple[str, ...]
    n_bytes: int
    outside_bytes: int
    block_bytes: int


def draw_up(recipe: Recipe, pool: Pool, dtype: torch.dtype) -> Blueprint:
    """Build the recipe's module without memory, and let it compute. Raises what `check_fit` raises."""
    base = pool[recipe.base]
    architecture = pool.architecture.edited(recipe.config_edits)
    shapes = {name: info.shape if (info := base.tensors.get(name)) else None for name in recipe.tensors}
    module = check_fit(
        recipe.config(base.config), architecture, shapes, base.folder / "config.json", tied=is_tied(recipe, pool)
    )
    parameters = dict(module.named_parameters())
    order = {name: i for i, name in enumerate(parameters)}
    names = sorted(recipe.tensors, key=lambda name: order.get(architecture.slot(name).parameter, len(order)))
    sizes = {name: parameter.numel() * dtype.itemsize for name, parameter in parameters.items()}
    blocks = [
        [size for name, size in sizes.items() if name.startswith(f"{architecture.family.blocks}.{index}.")]
        for index in range(architecture.n_blocks)
    ]
    n_bytes = sum(sizes.values()) + sum(buffer.nbytes for buffer in module.buffers())
    outside = n_bytes - sum(map(sum, blocks))
    return Blueprint(tuple(names), n_bytes, outside, max(map(buffer_bytes, blocks), default=0))


def is_tied(recipe: Recipe, pool: Pool) -> bool:
    """Whether the head of the recipe's model is its embedding: none of its tensors is the head, and that is meant."""
    architecture = pool.architecture.edited(recipe.config_edits)
    return architecture.family.head not in recipe.tensors and (pool.tied or architecture.tied_in_config)


def check_fit(
    config: Mapping[str, Any],
    architecture: Architecture,
    shapes: Shapes,
    where: Path,
    *,
    tied: bool,
) -> Any:
    """The module of a config.json on the meta device; `shapes` are the tensors' by canonical name, None if not known.

    Raises InputError naming `where`, with everything in which config and weights do not fit: what Transformers cannot
    build, another number of blocks, shapes that differ, parameters that nothing fills, a forward pass that fails.
    """
    faults, held = [], {index for name in shapes if (index := architecture.block_of(name)) is not None}
    if held != set(range(architecture.n_blocks)):
        named = f"named {architecture.family.blocks}.N"
        faults.append(f"{where}: says {architecture.n_blocks} blocks, the weights hold {len(held)} ({named})")
        # Built with as many blocks as there are, so that a wrong number of them hides nothing else.
        config = {**config, **{key: len(held) for key in N_BLOCKS if key in config and held}}

    def build(data: Mapping[str, Any]) -> Any:
        with torch.device("meta"):
            return build_module(data, where, tied, torch.bfloat16)  # in which the meta device knows everything

    try:
        module = build(config)
    except InputError as error:
        raise InputError("\n".join([*faults, str(error)])) from error

    if found := differing(module, architecture, shapes):
        faults += faults_of_shapes(module, Trials(config, architecture, build, shapes, found), where)
    try:
        map_slots(module, architecture, shapes, where)
    except InputError as error:
        faults += [] if faults else [str(error)]  # else it says the same again
    faults += [] if faults else _fault_of_computing(module, where)
    if faults:
        raise InputError("\n".join(faults))
    return module


def _fault_of_computing(module: Any, where: Path) -> Iterator[str]:
    """What a forward pass over a few tokens fails with, unless that is for want of real tensors."""
    try:
        with torch.no_grad():
            module(input_ids=torch.zeros(1, TRIED_TOKENS, dtype=torch.long, device="meta"), use_cache=True)
    except NotImplementedError:
        return
    except Exception as error:
        if not any(words in str(error) for words in OF_META):
            yield f"{where}: a model with this config cannot compute: {told(error)}"


def build_module(data: Mapping[str, Any], where: Path, tied: bool, dtype: torch.dtype) -> Any:
    """An empty Transformers module as a config.json says, its head tied or not.

    Raises InputError naming `where` if Transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[data["model_type"]].from_dict(dict(data))
        config.tie_word_embeddings = tied
        if dtype == torch.float64:
            config._experts_implementation = "eager"  # torch's grouped product knows no float64
        with no_init_weights():
            module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        module.tie_weights()  # part of the initialisation that was just left out
    except MemoryError:
        raise
    except Exception as error:  # a config can hold anything, and each class checks it in its own way
        raise InputError(f"{where}: Transformers cannot build this model: {told(error)}") from error
    return module.eval().requires_grad_(False)


def map_slots(module: Any, architecture: Architecture, names: Iterable[str], where: Path) -> dict[str, Slot]:
    """Canonical name -> the live parameter, or the part of one, that it fills.

    Raises InputError naming `where` if a parameter is filled by nothing, or a tensor fills none.
    """
    parameters = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    slots: dict[str, Slot] = {}
    filled: dict[str, int] = dict.fromkeys(parameters, 0)
    unknown = []
    for name in names:
        slot = architecture.slot(name)
        if slot.parameter in parameters:
            try:
                filled[slot.parameter] += slot.of(parameters[slot.parameter]).numel()
            except IndexError:  # an expert more than there are
                unknown.append(name)
                continue
            slots[name] = slot
        elif not architecture.is_ignored(name) and slot.parameter not in buffers:
            unknown.append(name)
    empty = [name for name, n in filled.items() if n != parameters[name].numel()]
    if empty or unknown:
        raise InputError(
            f"{where}: checkpoint and module do not match: nothing in the files fills "
            f"{empty[:3] or 'nothing'}, and no parameter takes {unknown[:3] or 'nothing'}"
        )
    return slots
