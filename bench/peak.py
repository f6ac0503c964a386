"""Seconds of a call, and the memory that scoring takes at its peak; importable by a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from search_case import BLOCKS, Case, candidates_of, session

from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.memory import Memory

T = TypeVar("T")


def cpu(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """See `timed`."""
    return timed(call, device)[0]


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of a call, and its result: on a GPU by the clock, until all it asked for is done; else of the CPU."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize(device)
    began = clock()
    result = call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - began, result


class Peak:
    """Bytes on the model's device at the most while it is watched: what torch allocated, or anonymous memory."""

    n_bytes = 0


@contextmanager
def watched(memory: Memory) -> Iterator[Peak]:
    """The peak is complete when the block ends."""
    peak, done = Peak(), threading.Event()
    peak.n_bytes = memory.used

    def watch() -> None:
        while not done.wait(0.005):
            peak.n_bytes = max(peak.n_bytes, memory.used)

    if memory.on_gpu:
        torch.cuda.reset_peak_memory_stats(memory.device)
        yield peak
        peak.n_bytes = torch.cuda.max_memory_allocated(memory.device)
        return
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def peak_memory(case: Case, questions: int, limit: int | None) -> tuple[int, int, int, float]:
    """Bytes of anonymous memory at the peak of scoring and before it, splits for want of memory, and CPU seconds."""
    torch.set_num_threads(1)
    output, block = f"limit{limit}", BLOCKS[1]
    with session(case.config(questions, output, max_ram=limit)) as engine:
        scorer = engine.search.scorer
        assert isinstance(scorer, BatchedScorer)
        before = scorer.memory.used
        with watched(scorer.memory) as peak:
            seconds = cpu(lambda: [scorer.score(*candidates_of(kind, engine, block)) for kind in ("block", "svd_es")])
        return peak.n_bytes, before, scorer.statistics.splits, seconds
