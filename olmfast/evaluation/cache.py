"""KV caches that begin with keys and values computed elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from olmfast.evaluation.blocks import State


def filled_cache(config: Any, inputs: Sequence[Sequence[State]], room: int) -> tuple[Any, torch.Tensor]:
    """A cache that holds the states of several inputs, with room for more tokens, and the mask of what is in it.

    Each input has keys and values (heads, tokens, head size) per block. They are aligned on the right.
    """
    from transformers import DynamicCache

    lengths = [states[0][0].shape[1] for states in inputs]
    width = max(lengths)
    cache = DynamicCache(config=config)
    for block in range(len(inputs[0])):
        filled = []
        for part in range(2):
            first = inputs[0][block][part]
            buffer = first.new_zeros(len(inputs), first.shape[0], width + room, first.shape[2])
            for row, (states, n) in enumerate(zip(inputs, lengths, strict=True)):
                buffer[row, :, width - n : width] = states[block][part]
            filled.append(buffer)
        if block < len(cache.layers) and cache.layers[block].is_sliding:
            cache.update(filled[0][:, :, :width], filled[1][:, :, :width], block)
        else:
            layer = _roomy_layer()(filled[0], filled[1], width)
            cache.layers[block : block + 1] = [layer]
    mask = torch.zeros(len(inputs), width, dtype=torch.long, device=first.device)
    for row, n in enumerate(lengths):
        mask[row, width - n :] = 1
    return cache, mask


@functools.cache
def _roomy_layer() -> Any:
    """A class of cache layers over buffers with room to grow: (rows, heads, room, head size), `length` tokens filled.

    Transformers' own copies everything it holds for each new token. Made once, when Transformers is there: a class of
    every call's own would hold that call's buffers until the garbage collector comes.
    """
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
            super().__init__()
            self.buffers, self.length = (keys, values), length
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self._show()

        def _show(self) -> None:
            self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
            begin, self.length = self.length, self.length + key_states.shape[2]
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, begin : self.length] = new
            self._show()
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            self.buffers = (self.buffers[0][indices], self.buffers[1][indices])
            self._show()

    return RoomyLayer
