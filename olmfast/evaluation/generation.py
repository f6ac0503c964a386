"""Greedy decoding in batches with a KV cache, through Transformers' own modules: from prompts, or from rollouts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch

from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.cache import Kept, filled_cache
from olmfast.evaluation.cohort import Cohort, Statistics
from olmfast.evaluation.leaves import Leaf, computing_for
from olmfast.evaluation.memory import Shares, is_out_of_memory
from olmfast.evaluation.replay import Replayed
from olmfast.evaluation.tasks import OwnTokens
from olmfast.evaluation.trajectories import Trajectories
from olmfast.evaluation.transit import Fetched, sent

# Device type -> tokens between two looks at which rows go on: each look waits for all work that is queued.
TOKENS_APART = {"cuda": 8}
# Types of devices on which shapes stay the same from step to step, so that steps can be replayed.
FIXED_ON = {"cuda"}
# Rows that are done leave a batch once no more than this share of it goes on. Where steps are replayed, a capture for
# fewer rows takes as long as many steps.
LEFT, LEFT_OF_FIXED = 0.75, 0.25


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
    module: Any,
    rollouts: Sequence[Rollout],
    leaves: Sequence[Leaf],
    context: int,
    stop: Collection[int],
    fixed: bool | None = None,
) -> list[OwnTokens]:
    """What follows each rollout, decoded in one batch, each with its candidate's values in `leaves`.

    The last token may be a stop token. Rows that are done leave the batch once they are a quarter of it, or three
    quarters where all shapes stay `fixed` from step to step, so that a GPU can replay them (None: on a GPU, if the
    module's blocks are in its memory and need nothing of the host).
    """
    order = sorted(range(len(rollouts)), key=lambda index: rollouts[index].place)
    decoding = _Decoding(module, [rollouts[index] for index in order], leaves, context, stop, fixed)
    found = dict(zip(order, decoding.run(), strict=True))
    return [found[index] for index in range(len(order))]


_NEEDS_THE_HOST: WeakSet[Any] = WeakSet()
_CAPTURED: WeakSet[Any] = WeakSet()  # modules of which a step of decoding has been captured


def needs_the_host(module: Any) -> bool:
    """Whether a step of decoding with this module could not be captured, and is queued anew each time."""
    return module in _NEEDS_THE_HOST


class _Decoding:
    """Rollouts in one batch, by candidate: what they feed next, and what was found.

    A step changes all of it in place.
    """

    def __init__(
        self,
        module: Any,
        rollouts: Sequence[Rollout],
        leaves: Sequence[Leaf],
        context: int,
        stop: Collection[int],
        fixed: bool | None,
    ) -> None:
        self.module, self.rollouts, self.leaves, self.context = module, rollouts, leaves, context
        self.device = device = next(module.parameters()).device
        self.fixed = device.type in FIXED_ON and not needs_the_host(module) if fixed is None else fixed
        self.n_steps = max(one.limit for one in rollouts)
        lengths = [one.n_states for one in rollouts]
        self.cache, mask, self.filled_to = filled_cache(
            module.config, [one.states for one in rollouts], lengths, self.n_steps, self.fixed
        )
        self.width = mask.shape[1]
        self.positions = mask.sum(1, keepdim=True)
        self.mask = torch.cat([mask, mask.new_zeros(len(rollouts), self.n_steps)], dim=1)
        self.stop = sent(torch.tensor(sorted(stop), dtype=torch.long), device)
        self.ids = sent([[one.own.tokens[-1]] for one in rollouts], device)
        self.left = sent([one.limit for one in rollouts], device)
        self.lengths = torch.zeros_like(self.left)
        self.n_done = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(len(rollouts), self.n_steps, dtype=torch.long, device=device)
        dtype = torch.promote_types(module.get_output_embeddings().weight.dtype, torch.float32)
        self.probabilities = torch.zeros(len(rollouts), self.n_steps, dtype=dtype, device=device)
        self.rows = list(range(len(rollouts)))  # which rollout each row of the batch is
        self._found: dict[int, OwnTokens] = {}
        self._count()

    def run(self) -> list[OwnTokens]:
        """What follows each rollout."""
        is_loaded = self.module in _CAPTURED and self.n_steps > 1  # a capture takes as long as a step
        step = Replayed(self._step, self.device, is_loaded) if self.fixed else self._step
        apart = TOKENS_APART.get(self.device.type, 1)
        for n in range(1, self.n_steps + 1):
            step()
            if n % apart and n < self.n_steps:
                continue
            alive = (self.left > 0).cpu()
            if n == self.n_steps or not alive.any():
                break
            if int(alive.sum()) <= len(self.rows) * (LEFT_OF_FIXED if self.fixed else LEFT):
                self._keep(alive)
                if isinstance(step, Replayed):
                    step.changed()
        if isinstance(step, Replayed) and step.is_refused:
            _NEEDS_THE_HOST.add(self.module)
        if isinstance(step, Replayed) and step.is_captured:
            _CAPTURED.add(self.module)
        self._take(torch.ones(len(self.rows), dtype=torch.bool))
        return [self._found[row] for row in range(len(self.rollouts))]

    def _step(self) -> None:
        """Feed a token to each row. What comes after a row's end is not read."""
        self.mask.index_fill_(1, self.filled_to, 1)
        mask = self.mask if self.fixed else self.mask[:, : self.width + 1]
        with computing_for(self.leaves, self.places, self.counts):
            token, max_prob = _next_tokens(self.module, self.ids, mask, self.positions, self.cache)
        self.tokens.index_copy_(1, self.n_done, token[:, None])
        self.probabilities.index_copy_(1, self.n_done, max_prob[:, None].to(self.probabilities.dtype))
        self.lengths += self.left > 0
        self.left.copy_(torch.where((token[:, None] == self.stop).any(1), 0, self.left - 1))
        self.ids.copy_(token[:, None])
        self.positions.add_(1).clamp_(max=self.context - 1)
        self.n_done += 1
        self.filled_to += 1
        self.width += 1

    def _keep(self, alive: torch.Tensor) -> None:
        """Go on with these rows only, (rows,) on the CPU."""
        self._take(~alive)
        keep = sent(alive.nonzero()[:, 0], self.device)
        self.cache.batch_select_indices(keep)
        for name in ("ids", "positions", "left", "lengths", "mask", "tokens", "probabilities"):
            setattr(self, name, getattr(self, name)[keep])
        self.rows = [row for row, goes_on in zip(self.rows, alive.tolist(), strict=True) if goes_on]
        self._count()

    def _take(self, done: torch.Tensor) -> None:
        """Fetch what was found in these rows, (rows,) on the CPU."""
        tokens, probabilities, counts = Fetched([self.tokens, self.probabilities, self.lengths]).wait()
        lengths = counts.tolist()
        for at in done.nonzero()[:, 0].tolist():
            n = lengths[at]
            self._found[self.rows[at]] = OwnTokens(tokens[at, :n].tolist(), probabilities[at, :n])

    def _count(self) -> None:
        """Which candidates the rows are of, and how many of each."""
        places, counts = np.unique([self.rollouts[row].place for row in self.rows], return_counts=True)
        self.places, self.counts = places.tolist(), counts.tolist()
        for leaf in self.leaves:
            leaf.prepare(self.places, self.counts)


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
            fixed = None if self.blockwise.is_resident else False
            ends = resume(self.blockwise.module, chosen, self.cohort.leaves, self.blockwise.context, stop, fixed)
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
