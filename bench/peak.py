"""CPU seconds of a call, and the memory that scoring takes at its peak; importable by a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from search_case import Case, candidates_of, session


def cpu(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def peak_memory(case: Case, limit: int | None) -> tuple[int, int, int, float]:
    """Bytes of anonymous memory at the peak of scoring and before it, splits for want of memory, and CPU seconds."""
    torch.set_num_threads(1)
    output = f"limit{limit}"
    with session(case.config(32, output, max_ram=limit)) as engine:
        scorer, done = engine.search.scorer, threading.Event()
        before = peak = scorer.memory.used

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.005):
                peak = max(peak, scorer.memory.used)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            seconds = cpu(lambda: [scorer.score(*candidates_of(kind, engine, 5)) for kind in ("block", "svd_es")])
        finally:
            done.set()
            watcher.join()
        return peak, before, scorer.statistics.splits, seconds
