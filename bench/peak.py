"""Seconds of a call, and the memory that scoring takes at its peak; importable by a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from search_case import Case, candidates_of, session

from olmfast.evaluation.memory import Memory


def cpu(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: on a GPU by the clock, until all it asked for is done; else of the CPU."""
    if device.type != "cuda":
        return cpu(call)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


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


def peak_memory(case: Case, limit: int | None) -> tuple[int, int, int, float]:
    """Bytes of anonymous memory at the peak of scoring and before it, splits for want of memory, and CPU seconds."""
    torch.set_num_threads(1)
    output = f"limit{limit}"
    with session(case.config(32, output, max_ram=limit)) as engine:
        scorer = engine.search.scorer
        before = scorer.memory.used
        with watched(scorer.memory) as peak:
            seconds = cpu(lambda: [scorer.score(*candidates_of(kind, engine, 5)) for kind in ("block", "svd_es")])
        return peak.n_bytes, before, scorer.statistics.splits, seconds
