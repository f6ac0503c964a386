"""Batched greedy decoding with a KV cache, through Transformers' own modules; from the start, or from a cut."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from olmfast.evaluation.stacked import Leaf, stacked


class Decoded(NamedTuple):
    """Greedy continuations. Of each row only the first `lengths` tokens count."""

    tokens: torch.Tensor  # (batch, steps)
    max_prob: torch.Tensor  # (batch, steps) the probability of each of them
    lengths: torch.Tensor  # (batch,) tokens before a stop token or the row's limit
    stopped: torch.Tensor  # (batch,) whether a stop token ended the row


@torch.inference_mode()
def greedy(
    module: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    context: int,
    stop: Collection[int] = (),
) -> Decoded:
    """Feed the model its own most probable token until each row met a stop token or its limit of tokens.

    Prompts are padded on the left, the padding masked, positions counted from each prompt's first token. A row
    that is done goes on with the others but its tokens no longer count; its positions stop at `context`.
    """
    from transformers import DynamicCache

    device = next(module.parameters()).device
    ids, mask = _left_pad(prompts, device)
    stop_ids = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    limit = torch.tensor(limits, device=device)
    alive = limit > 0
    stopped = torch.zeros_like(alive)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=module.config)
    tokens, probabilities = [], []
    for step in range(max(limits)):
        out = module(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top, token = logits.max(dim=1)
        tokens.append(token)
        probabilities.append(torch.exp(top - torch.logsumexp(logits, dim=1)))
        stopped |= alive & torch.isin(token, stop_ids)
        alive &= ~stopped
        lengths += alive
        alive &= limit > step + 1
        if not bool(alive.any()):
            break
        ids, positions = token[:, None], (positions[:, -1:] + 1).clamp(max=context - 1)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return Decoded(torch.stack(tokens, 1), torch.stack(probabilities, 1), lengths, stopped)


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class Cut(NamedTuple):
    """A greedy continuation to go on with, of one candidate on one input."""

    candidate: int  # its row in the stack of `leaves`
    token: int  # the last token so far, not yet fed
    states: list[tuple[torch.Tensor, torch.Tensor]]  # per block, keys and values of all tokens before it
    limit: int  # how many tokens are still wanted, at least 1


class Tail(NamedTuple):
    """What followed a cut: tokens and their probabilities, (tokens,); the last may be a stop token."""

    tokens: torch.Tensor
    max_prob: torch.Tensor


@torch.inference_mode()
def resume(module: Any, cuts: Sequence[Cut], leaves: Sequence[Leaf], context: int, stop: Collection[int]) -> list[Tail]:
    """Go on decoding where each cut stands, all in one batch, each with its candidate's values in `leaves`.

    Rows that are done leave the batch once they are a quarter of it.
    """
    order = sorted(range(len(cuts)), key=lambda index: cuts[index].candidate)
    cuts = [cuts[index] for index in order]
    device = next(module.parameters()).device
    cache, mask = _filled_cache(module.config, cuts)
    stop_ids = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    ids = torch.tensor([[cut.token] for cut in cuts], device=device)
    positions = mask.sum(1, keepdim=True)
    left = torch.tensor([cut.limit for cut in cuts], device=device)
    rows = torch.arange(len(cuts), device=device)  # which cut each row of the batch is
    n_steps = max(cut.limit for cut in cuts)
    tokens = torch.zeros(len(cuts), n_steps, dtype=torch.long, device=device)
    probabilities: torch.Tensor | None = None
    lengths = torch.zeros(len(cuts), dtype=torch.long, device=device)
    for step in range(n_steps):
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        here, counts = np.unique([cuts[row].candidate for row in rows.tolist()], return_counts=True)
        with stacked(leaves, here.tolist(), counts.tolist()):
            out = module(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits = out.logits[:, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top, token = logits.max(dim=1)
        if probabilities is None:
            probabilities = logits.new_zeros(len(cuts), n_steps)
        tokens[rows, step] = token  # what comes after a row's end is not read
        probabilities[rows, step] = torch.exp(top - torch.logsumexp(logits, dim=1))
        lengths[rows] += left > 0
        left = torch.where(torch.isin(token, stop_ids), 0, left - 1)
        alive = left > 0
        n_alive = int(alive.sum())
        if n_alive == 0:
            break
        ids, positions = token[:, None], (positions + 1).clamp(max=context - 1)
        if 4 * n_alive <= 3 * len(rows):
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, left, mask, ids, positions = rows[keep], left[keep], mask[keep], ids[keep], positions[keep]
    assert probabilities is not None
    found = {
        index: Tail(tokens[row, :n].cpu(), probabilities[row, :n].cpu())
        for row, (index, n) in enumerate(zip(order, lengths.tolist(), strict=True))
    }
    return [found[index] for index in range(len(order))]


def _filled_cache(config: Any, cuts: Sequence[Cut]) -> tuple[Any, torch.Tensor]:
    """A cache that holds the cuts' states, aligned on the right, and the mask of what is in it."""
    from transformers import DynamicCache

    lengths = [cut.states[0][0].shape[1] for cut in cuts]
    width, room = max(lengths), max(cut.limit for cut in cuts)
    cache = DynamicCache(config=config)
    for block in range(len(cuts[0].states)):
        filled = []
        for part in range(2):
            first = cuts[0].states[block][part]
            buffer = first.new_zeros(len(cuts), first.shape[0], width + room, first.shape[2])
            for row, (cut, n) in enumerate(zip(cuts, lengths, strict=True)):
                buffer[row, :, width - n : width] = cut.states[block][part]
            filled.append(buffer)
        if block < len(cache.layers) and cache.layers[block].is_sliding:
            cache.update(filled[0][:, :, :width], filled[1][:, :, :width], block)
        else:
            layer = _roomy_layer()(filled[0], filled[1], width)
            cache.layers[block : block + 1] = [layer]
    mask = torch.zeros(len(cuts), width, dtype=torch.long, device=first.device)
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
