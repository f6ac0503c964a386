"""Greedy decoding from prompts, in batches with a KV cache, through Transformers' own modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch

# Device type -> tokens between two looks at which rows go on: each look waits for all work that is queued.
TOKENS_APART = {"cuda": 8}


class Generated(NamedTuple):
    """Greedy continuations. Of each row only the first `lengths` tokens count."""

    tokens: torch.Tensor  # (batch, steps)
    max_prob: torch.Tensor  # (batch, steps) the probability of each of them
    lengths: torch.Tensor  # (batch,) tokens before a stop token or the row's limit
    stopped: torch.Tensor  # (batch,) whether a stop token ended the row


@torch.inference_mode()
def generate(
    module: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    context: int,
    stop: Collection[int] = (),
) -> Generated:
    """Feed the model its own most probable token until each row met a stop token or its limit of tokens.

    Prompts are padded on the left, the padding masked, positions counted from each prompt's first token. A row
    that is done goes on with the others but its tokens no longer count; its positions stop at `context`.
    """
    from transformers import DynamicCache

    device = next(module.parameters()).device
    apart = TOKENS_APART.get(device.type, 1)
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
        token, max_prob = next_tokens(module, ids, mask, positions, cache)
        tokens.append(token)
        probabilities.append(max_prob)
        stopped |= alive & torch.isin(token, stop_ids)
        alive &= ~stopped
        lengths += alive
        alive &= limit > step + 1
        if (step + 1) % apart == 0 and not bool(alive.any()):
            break
        ids, positions = token[:, None], (positions[:, -1:] + 1).clamp(max=context - 1)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return Generated(torch.stack(tokens, 1), torch.stack(probabilities, 1), lengths, stopped)


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def next_tokens(
    module: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's most probable next token and its probability, both (batch,)."""
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
    return token, torch.exp(top - torch.logsumexp(logits, dim=1))
