"""Rollouts of a cohort's candidates that wait until they fill a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch

from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.cohort import Cohort, Statistics
from olmfast.evaluation.decoding import Decoder, Rollout
from olmfast.evaluation.memory import Shares, is_out_of_memory
from olmfast.evaluation.tasks import OwnTokens
from olmfast.evaluation.trajectories import Trajectories


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

    def let_go(self) -> bool:
        """Give back the memory that is kept for the next batch; whether there was any."""
        return self._decoder.forget()

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
        return self._decoder.room_of(len(prompt) + len(one.own.tokens) + one.limit)
