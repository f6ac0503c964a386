"""Greedy decoding in batches with a KV cache, through Transformers' own modules: from prompts, or from rollouts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.cache import Kept, filled_cache
from olmfast.evaluation.cohort import Cohort, Statistics
from olmfast.evaluation.leaves import Leaf, computing_for
from olmfast.evaluation.memory import Shares, is_out_of_memory
from olmfast.evaluation.tasks import OwnTokens
from olmfast.evaluation.trajectories import Trajectories

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
        token, max_prob = _next_tokens(module, ids, mask, positions, cache)
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


def _next_tokens(
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


@dataclass
class Rollout:
    """A greedy continuation to go on with: of one candidate (by its place in a cohort) on one task (by number)."""

    place: int
    task: int
    own: OwnTokens  # so far; the last one has not been fed yet
    states: list[Kept]  # per block, keys and values of all tokens before it
    n_states: int  # how many tokens that are
    limit: int  # how many tokens are still wanted, at least 1


@torch.inference_mode()
def resume(
    module: Any, rollouts: Sequence[Rollout], leaves: Sequence[Leaf], context: int, stop: Collection[int]
) -> list[OwnTokens]:
    """What follows each rollout, decoded in one batch, each with its candidate's values in `leaves`.

    The last token may be a stop token. Rows that are done leave the batch once they are a quarter of it.
    """
    order = sorted(range(len(rollouts)), key=lambda index: rollouts[index].place)
    rollouts = [rollouts[index] for index in order]
    device = next(module.parameters()).device
    apart = TOKENS_APART.get(device.type, 1)
    n_steps = max(one.limit for one in rollouts)
    cache, mask = filled_cache(
        module.config, [one.states for one in rollouts], [one.n_states for one in rollouts], n_steps
    )
    stop_ids = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    ids = torch.tensor([[one.own.tokens[-1]] for one in rollouts], device=device)
    positions = mask.sum(1, keepdim=True)
    left = torch.tensor([one.limit for one in rollouts], device=device)
    rows = torch.arange(len(rollouts), device=device)  # which rollout each row of the batch is
    width = mask.shape[1]
    mask = torch.cat([mask, mask.new_ones(len(rollouts), n_steps)], dim=1)
    places, counts = np.unique([one.place for one in rollouts], return_counts=True)
    tokens = torch.zeros(len(rollouts), n_steps, dtype=torch.long, device=device)
    probabilities: torch.Tensor | None = None
    lengths = torch.zeros(len(rollouts), dtype=torch.long, device=device)
    for step in range(n_steps):
        with computing_for(leaves, places.tolist(), counts.tolist()):
            token, max_prob = _next_tokens(module, ids, mask[:, : width + step + 1], positions, cache)
        if probabilities is None:
            probabilities = max_prob.new_zeros(len(rollouts), n_steps)
        tokens[rows, step] = token  # what comes after a row's end is not read
        probabilities[rows, step] = max_prob
        lengths[rows] += left > 0
        left = torch.where(torch.isin(token, stop_ids), 0, left - 1)
        ids, positions = token[:, None], (positions + 1).clamp(max=context - 1)
        if (step + 1) % apart:
            continue
        alive = left > 0
        n_alive = int(alive.sum())
        if n_alive == 0:
            break
        if 4 * n_alive <= 3 * len(rows):
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, left, mask, ids, positions = rows[keep], left[keep], mask[keep], ids[keep], positions[keep]
            places, counts = np.unique([rollouts[row].place for row in rows.tolist()], return_counts=True)
    assert probabilities is not None
    tokens, probabilities = tokens.cpu(), probabilities.cpu()  # at once
    found = {
        index: OwnTokens(tokens[row, :n].tolist(), probabilities[row, :n])
        for row, (index, n) in enumerate(zip(order, lengths.tolist(), strict=True))
    }
    return [found[index] for index in range(len(order))]


class RolloutQueue:
    """Rollouts of a cohort's candidates that wait until they fill a batch."""

    def __init__(
        self,
        cohort: Cohort,
        blockwise: BlockwiseModel,
        trajectories: Trajectories,
        shares: Shares,
        statistics: Statistics,
    ) -> None:
        self.cohort, self.blockwise, self.trajectories = cohort, blockwise, trajectories
        self.shares, self.statistics = shares, statistics
        self._waiting: list[Rollout] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Let these wait too."""
        self._waiting += rollouts

    @property
    def fills_a_batch(self) -> bool:
        """Whether those that wait are as many as are decoded at once."""
        waiting = self._waiting
        return bool(waiting) and len(waiting) * max(map(self._length, waiting)) >= self.shares.rollout_tokens

    def decode(self) -> None:
        """Decode as many as fit a batch to their ends, those with most tokens to go first."""
        ordered = sorted(self._waiting, key=lambda one: -one.limit)
        n = max(1, self.shares.rollout_tokens // max(map(self._length, ordered)))
        chosen, rest = ordered[:n], ordered[n:]
        generative = [self.trajectories.tasks[one.task].generates for one in chosen]
        if any(generative) and not all(generative):  # stop tokens end a generation, and nothing else
            kind = generative[0]
            rest = [one for one, own in zip(chosen, generative, strict=True) if own != kind] + rest
            chosen = [one for one, own in zip(chosen, generative, strict=True) if own == kind]
        stop = self.trajectories.stop_tokens if generative[0] else ()
        try:
            ends = resume(self.blockwise.module, chosen, self.cohort.leaves, self.blockwise.context, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(chosen) == 1:
                raise
            self.statistics.splits += 1
            self.shares.halve_rollouts()
            self._waiting = [*chosen, *rest]
            return
        for one, end in zip(chosen, ends, strict=True):
            self.statistics.decoded += len(end.tokens)
            own = OwnTokens([*one.own.tokens, *end.tokens], torch.cat([one.own.max_prob, end.max_prob]))
            self.trajectories.finish(self.cohort, one.place, one.task, own)
        self._waiting = rest

    def _length(self, one: Rollout) -> int:
        prompt = self.trajectories.tasks[one.task].sample.prompt
        return len(prompt) + len(one.own.tokens) + one.limit
