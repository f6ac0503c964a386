"""How the selection questions are divided: some are set aside to validate the end, the rest in two halves.

What one half picks, the other half tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from olmfast.weights.draws import normal

Indices = dict[str, list[int]]  # dataset -> indices of its questions
NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Halves:
    """Two halves of the questions that a search decides by; a dataset of one question is in the first alone."""

    first: Indices
    second: Indices

    @classmethod
    def of(cls, sizes: Mapping[str, int], seed: int, sources: Mapping[str, str] = NONE) -> Halves:
        """Divide datasets of these numbers of questions, at random but always alike for a seed.

        `sources` tells which of them have the same questions, scored in several ways: these are divided alike, also
        where one has but the first of another's.
        """
        order = _orders(sizes, seed, "halves", sources)
        parts = [
            {name: sorted(i for i in order[name][start::2] if i < n) for name, n in sizes.items()} for start in (0, 1)
        ]
        return cls(*({name: own for name, own in part.items() if own} for part in parts))

    def __iter__(self) -> Iterator[Indices]:
        return iter((self.first, self.second))


def set_aside(
    sizes: Mapping[str, int], share: float, seed: int, sources: Mapping[str, str] = NONE
) -> tuple[Indices, Indices]:
    """The questions that a search uses, and those set aside: `share` of each dataset, rounded; see `Halves.of`."""
    kept: Indices = {}
    aside: Indices = {}
    orders = _orders(sizes, seed, "validation", sources)
    for name, n in sizes.items():
        order = orders[name]
        n_aside = min(round(share * len(order)), len(order) - 1)
        aside[name] = [i for i in order[:n_aside] if i < n][: n - 1]
        kept[name], aside[name] = sorted(set(range(n)).difference(aside[name])), sorted(aside[name])
    return kept, {name: own for name, own in aside.items() if own}


def _orders(sizes: Mapping[str, int], seed: int, what: str, sources: Mapping[str, str]) -> dict[str, list[int]]:
    """For each dataset a random order of its source's questions, of as many as the largest of that source has."""
    largest: dict[str, int] = {}
    for name, n in sizes.items():
        source = sources.get(name, name)
        largest[source] = max(n, largest.get(source, 0))
    order = {source: normal(n, seed, what, source).argsort().tolist() for source, n in largest.items()}
    return {name: order[sources.get(name, name)] for name in sizes}
