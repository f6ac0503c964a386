"""Decoding on from keys and values that passes have computed, many rollouts in a batch.

On a GPU shapes stay the same from step to step and from batch to batch, so that what is captured once is replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch

from olmfast.evaluation.cache import Kept, filled_cache, refill
from olmfast.evaluation.generation import TOKENS_APART, next_tokens
from olmfast.evaluation.leaves import Leaf, computing_for
from olmfast.evaluation.replay import Replayed
from olmfast.evaluation.tasks import OwnTokens
from olmfast.evaluation.transit import Fetched, sent

# Types of devices on which shapes stay the same from step to step, so that steps can be replayed.
FIXED_ON = {"cuda"}
LEFT = 0.75  # rows that are done leave a batch once no more than this share of it goes on, if its shapes may change
ROOM_STEP = 64  # in which the room of a batch of fixed shapes grows, so that the next ones fit


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
        return chosen if 2 * len(chosen) >= min(len(rollouts), self._last.n_rows) else []

    def room_of(self, n_tokens: int) -> int:
        """Tokens that a row of so many takes in memory."""
        return _in_steps(n_tokens) if self.is_fixed else n_tokens

    def forget(self) -> bool:
        """Give back the last batch's memory; whether there was any."""
        last, self._last = self._last, None
        return last is not None

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
        batch.rows = []  # whose states are not wanted any more
        if isinstance(batch, _Fixed) and batch.is_replayed:
            self._last = batch
        return [found[index] for index in range(len(order))]


def _in_steps(n_tokens: int) -> int:
    return -(-n_tokens // ROOM_STEP) * ROOM_STEP


_NEEDS_THE_HOST: WeakSet[Any] = WeakSet()
_CAPTURED: WeakSet[Any] = WeakSet()  # modules of which a step of decoding has been captured


def needs_the_host(module: Any) -> bool:
    """Whether a step of decoding with this module could not be captured, and is queued anew each time."""
    return module in _NEEDS_THE_HOST


class _Batch(ABC):
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
            token, max_prob = next_tokens(self.module, self.ids, mask, self.positions, self.cache)
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
                self._found[id(rollout)] = OwnTokens(tokens[at, :n].tolist(), probabilities[at, :n].clone())

    @abstractmethod
    def run(self) -> list[OwnTokens]:
        """What follows each rollout."""

    def _count(self, places: Sequence[int]) -> None:
        """The candidates that rows are of, in turn."""
        names, counts = np.unique(places, return_counts=True)
        self.places, self.counts = names.tolist(), counts.tolist()
        self._prepared = [leaf.prepare(self.places, self.counts) for leaf in self.leaves]


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
        self.n_rows = len(rollouts)
        width, n_steps = max(one.n_states for one in rollouts), max(one.limit for one in rollouts)
        self.room = _in_steps(width + n_steps)
        states = [one.states for one in rollouts]
        lengths = [one.n_states for one in rollouts]
        self.cache, mask, self.filled_to = filled_cache(module.config, states, lengths, self.room - width, fixed=True)
        vars(self).update(self._begin(mask, self.room))
        self.mask = torch.cat([mask, mask.new_zeros(len(rollouts), self.room - width)], dim=1)
        is_loaded = module in _CAPTURED and n_steps > 1  # a capture takes as long as a step
        self._replayed = Replayed(self.device, is_loaded)

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
            self._replayed(self._step)
            if n % self.apart == 0 and n < n_steps and not (self.left > 0).any():
                break
        if self._replayed.is_refused:
            _NEEDS_THE_HOST.add(self.module)
        if self._replayed.is_captured:
            _CAPTURED.add(self.module)
        self._take(torch.ones(len(self.rows), dtype=torch.bool))
        found, self._found = self._found, {}
        return [found[id(one)] for one in rollouts]

    def _step(self) -> None:
        self.mask.index_fill_(1, self.filled_to, 1)
        self._feed(self.mask)
