"""How the questions of a call are divided where processes may share them: into the same parts, however many they are.

A part is computed on its own, from the passes to the last token decoded, so that its scores have the same bytes
whoever computes it, and when. What several parts could have had in common, batches of rollouts, they do not share:
a process that is alone divides nothing, unless its bytes are to be those of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

PARTS = 8  # at most: more could be shared by more processes, and would be decoded in smaller batches
FEWEST = 8  # tasks of a part, on average at least: decoding a few together takes hardly longer than one

Part = tuple[tuple[int, ...], ...]  # batches of tasks, these by number


def divided(batches: Sequence[Sequence[int]], n: int, costs: Sequence[int] | None = None) -> list[Part]:
    """Batches in n runs that cost about as much (`costs`, of each batch: the same unless given), or in fewer where
    these would hold too little."""
    n = min(n, len(batches), max(1, sum(map(len, batches)) // FEWEST))
    until = list(accumulate([1] * len(batches) if costs is None else costs, initial=0))
    bounds = [0] if n else []
    for i in range(1, n + 1):  # where about i parts of n are done; no part is empty
        nearest = min(range(len(until)), key=lambda end: abs(until[end] * n - until[-1] * i))
        bounds.append(min(max(nearest, bounds[-1] + 1), len(batches) - (n - i)))
    return [tuple(tuple(batch) for batch in batches[begin:end]) for begin, end in pairwise(bounds)]
