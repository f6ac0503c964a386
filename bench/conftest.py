"""One summary for all benchmarks: figures are shown as they come, and in a table at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from figures import Figure, Figures

FIGURES = pytest.StashKey[Figures]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its own tables are of single calls, mostly of one round
    config.stash[FIGURES] = Figures(config)


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """Those of the session."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture
def report(figures: Figures, benchmark: Any) -> Callable[..., None]:
    """Adds a row to the table, and to the JSON of the benchmark: the fields of `Figure`, and more by any name."""

    def add(
        case: str, ours: str, rival: str = "-", ratio: float | None = None, limit: str = "-", **more: object
    ) -> None:
        figure = Figure(case, ours, rival, ratio, limit)
        figures.add(figure, **more)
        benchmark.extra_info[case] = {**asdict(figure), **{name: str(value) for name, value in more.items()}}

    return add


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No letters between the figures, but for what fails."""
    if report.skipped or (report.when == "call" and report.passed):
        return report.outcome, "", report.outcome.upper()
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for skipped in terminalreporter.stats.get("skipped", []):
        reason = skipped.longrepr[2].removeprefix("Skipped: ")
        terminalreporter.write_line(f"skipped: {skipped.nodeid}: {reason}")
    figures = config.stash[FIGURES]
    if figures.rows:
        terminalreporter.section("figures")
        for line in figures.table():
            terminalreporter.write_line(line)
