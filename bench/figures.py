"""What the benchmarks share: how large their cases are, where their files go, and the one table of their figures.

By default `pytest bench/ --benchmark-only` ends within ten minutes, on 2 cores or with a GPU of 24 GB, and takes less
than 20 GB of disk. OLMFAST_BENCH_ALL=1 takes the large cases, those that RESULTS.md and docs/performance.md quote;
OLMFAST_BENCH_TINY=1 the smallest, which show that all of this works and say nothing about speed.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import torch

TINY = os.environ.get("OLMFAST_BENCH_TINY") == "1"
ALL = os.environ.get("OLMFAST_BENCH_ALL") == "1" and not TINY
GPU = torch.cuda.is_available()
HEADS = ("case", "ours", "rival", "ratio", "of limit")
T = TypeVar("T")


def sized(tiny: T, usual: T, large: T) -> T:
    """What a case is made of, by how large it is to be."""
    return tiny if TINY else large if ALL else usual


@dataclass(frozen=True)
class Figure:
    """A row of the table. `ratio`: how many times better than the rival; `limit`: the share reached of what can be."""

    case: str
    ours: str
    rival: str = "-"
    ratio: float | None = None
    limit: str = "-"

    @property
    def cells(self) -> tuple[str, ...]:
        ratio = "-" if self.ratio is None else f"{self.ratio:.{0 if self.ratio >= 100 else 2}f}x"
        return (self.case, self.ours, self.rival, ratio, self.limit)


@dataclass
class Figures:
    """Those of a session. Each is shown as soon as it is there, whatever pytest captures."""

    config: pytest.Config
    rows: list[Figure] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, figure: Figure, **more: object) -> None:
        """A row, and what else was measured, which is shown now and not in the table."""
        self.rows.append(figure)
        named = zip(HEADS[1:], figure.cells[1:], strict=True)
        parts = [f"{name} {cell}" for name, cell in named if cell != "-"]
        self.say(" | ".join([figure.case, *parts, *(f"{name} {value}" for name, value in more.items())]))

    def say(self, text: str) -> None:
        """Show a line now."""
        plugins = self.config.pluginmanager
        reporter, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(text)

    def table(self) -> list[str]:
        """The lines of the table, with what the session took."""
        rows = [HEADS, *(figure.cells for figure in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        size = "tiny" if TINY else "large" if ALL else "usual"
        device = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
        spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(one.ru_utime + one.ru_stime for one in spent)
        seconds = f"{time.perf_counter() - self.started:.0f} s, {cpu:.0f} CPU s"
        about = f"{device}; torch {torch.__version__}; {size} cases; {seconds}; load {os.getloadavg()[0]:.1f}"
        return [about, *(_line(cells, widths) for cells in rows)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    case, *others = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([case, *(cell.strip().rjust(len(cell)) for cell in others)])


@contextmanager
def room(factory: pytest.TempPathFactory, name: str, n_bytes: float, preferred: Path | None = None) -> Iterator[Path]:
    """A folder for so many bytes, which is deleted at the end: in `preferred` where that has them.

    Where the disk has less, the benchmark is skipped.
    """
    if preferred is not None and preferred.is_dir() and shutil.disk_usage(preferred).free >= n_bytes:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=preferred))
    else:
        folder = factory.mktemp(name)
    try:
        free = shutil.disk_usage(folder).free
        if free < n_bytes:
            pytest.skip(f"{folder}: needs {n_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; use --basetemp=FOLDER")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
