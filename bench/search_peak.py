"""A joint search in a process of its own, and what it took; importable by that process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from olmfast import run
from olmfast.config.run import load_config
from olmfast.evaluation.model import WorkingModel
from olmfast.search import coefficients

STEPS = 4  # along the gradient, in each grain
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Ran:
    """What a process says of its search: bytes before it had a model and at the peak, CPU seconds, whether blocks were
    streamed, and of each step what won and what that changed."""

    libraries: int
    peak: int
    seconds: float
    streamed: bool
    decisions: list[Any]


def searched(path: Path, limit: int | None) -> Ran:
    """Search under a limit; called in a process of its own."""
    torch.set_num_threads(1)
    for grain in coefficients.GRAINS:
        coefficients.GRAINS[grain] = STEPS
    coefficients.FEWEST = STEPS
    libraries, models = list[int](), list[WorkingModel]()
    build = WorkingModel.__init__

    def kept(self: WorkingModel, *args: Any, **keys: Any) -> None:
        process = psutil.Process()
        donors = sum(one.rss for one in process.memory_maps() if one.path.endswith(".safetensors"))
        libraries.append(process.memory_info().rss - donors)
        build(self, *args, **keys)
        models.append(self)

    WorkingModel.__init__ = kept  # type: ignore[method-assign]
    config = load_config(path, {"output_dir": f"under{limit}", **({"max_ram": limit} if limit else {})})
    began = time.process_time()
    with peak_watched() as peak:
        record = run(config, overwrite=True).record
    seconds = time.process_time() - began
    steps = [json.loads(line) for line in (config.output_dir / "steps.jsonl").read_text().splitlines()]
    decisions = [(one["key"], one["outcome"]["winner"], one["change"]) for one in steps if one["entry"] == "step"]
    assert record.status in ("finished", "stopped")
    streamed = any("model.layers.0.mlp.up_proj.weight" in model.residency for model in models)
    return Ran(libraries[0], max(peak), seconds, streamed, decisions)


@contextmanager
def peak_watched() -> Iterator[list[int]]:
    """Bytes at the peak of the resident set, as the kernel has them, now and again: olmfast resets them."""
    peaks, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            peaks[0] = max(peaks[0], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()
