"""KV caches that begin with keys and values computed elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from olmfast.evaluation.transit import sent


class Kept(NamedTuple):
    """One input's keys and values in a block: a row of (rows, heads, width, head size), from its first token on."""

    keys: torch.Tensor
    values: torch.Tensor
    row: int


def filled_cache(
    config: Any,
    inputs: Sequence[Sequence[Kept]],
    lengths: Sequence[int],
    room: int,
    fixed: bool = False,
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A cache that holds the states of several inputs, with room for more tokens, the mask of what is in it, and where
    the next token goes, (1,) on the device.

    Each input has its keys and values per block, of which the first `lengths` tokens count. They are aligned on the
    right. A `fixed` cache shows its room from the beginning, so that its shapes never change;
    where the next token goes is read by it then, and counted up by whoever feeds a token.
    """
    from transformers import DynamicCache

    width = max(lengths)
    cache = DynamicCache(config=config)
    device = inputs[0][0].keys.device
    filled_to = sent([width], device)
    places: _Places = {}
    for block, states in enumerate(inputs[0]):
        buffers = [
            part.new_zeros(len(inputs), part.shape[1], width + room, part.shape[3])
            for part in (states.keys, states.values)
        ]
        _fill(buffers, block, inputs, lengths, places)
        if block < len(cache.layers) and cache.layers[block].is_sliding and not fixed:
            cache.update(*(buffer[:, :, :width] for buffer in buffers), block)
        else:  # where it is fixed, the mask leaves out what has slid out of the window
            layer = _roomy_layer()(*buffers, width, filled_to if fixed else None)
            cache.layers[block : block + 1] = [layer]
    return cache, sent(_mask_of(lengths), device), filled_to


def refill(
    cache: Any, inputs: Sequence[Sequence[Kept] | None], lengths: Sequence[int], filled_to: torch.Tensor
) -> torch.Tensor:
    """Put other inputs into a fixed cache, in place; returns the mask of what is in it. They have to fit its room; None
    is a row of nothing."""
    places: _Places = {}
    for block, layer in enumerate(cache.layers):
        for buffer in layer.buffers:
            buffer.zero_()  # what is masked counts nothing only if it is a number
        _fill(layer.buffers, block, inputs, lengths, places)
    filled_to.fill_(max(lengths))
    return sent(_mask_of(lengths), filled_to.device)


def _mask_of(lengths: Sequence[int]) -> torch.Tensor:
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, max(lengths) - n :] = 1
    return mask


_Places = dict[tuple[tuple[int, int], ...], tuple[torch.Tensor, ...]]


def _fill(
    buffers: Sequence[torch.Tensor],
    block: int,
    inputs: Sequence[Sequence[Kept] | None],
    lengths: Sequence[int],
    places: _Places,
) -> None:
    """Copy a block's states to where they lie in its buffers. What one pass has computed lies in one tensor, and is
    copied at once; `places` are those of the blocks before."""
    together: dict[int, list[tuple[int, int]]] = {}
    for row, states in enumerate(inputs):
        if states is not None:
            together.setdefault(id(states[block].keys), []).append((row, states[block].row))
    for rows in together.values():
        states = inputs[rows[0][0]]
        assert states is not None
        key = tuple(rows)
        if key not in places:
            places[key] = _places(rows, lengths, max(lengths), buffers[0].device)
        into_row, into_token, from_row, from_token = places[key]
        for buffer, computed in zip(buffers, states[block][:2], strict=True):
            buffer[into_row, :, into_token] = computed[from_row, :, from_token]


def _places(
    rows: Sequence[tuple[int, int]], lengths: Sequence[int], width: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Row and token in a buffer, and row and token where it comes from, of every token of inputs (row, its source)."""
    counts = torch.tensor([lengths[row] for row, _ in rows])
    into_row, from_row = (torch.tensor(column).repeat_interleave(counts) for column in zip(*rows, strict=True))
    from_token = torch.cat([torch.arange(lengths[row]) for row, _ in rows])
    into_token = from_token + (width - counts).repeat_interleave(counts)
    return tuple(sent(index, device) for index in (into_row, into_token, from_row, from_token))


@functools.cache
def _roomy_layer() -> Any:
    """A class of cache layers over buffers with room to grow: (rows, heads, room, head size), `length` tokens filled.

    With `filled_to`, (1,), which layers share, it is that which says how many, and the whole buffers are shown:
    attention's mask leaves out the rest. Transformers' own layer copies everything it holds for each new token.

    Made once, when Transformers is there: a class of every call's own would hold that call's buffers until the garbage
    collector comes.
    """
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        def __init__(
            self, keys: torch.Tensor, values: torch.Tensor, length: int, filled_to: torch.Tensor | None
        ) -> None:
            super().__init__()
            self.buffers, self.length, self.filled_to = (keys, values), length, filled_to
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self._show()

        def _show(self) -> None:
            shown = None if self.filled_to is not None else self.length
            self.keys, self.values = (buffer[:, :, :shown] for buffer in self.buffers)

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
            begin, self.length = self.length, self.length + key_states.shape[2]
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                if self.filled_to is None:
                    buffer[:, :, begin : self.length] = new
                else:
                    buffer.index_copy_(2, self.filled_to, new)
            self._show()
            return self.keys, self.values

        def get_seq_length(self) -> Any:
            return super().get_seq_length() if self.filled_to is None else self.filled_to[0]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            if self.filled_to is None:
                return self.length + query_length, 0
            return self.buffers[0].shape[2], 0

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            self.buffers = (self.buffers[0][indices], self.buffers[1][indices])
            self._show()

    return RoomyLayer
