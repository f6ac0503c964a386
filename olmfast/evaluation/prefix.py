"""Activations that a unit leaves unchanged: computed once per input and kept at the boundaries between blocks.

What enters block i depends on the embedding and on the blocks below i alone. It stays valid as long as the recipe
says the same of them, whatever is tried or chosen above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from olmfast.evaluation.batches import make_batches
from olmfast.evaluation.decoder import Decoder, Recorder
from olmfast.evaluation.model import WorkingModel
from olmfast.weights.recipe import Recipe

State = tuple[torch.Tensor, torch.Tensor]  # one block's keys and values of one input, (heads, tokens, head size)


@dataclass
class _Kept:
    """What is kept of one input. `hidden` maps a block to what enters it, (tokens, hidden)."""

    ids: tuple[int, ...]
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)  # of the blocks from the first on


class Prefix:
    """Kept activations of inputs, each known by a number. At most `limit` bytes beside those just asked for.

    A sweep that goes forward needs one boundary, which moves up with it. For one that goes backward, boundaries
    are kept evenly spaced below, as many as the limit allows; those between are computed again when needed.
    """

    def __init__(self, model: WorkingModel, decoder: Decoder, batch_tokens: int, limit: int) -> None:
        self.model, self.decoder, self.batch_tokens, self.limit = model, decoder, batch_tokens, limit
        self._kept: dict[int, _Kept] = {}
        self._recipe: Recipe | None = None
        self._last: int | None = None

    def forget(self, inputs: Sequence[int]) -> None:
        """Drop inputs that changed."""
        for index in inputs:
            self._kept.pop(index, None)

    def entering(
        self, block: int, inputs: Sequence[int], ids: Sequence[tuple[int, ...]], with_states: bool
    ) -> list[torch.Tensor]:
        """What enters `block` for each input, (tokens, hidden); `ids` are the inputs' tokens.

        `with_states` records the keys and values of the blocks below on the way.
        """
        self._drop_stale()
        for index, tokens in zip(inputs, ids, strict=True):
            self._kept.setdefault(index, _Kept(tokens))
        backward = self._last is None or block < self._last
        groups: dict[tuple[int, bool], list[int]] = {}
        for index in inputs:
            kept = self._kept[index]
            if with_states and len(kept.states) < block:
                start = max((b for b in kept.hidden if b <= len(kept.states)), default=-1)
            elif block in kept.hidden:
                continue
            else:
                start = max((b for b in kept.hidden if b < block), default=-1)
            groups.setdefault((start, with_states), []).append(index)
        for (start, _), group in groups.items():
            self._advance(group, start, block, with_states, self._stations(start, block, backward))
        self._tidy(block, backward)
        self._last = block
        return [self._kept[index].hidden[block] for index in inputs]

    def states(self, index: int) -> list[State]:
        """Keys and values of the blocks below the boundary that was last asked for, of one input."""
        return self._kept[index].states

    @property
    def n_bytes(self) -> int:
        """Bytes of everything kept."""
        hidden = sum(x.nbytes for kept in self._kept.values() for x in kept.hidden.values())
        return hidden + sum(x.nbytes for kept in self._kept.values() for state in kept.states for x in state)

    def _advance(self, inputs: list[int], start: int, block: int, with_states: bool, stations: set[int]) -> None:
        lengths = [len(self._kept[index].ids) for index in inputs]
        for batch in make_batches(lengths, self.batch_tokens):
            kept = [self._kept[inputs[i]] for i in batch]
            if start < 0:
                hidden = self.decoder.enter(self.decoder.pad([one.ids for one in kept]))
                self._keep(kept, 0, hidden, {0} & ({block} | stations))
            else:
                hidden = self.decoder.pad_hidden([one.hidden[start] for one in kept])
            for index in range(max(start, 0), block):
                recorder = Recorder() if with_states else None
                hidden = self.decoder.run(hidden, index, index + 1, recorder)
                self._keep(kept, index + 1, hidden, {index + 1} & ({block} | stations))
                if recorder is not None:
                    keys, values = recorder.states[index]
                    for row, one in enumerate(kept):
                        n = len(one.ids)
                        if len(one.states) == index:
                            one.states.append((keys[row, :, :n].clone(), values[row, :, :n].clone()))

    @staticmethod
    def _keep(kept: list[_Kept], block: int, hidden: torch.Tensor, wanted: set[int]) -> None:
        if wanted:
            for row, one in enumerate(kept):
                one.hidden[block] = hidden[row, : len(one.ids)]

    def _stations(self, start: int, block: int, backward: bool) -> set[int]:
        """The boundaries between `start` and `block` that are worth keeping, as far as the limit allows."""
        between = block - max(start, 0)
        if not backward or between < 2:
            return set()
        width = self.decoder.head.weight.shape[1] * self.decoder.head.weight.element_size()
        one = sum(len(kept.ids) for kept in self._kept.values()) * width
        n = min(between - 1, max(0, self.limit - self.n_bytes) // max(one, 1))
        return {max(start, 0) + round(between * (i + 1) / (n + 1)) for i in range(n)} if n else set()

    def _tidy(self, block: int, backward: bool) -> None:
        for kept in self._kept.values():
            for boundary in list(kept.hidden):
                if boundary > block or (boundary < block and not backward):
                    del kept.hidden[boundary]

    def _drop_stale(self) -> None:
        """Drop what stands on values that the recipe has replaced."""
        recipe, before = self.model.recipe, self._recipe
        self._recipe = recipe
        if recipe is before or not self._kept:
            return
        if before is None or recipe.base != before.base:
            self._kept.clear()
            return
        changed = [name for name, value in recipe.tensors.items() if before.tensors.get(name) != value]
        blocks = [self.model.sources.pool.architecture.block_of(name) for name in changed]
        valid = min((-1 if block is None else block for block in blocks), default=len(self.decoder.blocks))
        for kept in self._kept.values():
            kept.hidden = {boundary: x for boundary, x in kept.hidden.items() if boundary <= valid}
            del kept.states[max(valid, 0) :]
