"""What a module would be, found out on the meta device: whether a config.json fits its weights, and everything that
does not, before any memory is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from olmfast.errors import InputError, told
from olmfast.evaluation.residency import buffer_bytes
from olmfast.weights.architecture import N_BLOCKS, SIZES, Architecture, Slot
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe

Differences = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # of shapes: stored, and made by a config
Differing = Callable[..., Differences]  # what differs with other values of some keys
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
    shapes: Mapping[str, tuple[int, ...] | None],
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
    try:
        with torch.device("meta"):
            module = build_module(config, where, tied, torch.bfloat16)  # in which the meta device knows everything
    except InputError as error:
        raise InputError("\n".join([*faults, str(error)])) from error

    def differing(**keys: Any) -> Differences:
        with torch.device("meta"):
            other = build_module({**config, **keys}, where, tied, torch.bfloat16)
        return _differing(other, architecture.edited(keys), shapes)

    faults += _faults_of_shapes(config, module.config, differing, _differing(module, architecture, shapes), where)
    try:
        map_slots(module, architecture, shapes, where)
    except InputError as error:
        faults += [] if faults else [str(error)]  # else it says the same again
    faults += [] if faults else _fault_of_computing(module, where)
    if faults:
        raise InputError("\n".join(faults))
    return module


def _differing(
    module: Any, architecture: Architecture, shapes: Mapping[str, tuple[int, ...] | None]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tensor -> the shape that is stored and the one that the module makes, where these differ."""
    parameters, found = dict(module.named_parameters()), {}
    for name, stored in shapes.items():
        slot = architecture.slot(name)
        if stored is None or slot.parameter not in parameters:
            continue
        try:
            made = tuple(slot.of(parameters[slot.parameter]).shape)
        except IndexError:
            made = tuple(parameters[slot.parameter].shape)
        if made != stored:
            found[name] = (stored, made)
    return found


def _faults_of_shapes(
    config: Mapping[str, Any], built: Any, differing: Differing, found: Differences, where: Path
) -> Iterator[str]:
    """A line for every way in which shapes differ, with the first tensor of its kind and how many more there are.

    It names the keys of which another value fits; where there is none, those that hold the size that is made.
    """
    kinds: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, (stored, made) in found.items():
        pairs = zip(stored, made, strict=False) if len(made) == len(stored) else [(len(stored), len(made))]
        kinds.setdefault(tuple(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1])), []).append(name)
    for kind, names in kinds.items():
        tried = _fitting(built.to_dict(), differing, found, kind, names)
        fitting = dict(sorted(tried, key=lambda pair: config.get(pair[0]) is not None))  # what is missing first
        sizes = {made for _, made in kind}
        keys = fitting or {key: value for key, value in config.items() if type(value) is int and value in sizes}
        says = ", ".join(_stated(config, built, key, fitting.get(key)) for key in keys)
        first = [list(shape) for shape in found[names[0]]]
        held = f"they hold {names[0]} {first[0]}, which it makes {first[1]}"
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        advice = " or ".join(f"{key}: {value}" for key, value in fitting.items())
        yield (
            f"{where}: does not fit the weights: {says}{', but ' if says else ''}{held}{more}"
            f"{f'; {advice} fits' if advice else ''}"
        )


def _fitting(
    settings: Mapping[str, Any],
    differing: Differing,
    found: Differences,
    kind: tuple[tuple[int, int], ...],
    names: Sequence[str],
) -> Iterator[tuple[str, int]]:
    """The keys of which another value alone makes these tensors fit and no other misfit, with that value.

    Each is tried: a size grows with its key in proportion, or, where a width is shared out to heads, falls so.
    """
    if len(kind) != 1 or 0 in kind[0]:
        return
    for key, (have, want) in product(SIZES, (kind[0], kind[0][::-1])):
        value = settings.get(key)
        if key in N_BLOCKS or type(value) is not int or value * have % want or not value * have:
            continue
        try:
            left = differing(**{key: value * have // want})
        except InputError:
            continue
        if left.keys() <= found.keys() - set(names):
            yield key, value * have // want


def _stated(config: Mapping[str, Any], built: Any, key: str, fitting: int | None) -> str:
    """What a config.json says of a size, or what Transformers takes where it says nothing.

    A key that Transformers does not read and that holds what fits is told beside it.
    """
    value = config.get(key)
    if value is not None:
        return f"{key} is {value}"
    known = {*type(built)().to_dict(), *type(built).attribute_map}
    unread = [name for name, held in config.items() if name not in known and type(held) is int and held == fitting]
    instead = f" (of {unread[0]} it knows nothing)" if unread else ""
    return f"without {key} Transformers takes it as {getattr(built, key)}{instead}"


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
