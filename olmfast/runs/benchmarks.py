"""A result's held-out scores as `.eval_results/*.yaml`, the form in which the Hub shows them on a model's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from olmfast import __version__
from olmfast.config.benchmarks import Benchmark
from olmfast.config.datasets import DatasetConfig
from olmfast.output.writer import write_text
from olmfast.runs.scoreboard import Scoreboard

FOLDER = ".eval_results"


def results_text(name: str, benchmark: Benchmark, entry: DatasetConfig, board: Scoreboard, label: str) -> str:
    """The file of one benchmark: the share of right answers, or in modes that know none the mean score."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    share = board.accuracy.get(label, {}).get(name)
    what = f"mean score of mode {entry.mode}, lower is better" if share is None else f"right answers, mode {entry.mode}"
    value = board.rows[label][name] if share is None else share * benchmark.scale
    notes = f"{what}; {board.n_questions(name)} questions of {Path(name).name}; olmfast {__version__}"
    told = EvalResultEntry(benchmark.dataset, benchmark.task, float(f"{value:.6g}"), notes=notes)
    return yaml.safe_dump(eval_result_entries_to_yaml([told]), sort_keys=False, allow_unicode=True, width=100)


def write_results(
    folder: Path,
    benchmarks: Mapping[str, Benchmark],
    entries: Mapping[str, DatasetConfig],
    board: Scoreboard,
    label: str,
) -> None:
    """Write the result's (`label`'s) score on each held-out dataset that is a benchmark, a file each."""
    for name, benchmark in benchmarks.items():
        if label in board.rows:
            (folder / FOLDER).mkdir(exist_ok=True)
            file = f"{benchmark.dataset}_{benchmark.task}".replace("/", "_")
            file = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in file)
            write_text(folder / FOLDER / f"{file}.yaml", results_text(name, benchmark, entries[name], board, label))
