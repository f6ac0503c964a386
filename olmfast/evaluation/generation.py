"""Greedy decoding in batches with a KV cache, through Transformers' own modules: from prompts, or from rollouts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch

from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.cache import Kept, filled_cache, refill
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
LEFT = 0.75  # rows that are done leave a batch once no more than this share of it goes on, if its shapes may change
ROOM_STEP = 128  # in which the room of a batch of fixed shapes grows, so that the next ones fit


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


def resume(
    module: Any,
    rollouts: Sequence[Rollout],
    leaves: Sequence[Leaf],
    context: int,
    stop: Collection[int],
    fixed: bool | None = None,
) -> list[OwnTokens]:
    """What follows each rollout, decoded in one batch; see `Decoder`."""
    return Decoder(module, leaves, context, fixed).resume(rollouts, stop)


class Decoder:
    """Decodes batches of rollouts, each with its candidate's values in `leaves`.

    Where all shapes stay `fixed` from step to step, a GPU replays steps (None: on a GPU, if the module's blocks are in
    its memory and need nothing of the host), and the batches that fit the last one's memory as well.
    """

    def __init__(self, module: Any, leaves: Sequence[Leaf], context: int, fixed: bool | None = None) -> None:
        self.module, self.leaves, self.context, self._fixed = module, leaves, context, fixed
        self._last: _Fixed | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether shapes stay the same."""
        if self._fixed is not None:
            return self._fixed
        return next(self.module.parameters()).device.type in FIXED_ON and not needs_the_host(self.module)

    def fitting(self, rollouts: Sequence[Rollout], stop: Collection[int]) -> list[Rollout]:
        """Those of the rollouts that fit the last batch's memory together; none if it would be filled by half only,
        while others are left."""
        if self._last is None or not self.is_fixed:
            return []
        chosen = self._last.fitting(rollouts, stop)
        return chosen if 2 * len(chosen) >= min(len(rollouts), len(self._last.places)) else []

    @torch.inference_mode()
    def resume(self, rollouts: Sequence[Rollout], stop: Collection[int]) -> list[OwnTokens]:
        """What follows each rollout, decoded in one batch. The last token may be a stop token."""
        order = sorted(range(len(rollouts)), key=lambda index: rollouts[index].place)
        chosen = [rollouts[index] for index in order]
        last, self._last = self._last, None
        batch: _Batch
        if not self.is_fixed:
            batch = _Growing(self.module, chosen, self.leaves, self.context, stop)
        elif last is not None and len(last.fitting(chosen, stop)) == len(chosen):
            last.load(chosen)
            batch = last
        else:
            del last  # its memory goes before more is taken
            batch = _Fixed(self.module, chosen, self.leaves, self.context, stop)
        found = dict(zip(order, batch.run(), strict=True))
        if isinstance(batch, _Fixed) and batch.is_replayed:
            self._last = batch
        return [found[index] for index in range(len(order))]


_NEEDS_THE_HOST: WeakSet[Any] = WeakSet()
_CAPTURED: WeakSet[Any] = WeakSet()  # modules of which a step of decoding has been captured


def needs_the_host(module: Any) -> bool:
    """Whether a step of decoding with this module could not be captured, and is queued anew each time."""
    return module in _NEEDS_THE_HOST


class _Batch:
    """Rollouts in one batch, by candidate: what they feed next, and what was found. A step changes it in place."""

    cache: Any
    filled_to: torch.Tensor
    left: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    n_done: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor

    def __init__(
        self, module: Any, rollouts: Sequence[Rollout], leaves: Sequence[Leaf], context: int, stop: Collection[int]
    ) -> None:
        self.module, self.leaves, self.context = module, leaves, context
        self.device = device = next(module.parameters()).device
        self.stop = sent(torch.tensor(sorted(stop), dtype=torch.long), device)
        self.apart = TOKENS_APART.get(device.type, 1)
        self.rows: list[Rollout | None] = list(rollouts)  # None: nothing is wanted of the row
        self._found: dict[int, OwnTokens] = {}  # by a rollout's identity
        self._count([one.place for one in rollouts])

    def _begin(self, mask: torch.Tensor, n_tokens: int) -> dict[str, torch.Tensor]:
        """What rows of nothing but states begin with, of which the mask tells; `n_tokens` is how many they may find."""
        dtype = torch.promote_types(self.module.get_output_embeddings().weight.dtype, torch.float32)
        limits = [0 if one is None else one.limit for one in self.rows]
        fed = [0 if one is None else one.own.tokens[-1] for one in self.rows]
        left = sent(limits, self.device)
        return {
            "left": left,
            "ids": sent(fed, self.device)[:, None],
            "positions": mask.sum(1, keepdim=True),
            "lengths": torch.zeros_like(left),
            "n_done": torch.zeros(1, dtype=torch.long, device=self.device),
            "tokens": torch.zeros(len(limits), n_tokens, dtype=torch.long, device=self.device),
            "probabilities": torch.zeros(len(limits), n_tokens, dtype=dtype, device=self.device),
        }

    def _feed(self, mask: torch.Tensor) -> None:
        """Feed a token to each row. What comes after a row's end is not read."""
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

    def _take(self, done: torch.Tensor) -> None:
        """Fetch what was found in these rows, (rows,) on the CPU."""
        tokens, probabilities, counts = Fetched([self.tokens, self.probabilities, self.lengths]).wait()
        lengths = counts.tolist()
        for at in done.nonzero()[:, 0].tolist():
            rollout, n = self.rows[at], lengths[at]
            if rollout is not None:
                self._found[id(rollout)] = OwnTokens(tokens[at, :n].tolist(), probabilities[at, :n])

    def run(self) -> list[OwnTokens]:
        """What follows each rollout."""
        raise NotImplementedError

    def _count(self, places: Sequence[int]) -> None:
        """The candidates that rows are of, in turn."""
        names, counts = np.unique(places, return_counts=True)
        self.places, self.counts = names.tolist(), counts.tolist()
        for leaf in self.leaves:
            leaf.prepare(self.places, self.counts)


class _Growing(_Batch):
    """A batch whose cache and mask grow by a token a step, and which rows leave that are done."""

    def __init__(self, module: Any, rollouts: Sequence[Rollout], *rest: Any) -> None:
        super().__init__(module, rollouts, *rest)
        self.rollouts = list(rollouts)
        self.n_steps = max(one.limit for one in rollouts)
        lengths = [one.n_states for one in rollouts]
        states = [one.states for one in rollouts]
        self.cache, mask, self.filled_to = filled_cache(module.config, states, lengths, self.n_steps)
        vars(self).update(self._begin(mask, self.n_steps))
        self.mask = torch.cat([mask, mask.new_zeros(len(rollouts), self.n_steps)], dim=1)
        self.width = mask.shape[1]

    def run(self) -> list[OwnTokens]:
        """What follows each rollout."""
        for n in range(1, self.n_steps + 1):
            self.mask.index_fill_(1, self.filled_to, 1)
            self.width += 1
            self._feed(self.mask[:, : self.width])
            if n % self.apart and n < self.n_steps:
                continue
            alive = (self.left > 0).cpu()
            if n == self.n_steps or not alive.any():
                break
            if int(alive.sum()) <= len(self.rows) * LEFT:
                self._keep(alive)
        self._take(torch.ones(len(self.rows), dtype=torch.bool))
        return [self._found[id(one)] for one in self.rollouts]

    def _keep(self, alive: torch.Tensor) -> None:
        """Go on with these rows only, (rows,) on the CPU."""
        self._take(~alive)
        keep = sent(alive.nonzero()[:, 0], self.device)
        self.cache.batch_select_indices(keep)
        for name in ("ids", "positions", "left", "lengths", "mask", "tokens", "probabilities"):
            setattr(self, name, getattr(self, name)[keep])
        self.rows = [row for row, goes_on in zip(self.rows, alive.tolist(), strict=True) if goes_on]
        self._count([one.place for one in self.rows if one is not None])


class _Fixed(_Batch):
    """A batch whose shapes stay as they are, for other rollouts too: a GPU replays its steps."""

    def __init__(self, module: Any, rollouts: Sequence[Rollout], *rest: Any) -> None:
        super().__init__(module, rollouts, *rest)
        self._stop = rest[-1]
        self._of_rows = [one.place for one in rollouts]
        width, n_steps = max(one.n_states for one in rollouts), max(one.limit for one in rollouts)
        self.room = -(-(width + n_steps) // ROOM_STEP) * ROOM_STEP
        states = [one.states for one in rollouts]
        lengths = [one.n_states for one in rollouts]
        self.cache, mask, self.filled_to = filled_cache(module.config, states, lengths, self.room - width, fixed=True)
        vars(self).update(self._begin(mask, self.room))
        self.mask = torch.cat([mask, mask.new_zeros(len(rollouts), self.room - width)], dim=1)
        is_loaded = module in _CAPTURED and n_steps > 1  # a capture takes as long as a step
        self._replayed = Replayed(self._step, self.device, is_loaded)

    @property
    def is_replayed(self) -> bool:
        """Whether other rollouts are decoded sooner by this batch than by one of their own."""
        return self._replayed.is_captured or self.device.type != "cuda"

    def fitting(self, rollouts: Sequence[Rollout], stop: Collection[int]) -> list[Rollout]:
        """Those that fit it together, each into a row of its candidate's."""
        if set(stop) != set(self._stop):
            return []
        free, width, n_steps = Counter(self._of_rows), 0, 0
        chosen: list[Rollout] = []
        for one in rollouts:
            wider, longer = max(width, one.n_states), max(n_steps, one.limit)
            if free[one.place] and wider + longer <= self.room:
                free[one.place] -= 1
                width, n_steps = wider, longer
                chosen.append(one)
        return chosen

    def load(self, rollouts: Sequence[Rollout]) -> None:
        """Decode these next."""
        waiting = {place: deque(one for one in rollouts if one.place == place) for place in set(self._of_rows)}
        self.rows = [waiting[place].popleft() if waiting[place] else None for place in self._of_rows]
        lengths = [0 if one is None else one.n_states for one in self.rows]
        states = [None if one is None else one.states for one in self.rows]
        mask = refill(self.cache, states, lengths, self.filled_to)
        for name, value in self._begin(mask, self.room).items():
            getattr(self, name).copy_(value)
        self.mask.zero_()[:, : mask.shape[1]] = mask

    def run(self) -> list[OwnTokens]:
        """What follows each rollout."""
        rollouts = [one for one in self.rows if one is not None]
        n_steps = max(one.limit for one in rollouts)
        for n in range(1, n_steps + 1):
            self._replayed()
            if n % self.apart == 0 and n < n_steps and not (self.left > 0).any():
                break
        if self._replayed.is_refused:
            _NEEDS_THE_HOST.add(self.module)
        if self._replayed.is_captured:
            _CAPTURED.add(self.module)
        self._found = {}
        self._take(torch.ones(len(self.rows), dtype=torch.bool))
        return [self._found[id(one)] for one in rollouts]

    def _step(self) -> None:
        self.mask.index_fill_(1, self.filled_to, 1)
        self._feed(self.mask)


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
        self._decoder = self._new_decoder()

    def _new_decoder(self) -> Decoder:
        fixed = None if self.blockwise.is_resident else False
        return Decoder(self.blockwise.module, self.cohort.leaves, self.blockwise.context, fixed)

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
        """Decode as many as fit a batch to their ends."""
        chosen, stop = self._next()
        try:
            ends = self._decoder.resume(chosen, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(chosen) == 1:
                raise
            self.statistics.splits += 1
            self.shares.halve_rollouts()
            self._decoder = self._new_decoder()
            return
        for one, end in zip(chosen, ends, strict=True):
            self.statistics.decoded += len(end.tokens)
            own = OwnTokens([*one.own.tokens, *end.tokens], torch.cat([one.own.max_prob, end.max_prob]))
            self.trajectories.finish(self.cohort, one.place, one.task, own)
        done = set(map(id, chosen))
        self._waiting = [one for one in self._waiting if id(one) not in done]

    def _next(self) -> tuple[list[Rollout], Collection[int]]:
        """Those that are decoded next, and what ends them: those with most tokens to go first, as many of each
        candidate as of the others, so that the next ones fit the same memory."""
        ordered = sorted(self._waiting, key=lambda one: -one.limit)
        generates = self._generates(ordered[0])
        ordered = [one for one in ordered if self._generates(one) == generates]
        stop = self.trajectories.stop_tokens if generates else ()  # stop tokens end a generation, and nothing else
        before: Counter[int] = Counter()
        turns: list[int] = []
        for one in ordered:
            turns.append(before[one.place])
            before[one.place] += 1
        in_turn = [ordered[index] for index in sorted(range(len(ordered)), key=turns.__getitem__)]
        n = max(1, self.shares.rollout_tokens // max(map(self._length, ordered)))
        if len(in_turn) > n > len(before):
            n -= n % len(before)
        return self._decoder.fitting(in_turn, stop) or in_turn[:n], stop

    def _generates(self, one: Rollout) -> bool:
        return self.trajectories.tasks[one.task].generates

    def _length(self, one: Rollout) -> int:
        prompt = self.trajectories.tasks[one.task].sample.prompt
        return len(prompt) + len(one.own.tokens) + one.limit
