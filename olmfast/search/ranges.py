"""Contiguous ranges of blocks, coarse to fine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from olmfast.config.searches import Dataflow

Range = tuple[int, int]  # the first block, and the first behind it


def grid(n_blocks: int, step: int) -> list[Range]:
    """The ranges whose ends are multiples of `step`, or the end of the model."""
    edges = sorted({*range(0, n_blocks, step), n_blocks})
    return [(i, j) for i in edges for j in edges if i < j]


def coarsest(n_blocks: int, at_most: int) -> int:
    """The smallest step, a power of 2, whose grid has so many ranges at most, or two."""
    step = 1
    while len(grid(n_blocks, step)) > max(at_most, 3) and step < n_blocks:
        step *= 2
    return step


def around(ranges: Sequence[Range], step: int, n_blocks: int) -> list[Range]:
    """The ranges whose ends are at most `step` away from those of one of the given."""
    moved = [(i + di, j + dj) for i, j in ranges for di in (-step, 0, step) for dj in (-step, 0, step)]
    return list(dict.fromkeys((i, j) for i, j in moved if 0 <= i < j <= n_blocks))


def told(one: Range) -> str:
    """A range as tables name it: its first and its last block."""
    return f"{one[0]}-{one[1] - 1}" if one[1] - one[0] > 1 else f"{one[0]}"


def repeat_steps(n_blocks: int, config: Dataflow) -> Iterator[tuple[str, int]]:
    """About how many ranges each round has, the model as it is included; the last is the test."""
    step = coarsest(n_blocks, config.grid)
    yield "repeat", 1 + len(grid(n_blocks, step))
    while step > 1:
        step //= 2
        yield "repeat", 1 + 8 * config.keep
    yield "repeat", 2
