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

        `sources` tells which of them have the same questions, scored in several ways: these are divided alike.
        """
        order = {name: _shuffled(n, seed, "halves", sources.get(name, name)) for name, n in sizes.items()}
        parts = ({name: sorted(own[start::2]) for name, own in order.items() if own[start::2]} for start in (0, 1))
        return cls(*parts)

    def __iter__(self) -> Iterator[Indices]:
        return iter((self.first, self.second))


def set_aside(
    sizes: Mapping[str, int], share: float, seed: int, sources: Mapping[str, str] = NONE
) -> tuple[Indices, Indices]:
    """The questions that a search uses, and those set aside: `share` of each dataset, rounded; see `Halves.of`."""
    kept: Indices = {}
    aside: Indices = {}
    for name, n in sizes.items():
        order = _shuffled(n, seed, "validation", sources.get(name, name))
        n_aside = min(round(share * n), n - 1)
        kept[name], aside[name] = sorted(order[n_aside:]), sorted(order[:n_aside])
    return kept, {name: own for name, own in aside.items() if own}


def _shuffled(n: int, *address: object) -> list[int]:
    order: list[int] = normal(n, *address).argsort().tolist()
    return order
