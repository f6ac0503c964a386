"""How much memory evaluation may take: the user's limit, what is used now, and what one pass was seen to take."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol
from weakref import ref

import psutil
import torch

from olmfast import _shards
from olmfast.errors import InputError

# Shares of the memory left beside the model; the rest is slack for what comes and goes.
PREFIX_SHARE, STACK_SHARE, PASS_SHARE = 0.4, 0.2, 0.25
SWEEP_SHARE = 0.1  # of the prefix's, where blocks are streamed
N_BUFFERS = 2  # blocks that are in memory at a time where they are streamed: one computes while the next one comes
PASS_BYTES = 16 << 20  # of a small pass: with less beside the model nothing can be done
# What queueing a pass for a block costs, in operations that the device does meanwhile: a millisecond of a small card.
PASS_OPERATIONS = {"cuda": 10**11, "cpu": 3 * 10**7}
LEAST_OVERHEAD = 32  # of a pass, in tokens
CPU_TOKENS = 1024  # in one pass on a CPU: the activations of more do not stay in its caches
MMAP_THRESHOLD = -3  # of glibc's mallopt
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What a container may use, by the second and the first version of Linux's control groups.
CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Holder(Protocol):
    """Who keeps what it may want again."""

    def let_go(self) -> None:
        """Keep nothing of it."""
        ...


class Memory:
    """The memory of the device that the model is on: `limit` bytes for the whole process, model included.

    Without a limit of the user's it is nine tenths of what the machine, or the container, has.
    """

    def __init__(self, device: torch.device, max_ram: int | None = None, max_vram: int | None = None) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        wanted = max_vram if self.on_gpu else max_ram
        total = torch.cuda.mem_get_info(device)[1] if self.on_gpu else machine_bytes()
        self.limit = wanted if wanted is not None else int(0.9 * total)
        self.is_limited = wanted is not None
        self._counts_files = wanted is not None and not self.on_gpu
        self._holder: ref[Holder] | None = None
        _shards.release_copied(self._counts_files)
        if self._counts_files:
            _return_what_is_freed()

    def check(self, n_bytes: int, what: str) -> None:
        """Raise InputError where no more than so many bytes are left, for something that is still to be loaded."""
        if self.room <= n_bytes:
            raise InputError(f"{self._told}; {what} and what there is already take {self._with(n_bytes)}")

    def streams(self, n_bytes: int, outside_bytes: int, block_bytes: int) -> bool:
        """Whether a model still to be built is streamed: `n_bytes` leave no room for what a candidate of a block takes,
        and a small pass.

        Raises InputError where not even what is outside of its blocks and two of them fit, of `block_bytes` each.
        """
        if self.room > n_bytes + block_bytes + PASS_BYTES:
            return False
        least = least_streamed(outside_bytes, block_bytes)
        if self.room <= least:
            raise InputError(
                f"{self._told}; the model and the libraries alone take {self._with(n_bytes)}, and at least "
                f"{self._with(least)} with its blocks streamed, {N_BUFFERS} of them in memory at a time"
            )
        return True

    def give_to(self, holder: Holder) -> None:
        """From now on it is `holder` that keeps what it can: under a limit, who did so before has to let go."""
        before = self._holder() if self._holder is not None else None
        if self.is_limited and before is not None and before is not holder:
            before.let_go()
        self._holder = ref(holder)

    @property
    def _told(self) -> str:
        return f"{'max_vram' if self.on_gpu else 'max_ram'}: {self.limit / 1e9:.2f} GB"

    def _with(self, n_bytes: int) -> str:
        return f"{(self.used + n_bytes) / 1e9:.2f} GB"

    @property
    def used(self) -> int:
        """Bytes in use now; on a CPU without the pages of mapped files, which the system can take back.

        Under a limit of the user's they count too, and those of models are given back once they have been read.
        """
        if self.on_gpu:
            return int(torch.cuda.memory_allocated(self.device))
        own = psutil.Process().memory_info()
        return int(own.rss if self._counts_files else own.rss - getattr(own, "shared", 0))

    @property
    def room(self) -> int:
        """Bytes left under the limit."""
        return self.limit - self.used

    def taken_by(self, work: Callable[[], Any]) -> int:
        """Bytes that `work` takes at its peak, beside what is in use before; 0 where that cannot be seen."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = self.used
            work()
            return int(torch.cuda.max_memory_allocated(self.device)) - before
        try:
            RESET.write_text("5")
        except OSError:  # no Linux, or one that does not show it
            work()
            return 0
        _trim()
        RESET.write_text("5")  # from here on VmHWM is the peak since now
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before


@dataclass
class Shares:
    """What each kind of work may take of the memory beside the model; halved where that was too much.

    `room` (bytes) is shared out once, so that what is split how does not depend on the moment. `pass_tokens` go
    through the blocks at a time, where a pass more costs as much as `pass_overhead` tokens; `rollout_tokens` are
    decoded on, and `prefix_bytes` hold activations between units, with the keys and values of free runs if
    `keeps_states`. Where blocks are streamed, `sweep_bytes` hold those of passes that go through the blocks together;
    where they are not, `graph_bytes` hold what a gradient goes back through, when nothing is stacked. Where several
    processes share the work they have `agreed` on all of this but these two, which change no sums, and measure no more.
    """

    room: int
    pass_tokens: int
    rollout_tokens: int
    pass_overhead: int = LEAST_OVERHEAD
    prefix_bytes: int = 0
    keeps_states: bool = True
    agreed: bool = False
    sweep_bytes: int = 0
    graph_bytes: int = 0

    @classmethod
    def of(cls, memory: Memory, batch_tokens: int, block_parameters: int, streamed: bool = False) -> Shares:
        """Those of a memory of which nothing has been measured yet."""
        operations = PASS_OPERATIONS.get(memory.device.type, PASS_OPERATIONS["cuda"])
        overhead = max(LEAST_OVERHEAD, operations // (2 * max(block_parameters, 1)))
        pass_tokens = min(batch_tokens, CPU_TOKENS) if memory.device.type == "cpu" else batch_tokens
        sweep_bytes = int(SWEEP_SHARE * memory.room) if streamed else 0
        graph_bytes = 0 if streamed else int(STACK_SHARE * memory.room)
        return cls(memory.room, pass_tokens, batch_tokens, overhead, sweep_bytes=sweep_bytes, graph_bytes=graph_bytes)

    @classmethod
    def agreed_by(cls, several: Sequence[Shares]) -> Shares:
        """What fits everywhere."""
        least = {f.name: min(getattr(one, f.name) for one in several) for f in fields(cls)}
        return cls(**{**least, "agreed": True})

    def take(self, other: Shares) -> None:
        """Be the same as `other`, but for what changes no sums."""
        for own in fields(self):
            if own.name not in ("sweep_bytes", "graph_bytes"):
                setattr(self, own.name, getattr(other, own.name))

    def fit(self, n_bytes: int, n_tokens: int, state_bytes: int, n_states: int) -> None:
        """Keep each kind of work within its share, given that a pass of `n_tokens` takes `n_bytes`.

        `state_bytes` are those of one token's keys and values, `n_states` the tokens of all free runs at their longest.
        """
        if self.agreed:
            return
        share = int(PASS_SHARE * self.room)
        self.pass_tokens = min(self.pass_tokens, _power_of_two(share * n_tokens // max(n_bytes, 1)))
        # Decoding holds the states of its tokens twice: those handed over, and its cache.
        self.rollout_tokens = min(self.rollout_tokens, _power_of_two(share // (2 * state_bytes)))
        self.prefix_bytes = int(PREFIX_SHARE * self.room) - self.sweep_bytes
        self.keeps_states = state_bytes * n_states <= self.prefix_bytes / 2

    def n_stacked(self, n_bytes: int) -> int:
        """How many candidates' values are stacked at a time, of `n_bytes` each."""
        return max(1, int(STACK_SHARE * self.room) // max(n_bytes, 1))

    def halve_prefix(self) -> None:
        """Activations that were to be kept did not fit: halve what is kept, and the batches that they come in."""
        self.pass_tokens, self.prefix_bytes = self.pass_tokens // 2, self.prefix_bytes // 2

    def halve_sweeps(self) -> None:
        """Several passes at once did not fit."""
        self.sweep_bytes //= 2

    def halve_passes(self) -> None:
        """A pass did not fit."""
        self.pass_tokens = max(1, self.pass_tokens // 2)

    def halve_rollouts(self) -> None:
        """A batch of rollouts did not fit."""
        self.rollout_tokens = max(1, self.rollout_tokens // 2)


def _power_of_two(n: int) -> int:
    """The largest up to n, at least 1: a size that does not change with every byte that is free."""
    return 1 << (max(n, 1).bit_length() - 1)


def least_streamed(outside_bytes: int, block_bytes: int) -> int:
    """Bytes that a model takes at least while its blocks are streamed, a small pass included."""
    return outside_bytes + N_BUFFERS * block_bytes + PASS_BYTES


def machine_bytes() -> int:
    """Bytes of memory that this machine has, or that a container leaves of them."""
    total = int(psutil.virtual_memory().total)
    for path in CONTAINER:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on a GPU or on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _return_what_is_freed() -> None:
    """Have glibc give large blocks back at once: what it keeps for later would count against the limit."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 20)
