"""The units of each scale, in the order in which a search walks them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest

from olmfast.config.originals import BOUNDARY
from olmfast.config.run import RunConfig, Scale
from olmfast.weights.architecture import Architecture, Unit

# What the steps of a scale are called in the report; the first keys of the original's are among them.
STAGES: dict[Scale, str] = {
    "model": "model",
    "depth": "depth",
    "kind": "kind",
    "boundary": "boundary",
    "block": "layers",
    "tensor": "tensors",
}


def units_of(scale: Scale, config: RunConfig, architecture: Architecture, tensors: Sequence[str]) -> list[Unit]:
    """The units of one scale, in the order in which they are walked.

    The whole model; thirds of the depth; all attention and all MLP; the boundary; each block, or the windows of
    `markov`; the modules inside the blocks that a pattern of `units` matches, and those of the boundary if it names it.
    """
    if scale == "model":
        return [architecture.model_unit(tensors)]
    if scale == "kind":
        return architecture.kind_units(tensors)
    if scale == "boundary":
        return [architecture.boundary_unit(tensors)]
    backward = config.direction == "backward"
    if scale == "block":
        size = config.markov.window + 1
        blocks = list(range(architecture.n_blocks))[:: -1 if backward else 1]
        if config.markov.slide:  # a block, and those just walked before it
            windows = [sorted(blocks[max(0, at - size + 1) : at + 1]) for at in range(len(blocks))]
        else:
            windows = [sorted(blocks[start : start + size]) for start in range(0, len(blocks), size)]
        return [architecture.window_unit(tensors, window) for window in windows]
    if scale == "depth":
        units = architecture.depth_units(tensors)
    else:
        units = [
            unit
            for unit in architecture.module_units(tensors, config.skip_norm, boundary=BOUNDARY in config.units)
            if not unit.blocks
            or any(fnmatchcase(name, pattern) for pattern in config.units for name in (unit.name, *unit.tensors))
        ]
    return units[::-1] if backward else units


def in_order(units: Sequence[Unit]) -> Iterator[tuple[Unit, Unit | None]]:
    """Each unit with the one that follows it."""
    return zip_longest(units, units[1:])
