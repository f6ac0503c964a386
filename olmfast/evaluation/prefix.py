"""Activations that a unit leaves unchanged: computed once per input and kept at the boundaries between blocks.

What enters block i depends on the embedding and on the blocks below i alone. It stays valid as long as the recipe
says the same of them, whatever is tried or chosen above. Inputs always go through the blocks in the same batches,
so that what is kept has the same bytes whether it was computed in one go, step by step, or again after a kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from olmfast.evaluation.blocks import BlockwiseModel, Recorder, State
from olmfast.evaluation.memory import Shares
from olmfast.evaluation.model import WorkingModel
from olmfast.weights.recipe import Recipe


@dataclass
class Batch:
    """Inputs that go through the blocks together, and what is kept of them.

    `hidden` maps a block to what enters it, (inputs, width, hidden); `states` are the keys and values of the
    blocks from the first on, (inputs, heads, width, head size), where they are wanted.
    """

    ids: list[tuple[int, ...]]
    wants_states: bool
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Bytes of everything kept."""
        kept = [*self.hidden.values(), *(x for state in self.states for x in state)]
        return sum(x.nbytes for x in kept)

    def forget(self) -> None:
        """Drop what is kept."""
        self.hidden, self.states = {}, []

    def keep_up_to(self, valid: int) -> None:
        """Drop what stands on block `valid` or on what comes after it; -1: on the embedding."""
        self.hidden = {boundary: x for boundary, x in self.hidden.items() if boundary <= valid}
        del self.states[max(valid, 0) :]


class _Way(NamedTuple):
    """A batch that is brought to a block: from the boundary where it is kept, or -1, by those to be kept as well."""

    batch: Batch
    start: int
    stations: set[int]


class Prefix:
    """Keeps activations of batches, in about `prefix_bytes` beside those of the boundary that is in use.

    What is valid stays as long as there is room. Then a sweep that goes forward keeps the one boundary that moves up
    with it. For one that goes backward, boundaries are kept evenly spaced below, as many as the limit allows; those
    between are computed again when needed.
    """

    def __init__(self, model: WorkingModel, blockwise: BlockwiseModel, shares: Shares) -> None:
        self.model, self.blockwise, self.shares = model, blockwise, shares
        self._recipe: Recipe | None = None
        self._last, self._backward = -1, True

    def bring_to(self, block: int, batches: Sequence[Batch], kept: Sequence[Batch]) -> None:
        """Compute what enters `block` for these batches, as far as it is not kept; `kept` are all that there are."""
        self._drop_stale(kept)
        if self._last >= 0 and block != self._last:
            self._backward = block < self._last
        ways: list[_Way] = []
        for batch in batches:
            at_most = min(block, len(batch.states)) if batch.wants_states else block
            start = max((boundary for boundary in batch.hidden if boundary <= at_most), default=-1)
            if start < block or (batch.wants_states and len(batch.states) < block):
                ways.append(_Way(batch, start, self._stations(start, block, kept) if self._backward else set()))
        self._advance(ways, block)
        if sum(batch.n_bytes for batch in kept) > self.shares.prefix_bytes:
            self._drop_passed(block, kept)
        self._last = block

    def _drop_passed(self, block: int, kept: Sequence[Batch]) -> None:
        """Drop what the sweep has left behind."""
        for batch in kept:
            moved_up = not self._backward and block in batch.hidden  # others of the same block may be asked for next
            for boundary in list(batch.hidden):
                if boundary > block or (boundary < block and moved_up):
                    del batch.hidden[boundary]

    def _advance(self, ways: Sequence[_Way], block: int) -> None:
        """Bring batches to where they enter `block`, all of them through one block before the next."""
        on_their_way: dict[int, torch.Tensor] = {}  # by the place of the batch among them
        for index in range(max(min((way.start for way in ways), default=block), 0), block):
            with self.blockwise.visit(index):
                for at, way in enumerate(ways):
                    if max(way.start, 0) <= index:
                        on_their_way[at] = self._through(index, block, way, on_their_way.get(at))
        for way in ways:
            if block == 0:
                way.batch.hidden[0] = self._entered(way.batch)

    def _through(self, index: int, block: int, way: _Way, hidden: torch.Tensor | None) -> torch.Tensor:
        """A batch through a block; `hidden` is what enters it, None where its way begins."""
        batch = way.batch
        if hidden is None:
            hidden = self._entered(batch) if way.start < 0 else batch.hidden[way.start]
        recorder = Recorder() if len(batch.states) == index and batch.wants_states else None
        hidden = self.blockwise.run(hidden, index, index + 1, recorder)
        if recorder is not None:
            batch.states.append(recorder.states[index])
        if index + 1 == block or index + 1 in way.stations:
            batch.hidden[index + 1] = hidden
        return hidden

    def _entered(self, batch: Batch) -> torch.Tensor:
        return self.blockwise.enter(self.blockwise.pad(batch.ids))

    def _stations(self, start: int, block: int, kept: Sequence[Batch]) -> set[int]:
        """The boundaries between `start` and `block` that are worth keeping, as far as the limit allows."""
        low = max(start, 0)
        one = sum(len(batch.ids) * max(map(len, batch.ids)) for batch in kept) * self.blockwise.hidden_bytes
        room = max(0, self.shares.prefix_bytes - sum(batch.n_bytes for batch in kept))
        n = min(block - low - 1, room // max(one, 1))
        return {low + round((block - low) * (i + 1) / (n + 1)) for i in range(n)} if n > 0 else set()

    def _drop_stale(self, kept: Sequence[Batch]) -> None:
        """Drop what stands on values that the recipe has replaced."""
        recipe, before = self.model.recipe, self._recipe
        self._recipe = recipe
        if recipe is before or before is None:
            return
        block_of = self.model.architecture.block_of
        changed = [block_of(name) for name, value in recipe.tensors.items() if before.tensors.get(name) != value]
        if recipe.base != before.base:
            changed.append(None)
        valid = min((-1 if block is None else block for block in changed), default=len(self.blockwise.blocks))
        for batch in kept:
            batch.keep_up_to(valid)
