"""Which keys of a config.json do not fit its weights: found by trying what a module would be with other values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import islice, product
from pathlib import Path
from typing import Any

from olmfast.errors import InputError
from olmfast.weights.architecture import N_BLOCKS, SIZES, Architecture

Differences = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # of shapes: stored, and made by a config
Shapes = Mapping[str, tuple[int, ...] | None]
N_RATIOS = 8  # of a stored size to the one that is made: so many are tried to find a key that is wrong


def differing(module: Any, architecture: Architecture, shapes: Shapes) -> Differences:
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


class Trials:
    """What differs with other values of some keys, found out on a few blocks and tensors that stand for all.

    Tensors of one kind have the same name but for numbers, the same shape, and the same that a config makes; that of
    the first block and of its last expert stands for them.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        architecture: Architecture,
        build: Callable[[Mapping[str, Any]], Any],
        shapes: Shapes,
        found: Differences,
    ):
        self.config, self.found = config, found
        self._architecture, self._build, self._shapes = architecture, build, shapes
        kinds: dict[Any, list[str]] = {}
        for name, stored in shapes.items():
            if stored is not None:
                kind = re.sub(r"\.\d+(?=\.)", ".N", name)
                kinds.setdefault((kind, stored, found.get(name)), []).append(name)
        self._kinds = {min(names, key=self._place): names for names in kinds.values()}
        self._left: dict[frozenset[tuple[str, int]], Differences | None] = {}
        self._base = self._cut(1 + max(self._place(name)[0] for name in self._kinds))
        if self.left({}) != {name: found[name] for name in self._kinds if name in found}:
            self._base = config  # which makes another module with fewer blocks
            self._left.clear()

    def module(self, keys: Mapping[str, int]) -> Any:
        """The module that these values make. Raises InputError if there is none."""
        return self._build({**self._base, **keys})

    def left(self, keys: Mapping[str, int]) -> Differences | None:
        """What differs with these values, of the tensors that stand for others; None if Transformers refuses them."""
        asked = frozenset(keys.items())
        if asked not in self._left:
            try:
                found = differing(
                    self.module(keys),
                    self._architecture.edited(keys),
                    {name: self._shapes[name] for name in self._kinds},
                )
            except InputError:
                found = None
            self._left[asked] = found
        return self._left[asked]

    def all_of(self, names: Iterable[str]) -> list[str]:
        """The tensors that these stand for, as they were given, first those that have as many dimensions as made."""
        chosen = {each for name in names for each in self._kinds[name]}
        return sorted(
            (name for name in self.found if name in chosen), key=lambda name: len(set(map(len, self.found[name])))
        )

    def _place(self, name: str) -> tuple[int, list[int]]:
        """Before which lie the tensors of the blocks before it, and those of the experts after it."""
        return self._architecture.block_of(name) or 0, [-int(n[:9]) for n in re.findall(r"\.(\d+)(?=\.)", name)]

    def _cut(self, n_blocks: int) -> Mapping[str, Any]:
        """The config with no more than so many blocks, and lists of as many entries as it had."""
        before = [self.config[key] for key in N_BLOCKS if type(self.config.get(key)) is int]
        cut = dict(self.config)
        for key, value in self.config.items():
            if key in N_BLOCKS and value in before:
                cut[key] = min(n_blocks, value)
            elif type(value) is list and len(value) in before:
                cut[key] = value[:n_blocks]
        return cut


def faults_of_shapes(module: Any, trials: Trials, where: Path) -> Iterator[str]:
    """A line for every key of which another value fits, or for each of several of which any would; where there is none,
    for every way in which shapes differ, with the keys that hold the size that is made.

    It has the first tensor that the key would mend, and how many more there are.
    """
    steps, left = _mended(trials)
    lines, settings = [], _sizes(module, trials.config)
    for options, mended in steps:
        keys = sorted(options, key=lambda key: trials.config.get(key) is not None)  # what is missing first
        says = ", ".join(_stated(trials.config, module, key, settings.get(key), options[key]) for key in keys)
        advice = " or ".join(f"{key}: {options[key]}" for key in keys)
        lines.append((trials.all_of(mended), says, f"; {advice} {'mends these, but not all' if left else 'fits'}"))
    kinds: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, (stored, made) in left.items():
        pairs = zip(stored, made, strict=False) if len(made) == len(stored) else [(len(stored), len(made))]
        kinds.setdefault(tuple(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1])), []).append(name)
    for kind, names in kinds.items():
        sizes = {made for _, made in kind}
        keys = [key for key, value in trials.config.items() if type(value) is int and value in sizes]
        lines.append((trials.all_of(names), ", ".join(f"{key} is {trials.config[key]}" for key in keys), ""))
    for (name, *more), says, advice in lines:
        first = [list(shape) for shape in trials.found[name]]
        yield (
            f"{where}: does not fit the weights: {says}{', but ' if says else ''}they hold {name} {first[0]}, which "
            f"it makes {first[1]}{f' (and {len(more)} more)' if more else ''}{advice}"
        )


def _mended(trials: Trials) -> tuple[list[tuple[dict[str, int], set[str]]], Differences]:
    """The keys of which another value makes tensors fit and no other misfit, with that value, and those tensors; and
    what then still differs.

    The key that mends most comes first, with others that mend just the same; the next is sought beside it.
    """
    steps: list[tuple[dict[str, int], set[str]]] = []
    chosen: dict[str, int] = {}
    left = trials.left({}) or {}
    while left:
        tried: dict[tuple[str, int], Differences] = {}
        for key, value in _candidates(left, _sizes(trials.module(chosen), trials.config)):
            after = None if key in chosen else trials.left({**chosen, key: value})
            if after is not None and after.keys() < left.keys():
                tried[key, value] = after
        if not tried:
            break
        best = min(tried.values(), key=lambda after: len(trials.all_of(after)))
        options = {key: value for (key, value), after in tried.items() if after.keys() == best.keys()}
        steps.append((options, left.keys() - best.keys()))
        key = next(iter(options))
        chosen[key], left = options[key], trials.left({**chosen, key: options[key]}) or {}
    for options, _ in steps:  # what mended just the same may yet not go with what was found after it
        others = {key: value for key, value in chosen.items() if key not in options}
        for key, value in [*options.items()][1:]:
            if trials.left({**others, key: value}) != left:
                del options[key]
    return steps, left


def _candidates(left: Differences, sizes: Mapping[str, int | None]) -> Iterator[tuple[str, int]]:
    """The values to try: a size grows with its key in proportion, or, where a width is shared out to heads, falls so.

    Of a key that is not set, the sizes themselves are tried.
    """
    pairs = [
        (have, want)
        for stored, made in left.values()
        if len(stored) == len(made)
        for have, want in zip(stored, made, strict=True)
        if have != want and have * want
    ]
    ratios = list(islice(dict.fromkeys(Fraction(*pair) for pair in pairs), N_RATIOS))
    unset = list(islice(dict.fromkeys(have for have, _ in pairs), N_RATIOS))
    for key, size in sizes.items():
        if size is None:
            yield from product([key], unset)
            continue
        for value in (size * factor for ratio in ratios for factor in (ratio, 1 / ratio)):
            if value.denominator == 1 and 0 < value < 2**31:
                yield key, int(value)


def _sizes(module: Any, config: Mapping[str, Any]) -> dict[str, int | None]:
    """Every key of a size that Transformers knows, as the config spells it, and what it is taken as; None: not set.

    What a config class does not hold, but its modules look for, is what they took instead, as a head's width.
    """
    built, found = module.config, dict[str, int | None]()
    parts = [vars(part) for part in module.modules()]
    for key in (key for key in SIZES if key not in N_BLOCKS):
        own = built.attribute_map.get(key, key)
        spelled = [own, *(name for name, meant in built.attribute_map.items() if meant == own)]
        value = getattr(built, own, None)
        if type(value) is not int:
            value = next((part[key] for part in parts if type(part.get(key)) is int), None)
        if value is not None or hasattr(built, own):
            declared = [name for name in spelled if name in getattr(type(built), "__dataclass_fields__", ())]
            stated = [name for name in spelled if config.get(name) is not None]
            found.update(dict.fromkeys(stated or declared[:1] or [own], value))
    return found


def _stated(config: Mapping[str, Any], module: Any, key: str, taken: int | None, fitting: int) -> str:
    """What a config.json says of a size, or what Transformers takes where it says nothing.

    A key that Transformers does not read and that holds what fits is told beside it.
    """
    value = config.get(key)
    if value is not None:
        return f"{key} is {value}"
    default = type(module.config)()
    unread = [
        name
        for name, held in config.items()
        if type(held) is int
        and held == fitting
        and not hasattr(default, name)
        and not any(name in vars(part) for part in module.modules())
    ]
    instead = f" (of {unread[0]} it knows nothing)" if unread else ""
    return f"{key} is not set{instead}" if taken is None else f"without {key} Transformers takes it as {taken}{instead}"
